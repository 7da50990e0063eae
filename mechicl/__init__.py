"""Mechanistic interpretability of in-context learning, in toy transformers and in vision-language models."""

__version__ = "0.1.0"
