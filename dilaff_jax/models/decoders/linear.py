"""Normalisation and a linear classifier on the last maps: DINOv2's protocol for frozen features.

Oquab et al. 2023 (https://arxiv.org/abs/2304.07193), in the form of their code (`BNHead`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax.errors import UserError
from dilaff_jax.models import layers


class Linear(nn.Module):
    """Scores at the stride of the first map that is read.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        levels: how many of the last maps are joined: 1, or 4 ("+ms" in the paper).
    """

    num_classes: int
    style: layers.Style = layers.Style()
    levels: int = 1

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns scores `[B, h, w, C]` and the features `[B, h, w, F]` they were made from."""
        if self.levels > len(features):
            raise UserError(
                f"decoder_options.levels is {self.levels}; the encoder has {len(features)} maps"
            )
        maps = features[len(features) - self.levels :]
        size = maps[0].shape[1:3]
        x = jnp.concatenate([layers.resize_to(y, size) for y in maps], axis=-1)
        x = layers.norm(x.shape[-1], self.style, train)(x)
        return layers.classifier(self.num_classes, self.style)(x), x

    torch_parts = (("decoder", "decode_head."),)

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names in DINOv2's files of heads."""
        return ((r"^norm\b", "bn"), (r"^logits\b", "conv_seg"))


VARIANTS = {"linear": Linear}
