"""What only a CPU needs: layers written so that XLA's CPU backend is fast at them.

`dispatch` says, once when a model is traced, whether they are taken. Elsewhere networks are made of
Flax's own layers. Numbers are the same to rounding, and so are the variables.
"""
