"""Shared tools: errors, files, locks, console, command line, runs, intervals.

No model and no stage of the method belongs here. Files about tensors import torch at the top, others inside functions.
"""
