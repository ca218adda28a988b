"""Conversation files to token ids and labels: reading, checking, templates, the index of lengths, batches and packs.

Nothing here uses the model.
"""
