"""Hand-written kernels for accelerators: one file a family, each with the rule of its use."""
