"""Drawn data with exact answers: sprite scenes, their wording, questions and files.

It could be deleted without breaking the rest.
"""
