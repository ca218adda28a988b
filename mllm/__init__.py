"""Stage two: the aligned encoder inside a LLaVA-style MLLM (not built yet: see README, "What is not done")."""
