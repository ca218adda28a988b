"""Conversation files to token ids and labels: reading, checking, templates, the index of lengths, batches and packs.

No model belongs here.
"""
