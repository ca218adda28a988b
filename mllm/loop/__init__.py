"""Optimization and its log: Trainer with an exact order, committed checkpoints, collation, estimates.

The model and the data are given.
"""
