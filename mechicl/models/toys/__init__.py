"""Toy transformers behind the interface of the big models."""
