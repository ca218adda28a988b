"""Bytes on disk to checked rows: tars, tables and folders, and the gate that rejects what cannot be used.

No torch, no encoder, nothing written but the plan of a job.
"""
