"""How it is scored: zero-shot, retrieval, compositional, segmentation, generated answers, and the run over all of them.

Numbers on disk and pages are not made here.
"""
