"""What parts of a model say and look for: logits, lenses, OV and QK circuits, function vectors."""
