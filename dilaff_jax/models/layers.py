"""What every network here is made of: convolution, normalisation, activation, and pooling."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import resize
from dilaff_jax.errors import UserError
from dilaff_jax.models import dispatch, geometry
from dilaff_jax.models import max_pool as by_slices
from dilaff_jax.models.cpu import batch_norm, depthwise_conv, volume_conv
from dilaff_jax.models.cpu import conv as conv_on_cpu
from dilaff_jax.models.gpu import conv as conv_on_gpu

Padding: TypeAlias = Literal["symmetric", "same"]
TorchKeys: TypeAlias = tuple[tuple[str, str], ...]

# torch's BatchNorm: epsilon 1e-5, and its momentum 0.1 is 0.9 in Flax.
EPSILON = 1e-5
MOMENTUM = 0.9

# The classes of batch normalisation that a network may hold.
BATCH_NORMS = (nn.BatchNorm, batch_norm.BatchNorm)

# The statistics of ImageNet that torchvision's weights expect, for RGB in [0, 255].
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Style:
    """What all layers of one network share.

    Attributes:
        norm: "batch", "group" (32 groups, or the most below that divide the channels), or
            "instance", each channel of each image by itself.
        frozen_norm: BatchNorm uses its running statistics in training too and leaves them as they
            are; its scale and bias still learn.
        dtype: of the computation. Parameters and statistics are float32.
        axis_name: the mapped axis over which BatchNorm averages its statistics.
        remat: compute the encoder's blocks again in the backward pass instead of keeping them.
        convolution: "auto", in the form that the platform is fast at; or "xla", XLA's own.
        ndim: spatial dimensions, 2 of images, 3 of volumes.
    """

    norm: Literal["batch", "group", "instance"] = "batch"
    frozen_norm: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    convolution: Literal["auto", "xla"] = "auto"
    ndim: int = 2


class ConvNorm(nn.Module):
    """Convolution without bias, normalisation, activation.

    Attributes:
        features: F; for a depthwise convolution it must be C.
        kernel: size of the window, along all axes.
        stride: of the convolution.
        dilation: of the convolution.
        depthwise: one filter a channel.
        padding: "symmetric", d·(k-1)/2 on every side as in torch; "same", as TensorFlow pads: the
            output has ceil(n/stride) pixels, and where the padding is odd the end gets more.
        activation: applied last; None for none.
        epsilon: added to the variance.
        two_pass: BatchNorm's variance as E[(x - E x)²] instead of E[x²] - (E x)². For maps of few
            pixels, where a difference of large numbers would leave nothing but rounding.
        style: see `Style`.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    padding: Padding = "symmetric"
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    epsilon: float = EPSILON
    two_pass: bool = False
    style: Style = Style()

    @nn.compact
    def __call__(
        self,
        x: jax.Array | Sequence[jax.Array],
        train: bool,
        size: Sequence[int] | None = None,
    ) -> jax.Array:
        """`[B, *spatial, C]` to `[B, *spatial', F]`; several maps are joined as by `JoinedConv`."""
        reach, ndim = self.dilation * (self.kernel - 1) // 2, self.style.ndim
        padding = "SAME" if self.padding == "same" else ((reach, reach),) * ndim
        if isinstance(x, Sequence):
            assert not self.depthwise
            y = JoinedConv(
                self.features,
                self.kernel,
                self.stride,
                padding,
                self.dilation,
                self.style,
                name="conv",
            )(x, size)
        else:
            assert size is None
            y = nn.Conv(
                self.features,
                (self.kernel,) * ndim,
                strides=self.stride,
                padding=padding,
                kernel_dilation=self.dilation,
                feature_group_count=x.shape[-1] if self.depthwise else 1,
                use_bias=False,
                dtype=self.style.dtype,
                kernel_init=_he_normal(self.depthwise),
                conv_general_dilated=own_conv(self.depthwise, self.style),
                name="conv",
            )(x)
        if train:
            self._check_batch(y)
        y = norm(self.features, self.style, train, self.epsilon, self.two_pass)(y)
        return y if self.activation is None else self.activation(y)

    def _check_batch(self, x: jax.Array) -> None:
        """Raises UserError where batch statistics would be of a single value a channel."""
        if self.style.norm != "batch" or self.style.frozen_norm or self.is_initializing():
            return
        values = math.prod(x.shape[:-1])
        if values == 1 and self.style.axis_name is not None:
            values = jax.lax.axis_size(self.style.axis_name)
        if values == 1:
            raise UserError(
                f"BatchNorm of {'/'.join(self.path)} sees one pixel of one image in a step: its "
                "variance is 0, and evaluation would go wrong. Give all devices together 2 images "
                "or more in each microbatch (batch_size, optim.accumulate), or set "
                "model.norm='group', or model.frozen_norm=True with pretrained weights"
            )


