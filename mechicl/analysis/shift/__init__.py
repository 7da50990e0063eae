"""How keys and values move when examples are added, and whether meaning or form moved them."""
