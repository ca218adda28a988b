"""One reader for each data set's official layout.

A reader turns files into rows and says what it needs; it measures nothing.
"""
