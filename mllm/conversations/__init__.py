"""Conversation files to token ids and labels: reading, checking, templates, index of lengths, batches and packs. No model here."""
