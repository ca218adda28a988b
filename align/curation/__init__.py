"""Choosing data: stores in, keys out. Concepts, scores over shards, bounded lists, duplicates, coverage.

No training and no image is decoded here.
"""
