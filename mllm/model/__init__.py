"""What is exported: the MLLM as a Hugging Face model, its processor, its parts and cost, how it answers.

No training loop.
"""
