"""Documents -> tokens -> shards -> the resumable stream of rows -> batches."""
