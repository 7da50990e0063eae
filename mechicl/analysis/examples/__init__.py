"""Which examples to show: retrieval, strategies, answers under each."""
