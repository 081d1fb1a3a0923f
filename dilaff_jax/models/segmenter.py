"""The whole network, composed from a config: encoder, decoder, auxiliary and affinity head.

To add an encoder, put one file into `models/encoders/` (a decoder: `models/decoders/`) with

    VARIANTS = {"name": make}

where `make(**options)` returns a Flax module, and write that name into the config. There is no
list to enter it in: `build` reads the VARIANTS of every file in the folder. What lies outside this
package is named "module:attribute". The options of a variant are the module's own fields.

- An encoder has the fields `style`, `output_stride`, `mean` and `std` (of RGB in [0, 255], or of
  as many bands as images have); called
  with normalised images and `train` it returns features of nominal stride 2, 4, 8, 16, 32. One
  whose features are of other strides has an attribute `strides`, the nominal stride of each.
- A decoder has the fields `num_classes` and `style`; called with these features and `train` it
  returns (scores, the features they were made from), both at the stride it likes; a third may be
  a tuple of scores of coarser steps, which `loss.deep` trains. num_classes is 0
  in an affinity network by itself: `layers.classifier` then scores nothing.
- Either has `ndims`, the spatial dimensions that it is made for, where they are not 2 alone.
- Both have a property `torch_keys`, see `interop.torch_layout`; () if there is no counterpart.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import references, resize, schema
from dilaff_jax.errors import UserError
from dilaff_jax.models import (
    affinity_head,
    boundary_head,
    decoders,
    encoders,
    layers,
    module_options,
)
from dilaff_jax.models.decoders import fcn
from dilaff_jax.schema import Key, Rule

DTYPES = ("float32", "bfloat16")
OUTPUT_STRIDES = (8, 16, 32)

_FACTORS = Rule(
    "positive integers",
    lambda v: schema.is_sequence(v) and all(schema.is_whole(x, 1) for x in v),
)
# Of an encoder's features, where the encoder does not say.
_STRIDES = (2, 4, 8, 16, 32)
# At which scores come whose corners were aligned.
_ALIGNED_STRIDE = 4
# Pixels a side with which a model is traced where nobody says.
_TRACED = 64
# Of `config.model.segmentation`, where it is not None.
SEGMENTATION_KEYS: schema.Section = {
    "align_corners": Key(
        False,
        schema.SWITCH,
        "Bring the scores to stride 4 within the network, corners on corners, as networks expect "
        "that were trained so: TensorFlow's DeepLab.",
    ),
}
# The defaults are DeepLabv3 on ResNet-50, without affinity.
KEYS: schema.Section = {
    "encoder": Key(
        "resnet50",
        schema.NAME,
        "`resnet18`, `34`, `50`, `101`, `mobilenet_v2`, `efficientnet_lite0`, `1`, `2`, `unet`, "
        "`mit_b0` to `5`, `convnext_tiny`, `small`, `base`, `large`, `dinov2_vits14`, `b`, `l`, "
        "`g` (and `_reg`), `dinov3_vits16`, `b`, `l` (and `vits16plus`, `vith16plus`), or "
        "`module:name`, see [your own](extend.md).",
    ),
    "encoder_options": Key({}, schema.OPTIONS, "Fields of the encoder."),
    "output_stride": Key(
        8,
        schema.choice(*OUTPUT_STRIDES),
        "8, 16 or 32; beyond it the encoder dilates. `mit` and `convnext` have 32 only, `vit` 16.",
    ),
    "multi_grid": Key(
        None,
        schema.or_none(_FACTORS),
        "Factors on the dilations of ResNet's last stage, such as `(1, 2, 4)`.",
    ),
    "norm": Key(
        "batch",
        schema.choice("batch", "group", "instance"),
        "`batch` (statistics over all devices), `group`, or `instance` (a channel of an image).",
    ),
    "frozen_norm": Key(False, schema.SWITCH, "BatchNorm keeps its running statistics in training."),
    "dtype": Key(
        "float32",
        schema.choice(*DTYPES),
        "Of the computation: `float32` or `bfloat16`. Parameters, losses, statistics and "
        "propagation are float32.",
    ),
    "remat": Key(
        False,
        schema.SWITCH,
        "Compute the encoder's blocks again in the backward pass instead of keeping them.",
    ),
    "convolution": Key(
        "auto",
        schema.choice("auto", "xla"),
        "`auto`, in the form that the platform is fast at; or `xla`, XLA's own.",
    ),
    "ndim": Key(
        2,
        schema.choice(2, 3),
        "Spatial dimensions: 2 of images, 3 of volumes. Data sets of volumes fill it in; `unet` "
        "(encoder and decoder) and `fcn` are made for both.",
    ),
    "decoder": Key(
        "deeplabv3",
        schema.NAME,
        "`deeplabv3`, `deeplabv3plus`, `fcn`, `pspnet`, `unet`, `segformer`, `upernet`, `linear`, "
        "or `module:name`.",
    ),
    "decoder_options": Key({}, schema.OPTIONS, "Fields of the decoder, such as `width`."),
    "segmentation": Key(
        {},
        schema.or_none(schema.OPTIONS),
        "Options of the segmentation, see below; None for none: an affinity network by itself, "
        "which refines what other networks give.",
    ),
    "aux": Key(False, schema.SWITCH, "Have an auxiliary FCN head on the features before the last."),
    "aux_options": Key({}, schema.OPTIONS, "Fields of the auxiliary head, such as `width`."),
    "affinity": Key(
        None,
        schema.or_none(schema.OPTIONS),
        "None for no affinity head; else its options, see below.",
    ),
    "boundaries": Key(
        None,
        schema.or_none(schema.OPTIONS),
        "None; or options of a head of semantic boundaries on the encoder, an auxiliary task to "
        "compare with (SBCB): `stride`, `sides`, `last`.",
    ),
}


def config_of_run(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.model` of a whole config, without the heads that no loss would train."""
    model = ml_collections.ConfigDict(config.model)
    if not config.loss.affinity and not config.loss.refined:
        model.affinity = None
    if model.get("boundaries") is not None and not config.loss.boundaries:
        model.boundaries = None
    return model


