"""From pairs to a run: joining by key, batch order, one exact step, validation, checkpoints.

Heads and losses are in align/model.
"""
