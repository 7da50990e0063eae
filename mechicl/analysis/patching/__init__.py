"""What is gained by putting one run's activations into another: cells, transplants, single edges. Exact runs only; estimates are in `gradients`."""