class JoinedConv(nn.Module):
    """The convolution without bias of maps joined along their channels, as a sum over the maps.

    The parameter is that of `nn.Conv` on the joined maps, which are never written down: on a TPU,
    maps of 64 channels are joined by moving half-empty lanes, forward and backward.

    Attributes:
        features: F.
        kernel: size of the window, along all axes.
        stride: of the convolution.
        padding: as `lax` takes it.
        dilation: of the convolution.
        style: see `Style`.
    """

    features: int
    kernel: int
    stride: int
    padding: Any
    dilation: int
    style: Style

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], size: Sequence[int] | None = None) -> jax.Array:
        """`[B, *spatial, C_i]` each to `[B, *spatial', F]`; a 1×1 window takes maps of one pixel.

        With `size`, `spatial'`, a 1×1 window takes maps of any sizes, enlarged after they have been
        convolved: the same as before, since both are linear in different axes, for fewer FLOPs.
        """
        assert size is None or self.kernel == 1
        channels = sum(x.shape[-1] for x in maps)
        ndim = self.style.ndim
        shape = (*(self.kernel,) * ndim, channels, self.features)
        dtype, convolve = self.style.dtype, own_conv(False, self.style) or _library_conv
        filters = self.param("kernel", _he_normal(False), shape, jnp.float32).astype(dtype)
        total, start = jnp.zeros((), dtype), 0
        for x in maps:
            y = convolve(
                x.astype(dtype),
                filters[..., start : start + x.shape[-1], :],
                (self.stride,) * ndim,
                self.padding,
                rhs_dilation=(self.dilation,) * ndim,
            )
            total += y if size is None else resize_to(y, size)
            start += x.shape[-1]
        return total


class SeparableConvNorm(nn.Module):
    """A depthwise and a 1×1 `ConvNorm`, as in DeepLabv3+ (https://arxiv.org/abs/1802.02611)."""

    features: int
    kernel: int = 3
    dilation: int = 1
    style: Style = Style()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to `[B, H, W, features]`."""
        spread = functools.partial(ConvNorm, kernel=self.kernel, dilation=self.dilation)
        x = spread(x.shape[-1], depthwise=True, style=self.style, name="depthwise")(x, train)
        return ConvNorm(self.features, style=self.style, name="pointwise")(x, train)


class Dropout(nn.Module):
    """Dropout whose mask is drawn for each image by its place in the global batch.

    So the numbers do not depend on over how many devices the batch is spread, which one mask a
    device would not give. Needs the "dropout" random stream in training.
    """

    rate: float
    style: Style = Style()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Drops values of `[B, H, W, C]` in training, scaling the rest up."""
        if not train or self.rate == 0:
            return x
        return drop(x, self.make_rng("dropout"), self.rate, x.shape[1:], self.style)


def drop(
    x: jax.Array, key: jax.Array, rate: float, shape: Sequence[int], style: Style
) -> jax.Array:
    """`x` `[B, ...]` with values set to 0 by a mask of `shape` for each image, the rest scaled up.

    An image's mask depends on the key and on its place in the global batch alone.
    """
    place = jnp.arange(x.shape[0])
    if style.axis_name is not None:
        place = place + jax.lax.axis_index(style.axis_name) * x.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(place)
    draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=tuple(shape))
    return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0).astype(x.dtype)


