"""The run folder: every path and every file of a run, and who may write to it."""
