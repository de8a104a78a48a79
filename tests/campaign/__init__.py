"""Kills of the real program at random moments, beside an unbroken run."""
