"""What a run costs, before it runs: memory, activations, FLOPs, and the plan made of them."""
