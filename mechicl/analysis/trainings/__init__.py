"""Over many checkpoints or many trained models: bands, change points, trends, paired claims."""
