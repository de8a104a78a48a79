"""Many runs as one: sweeps and ladders, and what came out of them."""
