"""Shared tools that know no run: errors, files, folders, locks, preemption, intervals, charts.

No model and no stage of the method belongs here. Files about tensors import torch at the top, others inside functions.
"""
