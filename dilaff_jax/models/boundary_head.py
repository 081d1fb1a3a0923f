"""An auxiliary head of semantic boundaries: SBCB, a rival of the affinity as an auxiliary task."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilaff_jax.errors import UserError
from dilaff_jax.models import layers

STRIDES = (1, 2, 4)


class BoundaryHead(nn.Module):
    """Logits of "a boundary of class c is here" from the encoder's maps alone; trained, never used.

    One map of one channel from each side, C from the last map, each a 1×1 convolution with
    normalisation, brought to the grid; then for each class a weighted sum of its own map and all
    sides. So the sides need not know of classes: CASENet (Yu et al. 2017,
    https://arxiv.org/abs/1705.09759), as the head with which SBCB conditions a backbone (Ishikawa
    and Aoki, Sensors 2023, https://arxiv.org/abs/2304.09427). The grid of stride 2 is our choice;
    the authors enlarge to the whole image.

    Attributes:
        num_classes: C.
        style: see `layers.Style`.
        stride: of the grid, 1, 2 or 4.
        sides: the encoder's maps that are sides.
        last: the encoder's map that knows classes.
    """

    num_classes: int
    style: layers.Style = layers.Style()
    stride: int = 2
    sides: tuple[str, ...] = ("stride2", "stride4", "stride8")
    last: str = "stride32"

    @nn.compact
    def __call__(
        self, image: jax.Array, features: Mapping[str, jax.Array], train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Returns logits `[B, ceil(H/stride), ceil(W/stride), C]`, fused and of the last map alone.

        Args:
            image: `[B, H, W, 3]`, for its size.
            features: the encoder's maps, `[B, h, w, F]`, by stride.
            train: BatchNorm uses the batch.

        Raises:
            UserError: a stride that is not allowed, or a map that the encoder does not give.
        """
        layers.check_choice("boundaries.stride", self.stride, STRIDES)
        if missing := [s for s in (*self.sides, self.last) if s not in features]:
            raise UserError(
                f"boundaries.sides and boundaries.last name {', '.join(map(repr, missing))}, which "
                f"this encoder does not give; it gives {', '.join(features)}"
            )
        size = tuple(-(-n // self.stride) for n in image.shape[1:-1])

        def brought(source: str, channels: int) -> jax.Array:
            conv = layers.ConvNorm(channels, activation=None, style=self.style, name=source)
            return layers.resize_to(conv(features[source], train), size).astype(jnp.float32)

        sides = [brought(source, 1) for source in self.sides]
        last = brought(self.last, self.num_classes)
        even = nn.initializers.constant(1 / (1 + len(sides)))
        fuse = self.param("fuse", even, (1 + len(sides), self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        fused = fuse[0] * last + bias
        for weight, side in zip(fuse[1:], sides, strict=True):
            fused += weight * side
        return fused, last

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: paths are joined by dots."""
        return ()
