"""Reading samples: rows of tars, tables and image folders, and the gate that rejects unusable ones.

No torch, no encoder. The plan of a job is the only file written here.
"""
