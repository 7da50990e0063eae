"""Training toy transformers, one or many at once: recipes, their fast loops, their folders. The models themselves are in `models.toys`."""
