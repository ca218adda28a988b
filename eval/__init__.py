"""Measurement: zero-shot classification, retrieval and one report for before and after."""
