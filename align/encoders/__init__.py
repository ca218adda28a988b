"""Frozen models: loaded safely, read by family, with their transforms and fingerprints.

Nothing is trained here and no data set is read.
"""
