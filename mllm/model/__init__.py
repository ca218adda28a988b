"""What is exported: the MLLM as a Hugging Face model, its processor, its saving, how it answers. No training loop."""
