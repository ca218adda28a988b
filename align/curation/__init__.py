"""Choosing training data: concepts, scores over shards, bounded lists, duplicates, coverage. Feature stores in, keys out.

No training happens here, and no image is decoded.
"""
