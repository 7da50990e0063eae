"""Training toy transformers, one or many at once."""
