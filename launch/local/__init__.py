"""Ranks on this machine: started, watched, ended together."""
