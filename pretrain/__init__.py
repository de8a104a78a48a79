"""Everything that runs on every rank. Knows nothing of clusters or of the command line."""

__version__ = "0.1.0"
