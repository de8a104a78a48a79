"""Synthetic probes: small encoders trained from scratch on a task."""
