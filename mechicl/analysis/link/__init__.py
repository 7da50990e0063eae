"""Link-context learning: evaluation, baselines, link against prior."""
