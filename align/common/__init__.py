"""What every part needs and no part owns: errors, files, locks, console, command line, runs, intervals.

No model and no stage of the method belongs here; torch only in a file that is about it, imported where it is used.
"""
