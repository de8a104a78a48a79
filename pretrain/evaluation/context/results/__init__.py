"""Results of an evaluation: the parts that ranks have computed, put together, and what they say."""
