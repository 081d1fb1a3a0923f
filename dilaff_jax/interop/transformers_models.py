"""Pairs of networks, one of ours and one of Hugging Face's, for `interop.parity`.

Needs the extras `torch` and `huggingface`. The networks are built from their configurations with
random weights; nothing is fetched. What Hugging Face has no network for, a linear head on maps of
DINOv2, is written out here.
"""

import functools
import re
from typing import Any

import torch
from torch.nn import functional

from dilaff_jax.errors import MissingPackageError
from dilaff_jax.interop import torchvision_import
from dilaff_jax.models import segmenter

NUM_CLASSES = 21
# Of each family our decoder.
_DECODERS = {
    "segformer": "segformer",
    "convnext": "upernet",
    "dinov2": "linear",
    "dinov3": "linear",
}
MODELS = (
    *(f"segformer_b{i}" for i in range(6)),
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
    *(f"dinov2_vit{size}14{registers}" for registers in ("", "_reg") for size in "sbl"),
    *(f"dinov3_vit{size}" for size in ("s16", "s16plus", "b16", "l16")),
)
# From the names of modules in transformers 5 to those in its files, and in transformers 4.
_RENAMED = (
    (r"\bsegformer\.stages\.(\d)\.patch_embeddings\b", r"segformer.encoder.patch_embeddings.\1"),
    (r"\bsegformer\.stages\.(\d)\.layer_norm\b", r"segformer.encoder.layer_norm.\1"),
    (r"\bsegformer\.stages\.(\d)\.blocks\.(\d+)", r"segformer.encoder.block.\1.\2"),
    (r"\blayernorm_before\b", "layer_norm_1"),
    (r"\blayernorm_after\b", "layer_norm_2"),
    (r"\bsequence_reduction\.sequence_reduction\b", "self.sr"),
    (r"\bsequence_reduction\.layer_norm\b", "self.layer_norm"),
    (r"(block\.\d\.\d+\.mlp)\.fc(\d)\b", r"\1.dense\2"),
    (r"\blinear_projections\b", "linear_c"),
    *(
        (rf"({block}\.attention)\.{short}_proj\b", rf"\1.{attention}.{long}")
        for block, attention in ((r"block\.\d\.\d+", "self"), (r"encoder\.layer\.\d+", "attention"))
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    (r"((?:block\.\d|encoder\.layer)\.\d+\.attention)\.o_proj\b", r"\1.output.dense"),
    (r"\bmodel\.layer\.(\d+)", r"layer.\1"),
)


def file_name(name: str) -> str:
    """The name in Hugging Face's files of a module or parameter of a network in memory."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def pair(name: str) -> tuple[Any, torch.nn.Module]:
    """Returns the Flax module and the torch module, without dropout in either."""
    family = name.split("_")[0]
    config: dict[str, Any] = {
        "encoder": name.replace("segformer", "mit"),
        "output_stride": 16 if family.startswith("dino") else 32,
        "decoder": _DECODERS[family],
    }
    options: dict[str, Any] = {"levels": 4}
    if family == "segformer":
        options = {"width": 256 if name[-1] in "01" else 768, "dropout": 0.0}
        config["encoder_options"] = {"epsilon": 1e-5}  # Hugging Face's, see `MiT`
    elif family == "convnext":
        options = {"width": 64, "dropout": 0.0}
        config |= {"aux": True, "aux_options": {"dropout": 0.0}}
    ours: Any = segmenter.build(config | {"decoder_options": options}, NUM_CLASSES)
    make = {"segformer": _segformer, "convnext": _upernet, "dinov2": _dinov2, "dinov3": _dinov3}
    theirs = make[family](ours, options)
    theirs.train(False)
    return ours, theirs


@functools.cache
def library() -> Any:
    """The package transformers.

    Raises:
        ImportError: it is not installed.
    """
    torchvision_import.torchvision()
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "this needs the extra: pip install 'dilaff-jax[torch,huggingface]'"
        ) from error
    return transformers


class Segmentation(torch.nn.Module):
    """A network of the package's, which returns scores at the size of the image."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():  # so that names have no prefix
            self.add_module(name, child)
        self._network = [network]  # hidden from torch: its children are registered above

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels `[B, 3, H, W]` to {"out"} and, where there is one, {"aux"}, `[B, C, H, W]`."""
        network = self._network[0]
        if hasattr(network, "auxiliary_head"):  # whose scores the network does not return
            maps = network.get_submodule("backbone")(pixels).feature_maps
            heads = {"out": "decode_head", "aux": "auxiliary_head"}
            scores = {k: network.get_submodule(head)(maps) for k, head in heads.items()}
        else:
            scores = {"out": network(pixels).logits}
        return {k: _enlarged(v, pixels) for k, v in scores.items()}


class _BNHead(torch.nn.Module):
    """DINOv2's head: all maps at the first's size, BatchNorm, a 1×1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(channels)
        self.conv_seg = torch.nn.Conv2d(channels, NUM_CLASSES, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.conv_seg(self.bn(torch.cat(list(maps), dim=1)))


class LinearOnTokens(torch.nn.Module):
    """A backbone of the package's and DINOv2's head, with zeros around the image as they do it."""

    def __init__(self, backbone: torch.nn.Module, channels: int, patch: int) -> None:
        super().__init__()
        self.backbone, self.decode_head, self._patch = backbone, _BNHead(channels), patch

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels `[B, 3, H, W]` to {"out"} `[B, C, H, W]`."""
        missing = [-n % self._patch for n in reversed(pixels.shape[2:])]
        sides = [m for n in missing for m in (n // 2, n - n // 2)]
        maps = self.backbone(functional.pad(pixels, sides)).feature_maps
        return {"out": _enlarged(self.decode_head(maps), pixels)}


def _enlarged(scores: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(scores, size=pixels.shape[2:], mode="bilinear")


def randomise(model: torch.nn.Module) -> None:
    """Weights that keep the scale of activations, and no parameter at 0 or 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias",)):
                parameter.normal_(0, 0.1)
            elif "lambda1" in name or "layer_scale" in name:
                parameter.uniform_(0.2, 0.5)
            elif "token" in name or "position" in name:
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)


def _segformer(ours: Any, options: dict[str, Any]) -> torch.nn.Module:
    encoder, package = ours.encoder, library()
    config = package.SegformerConfig(
        depths=list(encoder.depths),
        hidden_sizes=list(encoder.widths),
        decoder_hidden_size=options["width"],
        num_labels=NUM_CLASSES,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    return Segmentation(package.SegformerForSemanticSegmentation(config))


def _upernet(ours: Any, options: dict[str, Any]) -> torch.nn.Module:
    encoder, package = ours.encoder, library()
    backbone = package.ConvNextConfig(
        depths=list(encoder.depths),
        hidden_sizes=list(encoder.widths),
        out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
    )
    config = package.UperNetConfig(
        backbone_config=backbone,
        hidden_size=options["width"],
        auxiliary_channels=encoder.widths[2] // 4,
        num_labels=NUM_CLASSES,
    )
    return Segmentation(package.UperNetForSemanticSegmentation(config))


def _dinov2(ours: Any, options: dict[str, Any]) -> torch.nn.Module:
    encoder, package = ours.encoder, library()
    common: dict[str, Any] = {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "patch_size": encoder.patch,
        "image_size": encoder.patch * encoder.grid,
        "use_swiglu_ffn": encoder.gated,
        "use_mask_token": False,
        "out_features": [f"stage{i + 1}" for i in range(encoder.depth - 4, encoder.depth)],
    }
    if encoder.registers:
        del common["use_mask_token"]
        config = package.Dinov2WithRegistersConfig(**common, num_register_tokens=encoder.registers)
        backbone = package.Dinov2WithRegistersBackbone(config)
    else:
        backbone = package.Dinov2Backbone(package.Dinov2Config(**common))
    return _linear(encoder, backbone, options)


def _dinov3(ours: Any, options: dict[str, Any]) -> torch.nn.Module:
    encoder, package = ours.encoder, library()
    config = package.DINOv3ViTConfig(
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.heads,
        intermediate_size=encoder.hidden,
        use_gated_mlp=encoder.gated,
        hidden_act="silu" if encoder.gated else "gelu",
        num_register_tokens=encoder.registers,
        pos_embed_rescale=None,
        out_features=[f"stage{i + 1}" for i in range(encoder.depth - 4, encoder.depth)],
    )
    return _linear(encoder, package.DINOv3ViTBackbone(config), options)


def _linear(encoder: Any, backbone: torch.nn.Module, options: dict[str, Any]) -> torch.nn.Module:
    # It stands for patches that are hidden in pretraining, and has no gradient here.
    embeddings: Any = backbone.get_submodule("embeddings")
    embeddings.mask_token = None
    return LinearOnTokens(backbone, options["levels"] * encoder.width, encoder.patch)
