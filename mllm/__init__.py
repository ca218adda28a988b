"""Stage two: the aligned encoder inside a LLaVA-style MLLM; put together, trained, saved and asked."""
