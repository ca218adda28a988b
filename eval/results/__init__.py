"""Results on disk: records, examples and their pictures, pure metrics, comparisons, calibration, published anchors.

No torch, no model, no HTML.
"""
