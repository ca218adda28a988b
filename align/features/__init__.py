"""Features on disk: the store, the extraction that fills it, inner layers, imported embeddings.

No heads and no training.
"""
