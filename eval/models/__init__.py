"""Models to measure: aligned models, their untrained twins, CLIP and SigLIP, and the cache of frozen features.

No task is scored here.
"""
