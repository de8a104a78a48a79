"""Documents -> tokenizer, splits, shards and manifest."""
