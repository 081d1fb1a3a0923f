"""EfficientNet-Lite0 with the light DeepLabv3+ decoder in torch, as torch users would write it.

The network of configs/camvid_deeplabv3plus_lite0.py without affinity head, layer for layer, with
the encoder of the package efficientnet_lite_pytorch at output stride 16. Needs the extras `torch`
and `pretrained`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dilaff_jax.configs import camvid_deeplabv3plus_lite0
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD

WIDTH, LOW_LEVEL, RATES, DROPOUT = 96, 32, (6, 12, 18), 0.1
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CLASSES = len(camvid_deeplabv3plus_lite0.CLASS_WEIGHTS)


def unit(channels: int, features: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> Any:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(
        channels,
        features,
        kernel,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(conv, nn.BatchNorm2d(features), nn.ReLU(inplace=True))


def separable(channels: int, features: int, dilation: int = 1) -> nn.Sequential:
    """A depthwise and a 1×1 unit."""
    spread = unit(channels, channels, 3, dilation, groups=channels)
    return nn.Sequential(spread, unit(channels, features))


class Light(nn.Module):
    """Images `[B, 3, H, W]`, normalised, to scores at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        whole = EfficientNet.from_name("efficientnet-lite0", image_size=None, drop_connect_rate=0.0)
        self.stem = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6(inplace=True))
        self.blocks = whole._blocks
        self._dilate()
        deep, shallow = self.blocks[-1]._bn2.num_features, self.blocks[2]._bn2.num_features
        self.branches = nn.ModuleList(
            [unit(deep, WIDTH), *(separable(deep, WIDTH, rate) for rate in RATES)]
        )
        self.pool = unit(deep, WIDTH)
        self.project = unit(5 * WIDTH, WIDTH)
        self.low_level = unit(shallow, LOW_LEVEL)
        self.mix = nn.Sequential(separable(WIDTH + LOW_LEVEL, WIDTH), separable(WIDTH, WIDTH))
        self.classify = nn.Conv2d(WIDTH, CLASSES, 1)

    def _dilate(self) -> None:
        """From where the stride would be 32, dilation 2; plain padding where it is symmetric."""
        strides, dilated = 2, False
        for block in self.blocks:
            conv = block._depthwise_conv
            stride = conv.stride[0]
            if stride == 2 and strides == 16:
                stride, dilated = 1, True
                conv.stride = (1, 1)
            elif dilated:
                conv.dilation = (2, 2)
            strides *= stride
            # torch's own layer, since this one asks for the size of the image every time.
            if stride == 1:
                padding = conv.dilation[0] * (conv.kernel_size[0] // 2)
                plain = nn.Conv2d(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,
                    padding=padding,
                    dilation=conv.dilation,
                    groups=conv.groups,
                    bias=False,
                )
                block._depthwise_conv = plain

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores `[B, C, H/4, W/4]`."""
        x = self.stem(images)
        low = None
        for i, block in enumerate(self.blocks):
            x = block(x)
            low = x if i == 2 else low
        assert low is not None
        pooled = self.pool(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))
        x = functional.dropout(x, DROPOUT, self.training)
        x = functional.interpolate(x, low.shape[2:], mode="bilinear")
        return self.classify(self.mix(torch.cat([x, self.low_level(low)], dim=1)))


def step(
    batch: dict[str, np.ndarray], layout: torch.memory_format
) -> tuple[Callable[[], Any], int]:
    """Forward, weighted cross-entropy, backward, clipping, AdamW; and the number of parameters."""
    model: Any = Light().train()
    model = model.to(memory_format=layout)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    labels = torch.from_numpy(batch["label"]).long()
    weights = torch.tensor(camvid_deeplabv3plus_lite0.CLASS_WEIGHTS)
    criterion = nn.CrossEntropyLoss(weight=weights, ignore_index=IGNORE_LABEL)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)

    def run() -> float:
        optimiser.zero_grad(set_to_none=True)
        scores = model((images.float() - mean) / std)
        loss = criterion(functional.interpolate(scores, labels.shape[1:], mode="bilinear"), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return loss.item()

    return run, sum(p.numel() for p in model.parameters())


def serve(pipe: Any, batch: dict[str, np.ndarray]) -> None:
    """Sends the number of parameters, then makes a step in the layout that is asked for."""
    steps = {name: step(batch, layout) for name, layout in LAYOUTS.items()}
    pipe.send(steps["contiguous"][1])
    while True:
        pipe.send(steps[pipe.recv()][0]())
