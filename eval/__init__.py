"""Measurement: zero-shot tasks, open-vocabulary segmentation, MLLM benchmarks, and one report for before and after."""
