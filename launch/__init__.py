"""What runs around the ranks: the command line, local launch, the list of runs, the quickstart."""
