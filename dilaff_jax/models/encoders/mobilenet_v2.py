"""MobileNetV2: inverted residual blocks with linear bottlenecks.

Sandler et al. 2018 (https://arxiv.org/abs/1801.04381). `mobilenet_v2` is torchvision's;
`mobilenet_v2_tf` takes TensorFlow's weights: its padding, its epsilon, pixels in [-1, 1]. (The
wrong padding costs such weights nine points of top-1 accuracy, without any error.)
"""

import functools

import flax.linen as nn
import jax

from dilaff_jax.models import layers

# Of each stage: expansion, channels, blocks, stride of the first block, kernel.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, linear 1×1 projection; a shortcut if asked."""

    features: int
    expansion: int
    kernel: int
    stride: int
    dilation: int
    shortcut: bool
    padding: layers.Padding
    epsilon: float
    style: layers.Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, H, W, C]` to `[B, H/stride, W/stride, features]`."""
        conv = functools.partial(
            layers.ConvNorm,
            padding=self.padding,
            activation=nn.relu6,
            epsilon=self.epsilon,
            style=self.style,
        )
        hidden = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = conv(hidden, name="expand")(y, train)
        y = conv(hidden, self.kernel, self.stride, self.dilation, depthwise=True, name="depthwise")(
            y, train
        )
        y = conv(self.features, activation=None, name="project")(y, train)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Normalised images `[B, H, W, 3]` to features of nominal stride 2, 4, 8, 16, 32.

    Beyond `output_stride` a stage dilates instead of striding, as in `resnet.ResNet`.

    Attributes:
        table: the stages, see `STAGES`.
        style: see `layers.Style`.
        output_stride: 8, 16 or 32.
        padding: "symmetric" (torchvision) or "same" (TensorFlow).
        epsilon: of the normalisation.
        mean: subtracted from RGB in [0, 255].
        std: what it is then divided by.
    """

    table: tuple[tuple[int, int, int, int, int], ...] = STAGES
    style: layers.Style = layers.Style()
    output_stride: int = 32
    padding: layers.Padding = "symmetric"
    epsilon: float = layers.EPSILON
    mean: tuple[float, ...] = layers.IMAGENET_MEAN
    std: tuple[float, ...] = layers.IMAGENET_STD
    head_width = 1280

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Returns the features, finest first."""
        layers.check_choice("output_stride", self.output_stride, (8, 16, 32))
        layers.check_choice("padding", self.padding, ("symmetric", "same"))
        x = self._stem(x, train)
        block = InvertedResidual
        if self.style.remat:
            block = nn.remat(InvertedResidual, static_argnums=(2,))
        features, index, reached, dilation = [], 0, 2, 1
        for expansion, width, depth, stride, kernel in self.table:
            before = dilation
            if stride > 1:
                features.append(x)
                if reached * stride > self.output_stride:
                    stride, dilation = 1, dilation * stride
                reached *= stride
            for i in range(depth):
                x = block(
                    width,
                    expansion,
                    kernel,
                    stride if i == 0 else 1,
                    before if i == 0 else dilation,
                    # A block that would have strided has no shortcut when it dilates either.
                    i > 0,
                    self.padding,
                    self.epsilon,
                    self.style,
                    name=f"block_{index}",
                )(x, train)
                index += 1
        return (*features, x)

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        return layers.ConvNorm(
            32,
            3,
            2,
            padding=self.padding,
            activation=nn.relu6,
            epsilon=self.epsilon,
            style=self.style,
            name="stem",
        )(x, train)

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to torchvision's names; its first block has no expansion."""
        return (
            (r"stem/conv\b", "features.0.0"),
            (r"stem/norm\b", "features.0.1"),
            (r"block_0/depthwise/conv\b", "features.1.conv.0.0"),
            (r"block_0/depthwise/norm\b", "features.1.conv.0.1"),
            (r"block_0/project/conv\b", "features.1.conv.1"),
            (r"block_0/project/norm\b", "features.1.conv.2"),
            *((rf"block_{i}\b", f"features.{i + 1}.conv") for i in range(17)),
            (r"expand/conv\b", "0.0"),
            (r"expand/norm\b", "0.1"),
            (r"depthwise/conv\b", "1.0"),
            (r"depthwise/norm\b", "1.1"),
            (r"project/conv\b", "2"),
            (r"project/norm\b", "3"),
            (r"head/conv\b", "features.18.0"),
            (r"head/norm\b", "features.18.1"),
            (r"fc\b", "classifier.1"),
        )


VARIANTS = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_tf": functools.partial(
        MobileNetV2, padding="same", epsilon=1e-3, mean=(127.5,) * 3, std=(127.5,) * 3
    ),
}
