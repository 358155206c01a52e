"""Pure functions over tensors: no I/O, no model, no global random state."""
