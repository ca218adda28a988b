"""A run of any entry, from its command line to its folder: recipes, console, processes, manifest, log and checkpoints.

No model and no stage of the method belongs here. Files about tensors import torch at the top, others inside functions.
"""
