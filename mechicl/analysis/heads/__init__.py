"""Which heads do it: measures of attention, the named scores made of them, their nulls."""
