"""Results to one HTML page: sections, figures, examples.

No torch; nothing is measured here.
"""
