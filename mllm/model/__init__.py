"""What is exported: the MLLM as a Hugging Face model, its processor, saving, and answering.

The training loop is in mllm/loop.
"""
