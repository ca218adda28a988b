"""What is asked: tasks by id, their data, masks and prompts.

No model and no score.
"""
