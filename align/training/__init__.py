"""Pairs to steps to a run: joining by key, batch order, one exact step, validation, checkpoints of the run.

What is computed in a step belongs to align/model.
"""
