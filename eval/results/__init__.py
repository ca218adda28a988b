"""Results on disk: records, examples with pictures, metrics, comparisons, calibration, and published numbers.

No torch, no model, no HTML.
"""
