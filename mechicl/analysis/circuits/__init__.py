"""Small sets of edges that do the work: finding them, measuring them on other prompts, comparing them."""
