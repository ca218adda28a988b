"""Optimization and its log: Trainer with an exact order, committed checkpoints, cost, estimates. Model and data are given."""
