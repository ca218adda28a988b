"""lmms-eval only: the adapter, its tasks, what they call, and lmms-eval's output as results.

Nothing else may import it.
"""
