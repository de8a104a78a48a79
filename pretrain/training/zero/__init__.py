"""DeepSpeed: the engine, and all that is known of how it lays out what it shards."""
