"""Refinement by colour instead of learned affinity, to compare with: PAMR and DenseCRF.

Both are called as the operators of `propagate` are, `f(probs, guide, offsets, *, steps=...)`, but
their guide is the image: RGB in [0, 255] at the resolution of the probabilities. One file each.
"""

from dilaff_jax.baselines.dense_crf import dense_crf
from dilaff_jax.baselines.pamr import PAMR_DILATIONS, pamr

__all__ = ["PAMR_DILATIONS", "dense_crf", "pamr"]
