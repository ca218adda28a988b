"""Optimization and its log: Trainer with an exact order, committed checkpoints, counts, estimates.

The model and the data are given.
"""
