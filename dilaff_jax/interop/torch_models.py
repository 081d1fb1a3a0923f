"""Pairs of networks, one of ours and one of torch's, for `interop.parity`.

torch's weights and BatchNorm statistics are random, but such that activations keep their scale
through the depth, or relative bounds would mean nothing. Needs the extra `torch`, and for
EfficientNet-Lite the extra `pretrained`.
"""

import re
from typing import Any

import torch

from dilaff_jax.errors import MissingPackageError
from dilaff_jax.interop import torchvision_import, transformers_models
from dilaff_jax.models import classifier, segmenter

SEGMENTERS = ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50", "fcn_resnet101")
ENCODERS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "mobilenet_v2",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
)
# Of torchvision's models with 21 classes and the auxiliary head.
PARAMETERS = {
    "deeplabv3_resnet50": 42_004_074,
    "deeplabv3_resnet101": 60_996_202,
    "fcn_resnet50": 35_322_218,
    "fcn_resnet101": 54_314_346,
}
NUM_CLASSES = 21


def pair(name: str, seed: int) -> tuple[Any, torch.nn.Module]:
    """Returns the Flax module and the torch module, without dropout in either."""
    torch.manual_seed(seed)
    if name in transformers_models.MODELS:
        return transformers_models.pair(name)
    if name in SEGMENTERS:
        decoder, _, encoder = name.partition("_")
        config = {"encoder": encoder, "decoder": decoder, "aux": True}
        ours: Any = segmenter.build(config | {"decoder_options": {"dropout": 0.0}}, NUM_CLASSES)
        ours = ours.clone(aux_head=ours.aux_head.clone(dropout=0.0))
        make = getattr(torchvision_import.torchvision().models.segmentation, name)
        theirs = make(weights=None, weights_backbone=None, aux_loss=True)
    else:
        ours = classifier.Classifier(segmenter.build_encoder(name))
        theirs = _encoder(name)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return ours, theirs


def randomise(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Random scales, biases and running statistics, such that float32 can be compared in float32.

    Hardly a unit may sit on a kink of ReLU or ReLU6: there the derivative jumps, and two programs
    that differ in the last bit of one unit differ by per cents in the gradients below it. So biases
    are about 3 (a tenth of the channels -3, off) for scales below 1; the ends of residual branches
    add a little to what is on. Filters have mean 0, so that these biases do not
    add up to means that drown the variance. Running statistics are those of `images`, disturbed.
    """
    if isinstance(model, transformers_models.Segmentation | transformers_models.LinearOnTokens):
        transformers_models.randomise(model)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    ends = _branch_ends(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.groups == 1 < module.in_channels // 3:
                module.weight.sub_(module.weight.mean(dim=(1, 2, 3), keepdim=True))
        for name, norm in norms.items():
            size = norm.bias.shape
            norm.weight.uniform_(*((0.2, 0.4) if name in ends else (0.4, 0.8)))
            off = torch.rand(size) < (0 if "downsample" in name else 0.1)
            bias = torch.where(off, -3.0, 3.0)
            norm.bias.copy_((1.0 if name in ends else bias) + 0.1 * torch.randn(size))
            norm.momentum = 1.0  # the statistics of these images, whatever they were before
        model.train()
        model(images)
        for norm in norms.values():
            _disturb(norm)
            norm.momentum = 0.1
    model.eval()


def _disturb(norm: torch.nn.BatchNorm2d) -> None:
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    # The pooled branch of an ASPP sees almost no variance; the floor keeps it in scale.
    var.clamp_(min=1e-3)
    mean.add_(0.1 * var.sqrt() * torch.randn_like(mean))
    var.mul_(torch.empty_like(var).uniform_(0.8, 1.25))
    norm.get_buffer("num_batches_tracked").zero_()


def _branch_ends(model: torch.nn.Module) -> set[str]:
    """Names of the norms that end a residual branch just before its ReLU (ResNet)."""
    blocks = [n for n, m in model.named_modules() if hasattr(m, "downsample")]
    names = {n for n, _ in model.named_modules()}
    return {f"{n}.bn3" if f"{n}.bn3" in names else f"{n}.bn2" for n in blocks}


def _encoder(name: str) -> torch.nn.Module:
    if not name.startswith("efficientnet_lite"):
        return getattr(torchvision_import.torchvision().models, name)(weights=None)
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingPackageError(
            "this needs the extra: pip install 'dilaff-jax[pretrained]'"
        ) from error
    # Without an image size it pads as TensorFlow does at any size; drop_connect_rate is
    # stochastic depth, which we leave out.
    options: dict[str, Any] = {"image_size": None, "drop_connect_rate": 0.0}
    return EfficientNet.from_name(re.sub("_lite", "-lite", name), **options)
