"""Results to one HTML page: sections and figures.

No torch; nothing is measured here.
"""
