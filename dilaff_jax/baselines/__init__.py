"""Refinement by others, to compare with. One file each.

By colour instead of learned affinity, PAMR and DenseCRF: called as the operators of `propagate`
are, `f(probs, guide, offsets, *, steps=...)`, but their guide is the image: RGB in [0, 255] at the
resolution of the probabilities. By weights that are learned through the propagation alone, CSPN: an
operator as those of `propagate`.
"""

from dilaff_jax.baselines.dense_crf import dense_crf
from dilaff_jax.baselines.pamr import PAMR_DILATIONS, pamr
from dilaff_jax.baselines.spatial_propagation import cspn

__all__ = ["PAMR_DILATIONS", "cspn", "dense_crf", "pamr"]
