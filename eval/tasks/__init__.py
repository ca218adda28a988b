"""Tasks: their ids, data, masks and prompts.

No model and no score.
"""
