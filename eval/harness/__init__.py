"""All that needs lmms-eval: the adapter, the YAML tasks and their functions, and lmms-eval's output as results.

No other library folder may import it.
"""
