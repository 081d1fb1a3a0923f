"""ResNet v1.5 (stride on the 3×3 convolution), dilated as torchvision dilates it.

He et al. 2015 (https://arxiv.org/abs/1512.03385); multi-grid after DeepLabv3
(https://arxiv.org/abs/1706.05587). Equal to torchvision's, see `interop.parity`.
"""

import functools

import flax.linen as nn
import jax

from dilaff_jax.errors import UserError
from dilaff_jax.models import dispatch, layers


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut; `rates` are their dilations."""

    width: int
    stride: int
    rates: tuple[int, int]
    style: layers.Style
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to `[B, H/stride, W/stride, expansion·width]`."""
        conv = functools.partial(layers.ConvNorm, self.width, 3, style=self.style)
        y = conv(stride=self.stride, dilation=self.rates[0], name="conv1")(x, train)
        y = conv(dilation=self.rates[1], activation=None, name="conv2")(y, train)
        return nn.relu(y + _shortcut(x, y, self.stride, self.style, train))


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride and dilation `rates[0]`, 1×1 to four times the width; a shortcut."""

    width: int
    stride: int
    rates: tuple[int, int]
    style: layers.Style
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to `[B, H/stride, W/stride, expansion·width]`."""
        conv = functools.partial(layers.ConvNorm, style=self.style)
        y = conv(self.width, name="conv1")(x, train)
        y = conv(self.width, 3, self.stride, self.rates[0], name="conv2")(y, train)
        y = conv(self.expansion * self.width, activation=None, name="conv3")(y, train)
        return nn.relu(y + _shortcut(x, y, self.stride, self.style, train))


def _shortcut(
    x: jax.Array, y: jax.Array, stride: int, style: layers.Style, train: bool
) -> jax.Array:
    if stride == 1 and x.shape[-1] == y.shape[-1]:
        return x
    downsample = layers.ConvNorm(
        y.shape[-1], stride=stride, activation=None, style=style, name="downsample"
    )
    return downsample(x, train)


class ResNet(nn.Module):
    """Normalised images `[B, H, W, 3]` to features of nominal stride 2, 4, 8, 16, 32.

    Beyond `output_stride` a stage dilates instead of striding: its first 3×3 convolution keeps the
    dilation so far, all later ones double it, so that every filter reads what it would read in the
    strided network (torchvision's `replace_stride_with_dilation`, carried to both convolutions of
    a BasicBlock).

    Attributes:
        block: BasicBlock or Bottleneck.
        depths: blocks in each of the four stages.
        style: see `layers.Style`.
        output_stride: 8, 16 or 32.
        multi_grid: for each block of the last stage a factor on that stage's dilation.
        stages: how many of the four stages to build; 3 gives a smaller encoder of stride 16.
        mean: subtracted from RGB in [0, 255].
        std: what it is then divided by.
    """

    block: type[nn.Module]
    depths: tuple[int, ...]
    style: layers.Style = layers.Style()
    output_stride: int = 32
    multi_grid: tuple[int, ...] | None = None
    stages: int = 4
    mean: tuple[float, ...] = layers.IMAGENET_MEAN
    std: tuple[float, ...] = layers.IMAGENET_STD
    epsilon = layers.EPSILON
    head_width = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the features, finest first."""
        x = layers.ConvNorm(64, 7, 2, style=self.style, name="conv1")(x, train)
        features = [x]
        x = layers.max_pool(x)
        block = nn.remat(self.block, static_argnums=(2,)) if self.style.remat else self.block
        for stage, (stride, rates) in enumerate(self._plan()):
            for i, pair in enumerate(rates):
                name = f"layer{stage + 1}_{i}"
                x = block(64 * 2**stage, stride if i == 0 else 1, pair, self.style, name=name)(
                    x, train
                )
                if train:  # or every block of a stage would compute all before it again
                    x = dispatch.materialize(x)
            features.append(x)
        return tuple(features)

    def _plan(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """For each stage its stride and, for each block, the dilations of its convolutions."""
        layers.check_choice("output_stride", self.output_stride, (8, 16, 32))
        layers.check_choice("stages", self.stages, (1, 2, 3, 4))
        plan, reached, dilation = [], 4, 1
        for stage, depth in enumerate(self.depths[: self.stages]):
            stride, before = (1 if stage == 0 else 2), dilation
            if reached * stride > self.output_stride:
                stride, dilation = 1, dilation * stride
            reached *= stride
            plan.append((stride, [(before, dilation)] + [(dilation, dilation)] * (depth - 1)))
        if self.multi_grid is not None:
            plan[-1] = (plan[-1][0], self._multi_grid_rates(dilation, len(plan[-1][1])))
        return plan

    def _multi_grid_rates(self, dilation: int, depth: int) -> list[tuple[int, int]]:
        grid = tuple(self.multi_grid or ())
        if len(grid) != depth:
            raise UserError(
                f"multi_grid is {grid}; expected {depth} factors, one for each block of the last "
                "stage"
            )
        return [(dilation * g, dilation * g) for g in grid]

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to torchvision's names."""
        return (
            (r"layer(\d)_(\d+)", r"layer\1.\2"),
            (r"downsample/conv\b", "downsample.0"),
            (r"downsample/norm\b", "downsample.1"),
            (r"conv(\d)/conv\b", r"conv\1"),
            (r"conv(\d)/norm\b", r"bn\1"),
        )


VARIANTS = {
    "resnet18": functools.partial(ResNet, block=BasicBlock, depths=(2, 2, 2, 2)),
    "resnet34": functools.partial(ResNet, block=BasicBlock, depths=(3, 4, 6, 3)),
    "resnet50": functools.partial(ResNet, block=Bottleneck, depths=(3, 4, 6, 3)),
    "resnet101": functools.partial(ResNet, block=Bottleneck, depths=(3, 4, 23, 3)),
}
