"""Episodes spread over several processes, GPUs or machines: `spread` and the crew of workers that stands in for a model. See `spread.job`."""
