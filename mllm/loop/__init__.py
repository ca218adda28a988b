"""Training loop and log: Trainer with an exact order, committed checkpoints, counts, estimates.

Model and data are passed in.
"""
