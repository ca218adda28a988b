"""Choosing encoders before training: candidates, their scores, probing, tables and figures.

It may use align/training, never the reverse.
"""
