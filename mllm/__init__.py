"""Stage two: puts the aligned encoder into a LLaVA-style MLLM, trains it, saves it and asks it questions."""
