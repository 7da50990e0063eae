"""Many trainings over a grid of settings, resumable, on one machine or a cluster. What is said about finished ones is in `analysis.trainings`."""