def classifier(
    features: int, style: Style, name: str = "logits"
) -> Callable[[jax.Array], jax.Array]:
    """A 1×1 convolution with bias to `features` scores; of 0 scores, nothing at all.

    Small weights: it starts undecided.
    """
    if not features:
        return lambda x: x[..., :0]
    init = nn.initializers.normal(0.01)
    return nn.Conv(
        features,
        (1,) * style.ndim,
        dtype=style.dtype,
        kernel_init=init,
        conv_general_dilated=own_conv(False, style),
        name=name,
    )


def norm(
    features: int, style: Style, train: bool, epsilon: float = EPSILON, two_pass: bool = False
) -> nn.Module:
    """The normalisation of the style, named "norm"; `two_pass` as in `ConvNorm`."""
    if style.norm != "batch":
        groups = next(g for g in range(32, 0, -1) if features % g == 0)
        return nn.GroupNorm(
            num_groups=groups if style.norm == "group" else features,
            epsilon=epsilon,
            dtype=style.dtype,
            name="norm",
        )
    common = {
        "use_running_average": not train or style.frozen_norm,
        "momentum": MOMENTUM,
        "epsilon": epsilon,
        "dtype": style.dtype,
        "axis_name": style.axis_name,
        "name": "norm",
    }
    if dispatch.target() == "cpu":
        return batch_norm.BatchNorm(two_pass=two_pass, **common)
    return nn.BatchNorm(use_fast_variance=not two_pass, **common)


def resize_to(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """`resize.bilinear` that keeps the dtype, for features on their way through a network."""
    return resize.bilinear(x, size).astype(x.dtype)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages `[B, H, W, C]` over a grid of `size` x `size` cells that cover it.

    Cell i of n pixels reads floor(i·n/size) to ceil((i+1)·n/size) - 1, so neighbouring cells may
    share pixels; equal to `torch.nn.functional.adaptive_avg_pool2d`. Summed in float32.
    """
    rows, columns = (jnp.asarray(_cells(n, size)) for n in x.shape[1:3])
    pooled = jnp.einsum(
        "bhwc,ih,jw->bijc", x, rows, columns, precision="highest", preferred_element_type="float32"
    )
    return pooled.astype(x.dtype)


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of 3×3 pixels around every other one: `[B, H, W, C]` to `[B, ⌈H/2⌉, ⌈W/2⌉, C]`.

    Equal to `torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)`. The gradient goes to the
    first of the pixels that are equal.
    """

    def library(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    # Of images of any size, only the library's is known to fit.
    of_any_size = not all(isinstance(n, int) for n in x.shape[1:3])
    match "tpu" if of_any_size else dispatch.target():
        case "cpu" | "gpu":
            return by_slices.max_pool(x)
        case "any":
            return jax.lax.platform_dependent(x, cpu=by_slices.max_pool, default=library)
        case _:
            return library(x)


def check_choice(option: str, given: object, allowed: Sequence[object]) -> None:
    """Raises UserError naming the option, the value found and the values allowed."""
    if given not in allowed:
        raise UserError(f"{option} is {given!r}; allowed: {', '.join(map(repr, allowed))}")


def _cells(n: int, size: int) -> np.ndarray:
    """The averaging matrix `[size, n]`, rows summing to one."""
    cells = np.zeros((size, n), np.float32)
    for i in range(size):
        start, stop = i * n // size, math.ceil((i + 1) * n / size)
        cells[i, start:stop] = 1 / (stop - start)
    return cells


def own_conv(depthwise: bool, style: Style) -> Callable[..., jax.Array] | None:
    """What Flax's layer is to call instead of XLA's convolution; None where that is best."""
    if style.convolution == "xla":
        return None
    if style.ndim == 3:
        return volume_conv.conv
    match dispatch.target():
        case "cpu" | "any":
            return depthwise_conv.conv if depthwise else conv_on_cpu.conv
        case "gpu" if not depthwise:
            return conv_on_gpu.conv
        case _:
            return None


_library_conv = geometry.called_by_flax(functools.partial(geometry.native, depthwise=False))


def _he_normal(depthwise: bool) -> nn.initializers.Initializer:
    # A depthwise filter feeds one channel; Flax's fan_out would count them all.
    return nn.initializers.variance_scaling(2.0, "fan_in" if depthwise else "fan_out", "normal")