class Segmenter(nn.Module):
    """Encoder, decoder, and, where there is one, the auxiliary and the affinity head."""

    encoder: nn.Module
    decoder: nn.Module
    aux_head: nn.Module | None = None
    affinity_head: nn.Module | None = None
    boundary_head: nn.Module | None = None
    segmentation: bool = True
    align_corners: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, Any]:
        """Images to scores.

        Args:
            images: RGB in [0, 255], `[B, H, W, 3]`, or of the encoder's bands, `[B, H, W, C]`, in
                their units; any numbers, normalised here.
            train: dropout is on and BatchNorm uses the batch.

        Returns:
            float32 arrays or None, each at the stride at which it was made (with `align_corners`:
            at stride 4): `logits` `[B, h, w, C]`, `affinity_logits` `[B, h', w', K]`, `aux_logits`
            `[B, h", w", C]`; and where there is what makes them `boundary_logits`, two of
            `[B, h, w, C]`, and `deep_logits`, some of them, the finest first.

        Raises:
            UserError: `images` have another shape.
        """
        x = normalise(images, self.encoder)
        features = self.encoder(x, train)
        scores, decoded, *coarser = self.decoder(features, train)
        logits = scores.astype(jnp.float32) if self.segmentation else None
        if self.align_corners and logits is not None:
            size = images.shape[1:-1]
            grid = [-(-n // _ALIGNED_STRIDE) for n in size]
            logits = resize.from_aligned_corners(logits, size, grid)
        aux = affinities = boundaries = None
        if self.aux_head is not None:
            aux = self.aux_head(features[:-1], train)[0].astype(jnp.float32)
        # Of several of one stride the last counts.
        strides = getattr(self.encoder, "strides", _STRIDES)
        maps = {f"stride{s}": y for s, y in zip(strides, features, strict=False)}
        if self.boundary_head is not None:
            boundaries = self.boundary_head(x, maps, train)
        if self.affinity_head is not None:
            affinities = self.affinity_head(x, maps | {"decoder": decoded}, logits, train)
            affinities = affinities.astype(jnp.float32)
        outputs: dict[str, Any] = {
            "logits": logits,
            "affinity_logits": affinities,
            "aux_logits": aux,
        }
        if boundaries is not None:
            outputs["boundary_logits"] = boundaries
        if coarser:
            outputs["deep_logits"] = tuple(x.astype(jnp.float32) for x in coarser[0])
        return outputs

    @property
    def channels(self) -> int:
        """Of images: 3, or a number of bands."""
        return len(self.encoder.mean)

    @property
    def offsets(self) -> np.ndarray | None:
        """The offsets of the affinity channels, `[K, 2]`; None without the head."""
        return None if self.affinity_head is None else self.affinity_head.offsets


def build(
    config: Mapping[str, Any], num_classes: int, *, axis_name: str | None = None
) -> Segmenter:
    """Composes a Segmenter from `config.model`; keys not given are at their default.

    Args:
        config: see `KEYS`.
        num_classes: C.
        axis_name: the mapped axis over which BatchNorm is synchronised, None for no such axis.

    Raises:
        UserError: a key, name or option that is not allowed, or two that contradict each other.
    """
    config = _complete(config)
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}; expected a positive integer")
    style = _style(config, axis_name)
    segmentation = config["segmentation"]
    if segmentation is None and (config["affinity"] is None or config["aux"]):
        raise UserError(
            "model.segmentation is None: then model.affinity must have a head, {} for its "
            "defaults, and model.aux, which scores classes, must be False"
        )
    encoder = build_encoder(
        config["encoder"],
        style,
        output_stride=config["output_stride"],
        multi_grid=config["multi_grid"],
        **config["encoder_options"],
    )
    make = lookup(decoders, config["decoder"], "decoder")
    # Without classes a decoder ends with its features.
    scored = 0 if segmentation is None else num_classes
    given = {"num_classes": scored, "style": style, "output_stride": config["output_stride"]}
    decoder = module_options.make_module(make, given, config["decoder_options"], "decoder_options")
    aux = None
    if config["aux"]:
        of_aux = {"num_classes": num_classes, "style": style}
        aux = module_options.make_module(fcn.FCN, of_aux, config["aux_options"], "aux_options")
    elif config["aux_options"]:
        raise UserError("model.aux_options are given and model.aux is False; set model.aux=True")
    head = None
    if config["affinity"] is not None:
        head = module_options.make_module(
            affinity_head.AffinityHead, {"style": style}, config["affinity"], "affinity"
        )
    _check_ndim(config, {"encoder": encoder, "decoder": decoder})
    boundaries = None
    if config["boundaries"] is not None:
        of_boundaries = {"num_classes": num_classes, "style": style}
        boundaries = module_options.make_module(
            boundary_head.BoundaryHead, of_boundaries, config["boundaries"], "boundaries"
        )
    options = schema.defaults(SEGMENTATION_KEYS).to_dict() | dict(segmentation or {})
    schema.check(options, SEGMENTATION_KEYS, "config.model.segmentation")
    if options["align_corners"] and style.ndim != 2:
        raise UserError("model.segmentation.align_corners is of images, and model.ndim is 3")
    return Segmenter(encoder, decoder, aux, head, boundaries, segmentation is not None, **options)


def build_encoder(
    name: str,
    style: layers.Style = layers.Style(),  # noqa: B008 - frozen
    *,
    output_stride: int = 32,
    multi_grid: tuple[int, ...] | None = None,
    **encoder_options: Any,
) -> nn.Module:
    """Returns the encoder of this name. Raises UserError as `build`."""
    layers.check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    make = lookup(encoders, name, "encoder")
    given: dict[str, Any] = {"style": style, "output_stride": output_stride}
    if multi_grid is not None:
        if "multi_grid" not in module_options.fields(make):
            raise UserError(f"multi_grid is {multi_grid}, but encoder {name!r} has no such option")
        encoder_options = encoder_options | {"multi_grid": multi_grid}
    encoder: Any = module_options.make_module(make, given, encoder_options, "encoder_options")
    if len(encoder.mean) != len(encoder.std):
        raise UserError(
            f"encoder_options: mean has {len(encoder.mean)} numbers and std {len(encoder.std)}; "
            "give one each for every channel of the images"
        )
    return encoder


def abstract_variables(model: nn.Module, size: Sequence[int] = ()) -> Any:
    """Shapes and dtypes of the variables; `size` is that of the images it is traced with."""
    encoder: Any = model.encoder
    size = size or (_TRACED,) * encoder.style.ndim
    images = jax.ShapeDtypeStruct((1, *size, len(encoder.mean)), jnp.uint8)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def normalise(images: jax.Array, encoder: nn.Module) -> jax.Array:
    """(images - mean) / std in float32, then the dtype of the computation.

    Raises:
        UserError: `images` are not `[B, H, W, C]` of as many channels as the encoder has means.
    """
    channels, ndim = len(encoder.mean), encoder.style.ndim
    if images.ndim != ndim + 2 or images.shape[-1] != channels:
        expected = f"[B, {'H, W' if ndim == 2 else 'D, H, W'}, {channels}]"
        expected = f"RGB {expected}" if (ndim, channels) == (2, 3) else expected
        raise UserError(f"images have shape {images.shape}; expected {expected}")
    mean, std = (jnp.array(v, jnp.float32) for v in (encoder.mean, encoder.std))
    return ((images.astype(jnp.float32) - mean) / std).astype(encoder.style.dtype)


def lookup(package: Any, name: str, kind: str) -> Callable[..., nn.Module]:
    """Finds a variant by name in the files of `package`, or by "module:attribute" anywhere.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    if ":" in name:
        return references.resolve(name, f"config.model.{kind}")
    variants: dict[str, Callable[..., nn.Module]] = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        variants |= importlib.import_module(info.name).VARIANTS
    if name not in variants:
        raise UserError(
            f"{kind} is {name!r}; allowed: {', '.join(sorted(variants))}, or 'module:attribute'"
        )
    return variants[name]


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults, as plain dicts."""
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    full = schema.defaults(KEYS).to_dict() | given
    schema.check(full, KEYS, "config.model")
    return full


def _style(config: Mapping[str, Any], axis_name: str | None) -> layers.Style:
    if config["frozen_norm"] and config["norm"] != "batch":
        raise UserError(
            f"frozen_norm is set and norm is {config['norm']!r}; only norm='batch' has statistics "
            "to freeze"
        )
    return layers.Style(
        config["norm"],
        config["frozen_norm"],
        getattr(jnp, config["dtype"]),
        axis_name,
        config["remat"],
        config["convolution"],
        config["ndim"],
    )


def _check_ndim(config: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    """Raises UserError for a part that is not made for so many dimensions."""
    for part, module in modules.items():
        if config["ndim"] not in getattr(module, "ndims", (2,)):
            raise UserError(
                f"model.ndim is {config['ndim']} and model.{part} {config[part]!r} is made for "
                "images; for volumes there are encoder 'unet', decoder 'unet' and 'fcn', or a "
                "module of your own that has 3 in its `ndims`"
            )
