"""The method as mathematics and as a Hugging Face model: heads, losses, ranking, the dual encoder, published heads.

No data set and no training run.
"""
