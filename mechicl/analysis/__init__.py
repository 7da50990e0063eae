"""What is said about a model: scores, ablations, patches, circuits, readings, shifts. Knows models and measures, never a figure.

A room for each kind of question; what several rooms need (feeding batches, statistics, labels, layout) lies beside them."""
