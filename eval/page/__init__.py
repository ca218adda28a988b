"""One HTML page from results: sections and figures.

No torch. Nothing is measured here.
"""
