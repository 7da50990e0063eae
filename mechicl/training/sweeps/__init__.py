"""Many trainings over a grid of settings, resumable, on one machine or a cluster."""
