"""Runs on a Slurm cluster: queries, scripts, submissions, and what happens inside a job."""
