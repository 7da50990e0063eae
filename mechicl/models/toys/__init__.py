"""Toy transformers behind the interface of the big models: their parts, presets, positions and prompts. How they are trained is in `training.toys`."""
