"""Choosing before training: candidates, their scores, probing, tables and figures.

It may use training; training must not use it.
"""
