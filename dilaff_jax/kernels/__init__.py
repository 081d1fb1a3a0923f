"""The steps of propagation as programs: in XLA for every platform, as kernels for TPU and GPU."""
