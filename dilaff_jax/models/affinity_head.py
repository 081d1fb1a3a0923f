"""The dilated-affinity head: for each pixel and each dilated neighbour, are they of one class?

The paper's head is not known to us; this one is our choice. It reads low-level features of its own,
because an affinity map no sharper than the segmentation cannot correct it, and keeps to a moderate
width at stride 4, because that decides whether it is cheap (benchmarks/model_cost.py).
"""

import functools
import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import affinity, resize
from dilaff_jax.errors import UserError
from dilaff_jax.models import layers

# "decoder", "stride16", "image", "probabilities": the encoder says which strides there are.
_SOURCE = re.compile(r"decoder|image|probabilities|stride[1-9]\d*")
STRIDES = (1, 2, 4, 8, 16)
# Logits of an embedding start as 8·(cos - ½): one class where vectors are alike. Our choice.
_SHARPNESS, _THRESHOLD = 8.0, 0.5


class AffinityHead(nn.Module):
    """Affinity logits `[B, ceil(H/stride), ceil(W/stride), K]` from features of several strides.

    Of volumes the same in three dimensions.

    Each source is brought to `width` channels and to the head's grid: coarser ones by a 1×1
    convolution and bilinear enlargement, finer ones by strided 3×3 convolutions, so that no edge
    is averaged away before it is seen. Joined, 3×3 convolutions, then 1×1 to the offsets.

    With `rates=()` it is no more than that 1×1 convolution, of one source as it is: what it has to
    know the source must know, so that the loss shapes the features themselves. (Perhaps the
    paper's form.)

    Attributes:
        dilations: of the neighbourhood, see `affinity.offsets`; on the head's grid.
        symmetric: predict half of the offsets and mirror them, a[i,o] = a[i+o,-o].
        spacing: None; or the size of a voxel along each axis, where they differ, see
            `affinity.offsets`.
        stride: of the head's grid, 1, 2, 4, 8 or 16.
        sources: what it reads: "decoder" (features before the classifier), "stride16" to "stride2"
            (the encoder's; "stride1", "stride14" of one that has it), "image" (the normalised
            pixels, by a stem of its own), "probabilities" (the segmentation's, through which no
            gradient flows).
        width: channels.
        rates: dilations of the 3×3 convolutions, one for each; () for none and one source, not
            finer than the grid.
        embedding: None; or D, and the last convolution gives a pixel a vector of D numbers, whose
            cosines are the logits, ℓ[i,o] = s_d·(cos(e[i], e[i+o]) - b_d), s and b learned. Such
            logits are symmetric. (Embeddings of pixels, De Brabandere et al. 2017,
            https://arxiv.org/abs/1708.02551; s and b are our choice.)
        style: see `layers.Style`.
    """

    dilations: tuple[int, ...] = (1, 2, 4, 8)
    symmetric: bool = False
    spacing: tuple[int | float, ...] | None = None
    stride: int = 4
    sources: tuple[str, ...] = ("decoder", "stride4", "stride2")
    width: int = 64
    rates: tuple[int, ...] = (1, 2, 4)
    embedding: int | None = None
    style: layers.Style = layers.Style()

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        features: Mapping[str, jax.Array],
        logits: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        """Returns affinity logits.

        Args:
            image: normalised, `[B, H, W, 3]`.
            features: `[B, h, w, F]` by name of source: "decoder", the decoder's before its
                classifier, and "stride2" etc., the encoder's.
            logits: the segmentation's, `[B, h, w, C]`, if there is one.
            train: BatchNorm uses the batch.

        Raises:
            UserError: options that are not allowed, or that read what there is not.
        """
        self._check()
        size = tuple(-(-n // self.stride) for n in image.shape[1:-1])
        maps = {**features, "image": image}
        if logits is not None:
            probs = jax.nn.softmax(resize.bilinear(jax.lax.stop_gradient(logits), size))
            maps["probabilities"] = probs.astype(self.style.dtype)
        elif "probabilities" in self.sources:
            raise UserError(
                "affinity.sources have 'probabilities', and the model has no segmentation; leave "
                "them out"
            )
        if missing := [s for s in self.sources if s not in maps]:
            raise UserError(
                f"affinity.sources have {', '.join(map(repr, missing))}, which this encoder does "
                f"not give; it gives {', '.join(features)}"
            )
        x = self._features(maps, size, train) if self.rates else maps[self.sources[0]]
        if not self.rates and any(n > m for n, m in zip(x.shape[1:-1], size, strict=True)):
            raise UserError(
                f"affinity.rates are (), and the source {self.sources[0]!r} is finer than the grid "
                f"of affinity.stride {self.stride}; give a source of that stride or a larger one"
            )
        symmetric = self.symmetric or self.embedding is not None
        channels = len(self._offsets(symmetric))
        # A 1×1 convolution and bilinear enlargement commute, and the first makes fewer channels.
        x = layers.classifier(self.embedding or channels, self.style)(x)
        x = layers.resize_to(x, size)
        if self.embedding:
            x = self._cosines(x)
        return affinity.mirror(x, self.offsets) if symmetric else x

    @property
    def offsets(self) -> np.ndarray:
        """The K offsets of the channels, `[K, ndim]`."""
        return self._offsets(False)

    def _offsets(self, symmetric: bool) -> np.ndarray:
        return affinity.offsets(self.dilations, self.style.ndim, symmetric, self.spacing)

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """None: paths are joined by dots."""
        return ()

    def _features(
        self, maps: Mapping[str, jax.Array], size: tuple[int, ...], train: bool
    ) -> jax.Array:
        """The sources, joined and convolved, `[B, h, w, width]`."""
        brought = [self._bring(maps[s], s, size, train) for s in self.sources]
        conv = functools.partial(layers.ConvNorm, self.width, 3, style=self.style)
        x = conv(dilation=self.rates[0], name="conv_0")(brought, train)
        for i, rate in enumerate(self.rates[1:], start=1):
            x = conv(dilation=rate, name=f"conv_{i}")(x, train)
        return x

    def _cosines(self, x: jax.Array) -> jax.Array:
        """Logits of the forward offsets from embeddings, `[B, h, w, K/2]`, float32."""
        x = x.astype(jnp.float32)
        # The small number keeps the gradient finite where a vector is 0.
        e = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
        half = self._offsets(True)
        cosines = jnp.stack([jnp.sum(e * affinity.shift(e, o), axis=-1) for o in half], axis=-1)
        shape = (len(self.dilations),)
        sharpness = self.param("sharpness", nn.initializers.constant(_SHARPNESS), shape)
        threshold = self.param("threshold", nn.initializers.constant(_THRESHOLD), shape)
        per_dilation = len(half) // len(self.dilations)
        return jnp.repeat(sharpness, per_dilation) * (cosines - jnp.repeat(threshold, per_dilation))

    def _bring(self, x: jax.Array, source: str, size: tuple[int, ...], train: bool) -> jax.Array:
        conv = functools.partial(layers.ConvNorm, self.width, style=self.style)
        halvings = 0

        def is_finer() -> bool:
            if self.is_initializing():
                return any(n > m for n, m in zip(x.shape[1:-1], size, strict=True))
            # The layers that there are: an image of 1 x 1 pixel has no finer map.
            return self.has_variable("params", f"{source}_down{halvings}")

        if source == "image":
            x = conv(kernel=3, stride=min(2, self.stride), name="image")(x, train)
        elif not is_finer():
            x = conv(name=source)(x, train)
        while is_finer():
            x = conv(kernel=3, stride=2, name=f"{source}_down{halvings}")(x, train)
            halvings += 1
        return layers.resize_to(x, size)

    def _check(self) -> None:
        layers.check_choice("affinity.stride", self.stride, STRIDES)
        for source in self.sources:
            if not _SOURCE.fullmatch(source):
                raise UserError(
                    f"affinity.sources has {source!r}; allowed: 'decoder', 'image', "
                    "'probabilities', and 'stride4' or another of the encoder's strides"
                )
        if not self.rates and len(self.sources) > 1:
            raise UserError(
                f"affinity.rates are (), one convolution of one source, and affinity.sources are "
                f"{self.sources}; give one, such as ('decoder',), or rates, such as (1, 2, 4)"
            )
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise UserError(
                f"affinity.sources are {self.sources}; give one or more, such as 'decoder' and "
                "'stride4', each once"
            )
