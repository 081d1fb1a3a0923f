"""The steps of propagation as programs: in XLA for every platform, as a kernel for a TPU."""
