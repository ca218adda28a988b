"""Numbers on disk: records, pure metrics, comparisons, calibration, published anchors.

No torch, no model, no HTML.
"""
