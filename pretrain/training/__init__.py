"""DeepSpeed engine, step, trainer, checkpoints."""
