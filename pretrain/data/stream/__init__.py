"""Shards -> the resumable stream of rows -> batches."""
