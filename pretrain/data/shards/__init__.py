"""Shards: written, verified, fetched and read."""
