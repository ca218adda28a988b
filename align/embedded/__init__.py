"""Embedded assets: real weights and graphics by name, fetched, verified and converted once.

Nothing here depends on what they are used for.
"""
