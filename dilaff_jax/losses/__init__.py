"""Masked losses, each a `LossSum`: a sum and a count, so that devices add them before dividing.

`finish(psum(sums))` then divides by the *global* number of valid pixels or edges; the mean of
per-device means is another number wherever ignore masks are uneven. Mining (OHEM, loss
max-pooling) selects within each image, so that its sums add too and do not depend on how a batch
is laid over devices. All arithmetic is float32, whatever the dtype of the logits.

Bad values are refused with a UserError where they can be seen. Under `jit` they cannot: there a
label that is neither a class nor the ignore label turns the loss *and its gradient* into NaN,
rather than being left out in silence.
"""

from dilaff_jax.losses.adaptive_affinity_fields import adaptive_affinity_fields
from dilaff_jax.losses.edges import (
    affinity_balanced,
    affinity_bce,
    affinity_focal,
    affinity_max_pooling,
    affinity_ohem,
)
from dilaff_jax.losses.loss_sum import LossSum, finish
from dilaff_jax.losses.region_mutual_information import region_mutual_information
from dilaff_jax.losses.regions import boundary, dice, lovasz_softmax, tversky
from dilaff_jax.losses.segmentation import (
    cross_entropy,
    focal,
    loss_max_pooling,
    ohem,
    upsampled_loss,
)
from dilaff_jax.losses.semantic_boundaries import boundary_targets, semantic_boundaries

__all__ = [
    "LossSum",
    "adaptive_affinity_fields",
    "affinity_balanced",
    "affinity_bce",
    "affinity_focal",
    "affinity_max_pooling",
    "affinity_ohem",
    "boundary",
    "boundary_targets",
    "cross_entropy",
    "dice",
    "finish",
    "focal",
    "loss_max_pooling",
    "lovasz_softmax",
    "ohem",
    "region_mutual_information",
    "semantic_boundaries",
    "tversky",
    "upsampled_loss",
]
