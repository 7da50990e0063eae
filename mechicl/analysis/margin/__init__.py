"""Whether a query is nearer to the exemplars of its own label: margins of keys and values, learned maps, causal tests."""
