"""Context extension: what is measured, on which windows, and what it says."""
