"""A run that survives: checkpoints, files, logs, signals, other ranks, launchers, and what is said when they fail.

Nothing here changes what is computed. It imports the method; the method imports nothing of it.
"""
