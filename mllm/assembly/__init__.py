"""Components to one untrained model: a language model, an aligned encoder, a projector, a warm start.

Nothing is optimized by gradient here.
"""
