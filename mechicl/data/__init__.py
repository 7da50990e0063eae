"""Where episodes come from: procedural concepts, real digits, pseudo-words."""
