"""Scoring: zero-shot classification, retrieval, compositional matching, segmentation, generated answers, and the loop over tasks.

Files of results and pages are made in `eval.results` and `eval.page`.
"""
