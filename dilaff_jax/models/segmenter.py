"""The whole network, composed from a config: encoder, decoder, auxiliary and affinity head.

To add an encoder, put one file into `models/encoders/` (a decoder: `models/decoders/`) with

    VARIANTS = {"name": make}

where `make(**options)` returns a Flax module, and write that name into the config. There is no
list to enter it in: `build` reads the VARIANTS of every file in the folder. What lies outside this
package is named "module:attribute". The options of a variant are the module's own fields.

- An encoder has the fields `style`, `output_stride`, `mean` and `std` (RGB in [0, 255]); called
  with normalised images and `train` it returns features of nominal stride 2, 4, 8, 16, 32.
- A decoder has the fields `num_classes` and `style`; called with these features and `train` it
  returns (scores, the features they were made from), both at the stride it likes.
- Both have a property `torch_keys`, see `interop.torch_layout`; () if there is no counterpart.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax.models import affinity_head, decoders, encoders, layers, options
from dilaff_jax.models.decoders import fcn

DTYPES = ("float32", "bfloat16")
OUTPUT_STRIDES = (8, 16, 32)


def default_config() -> ml_collections.ConfigDict:
    """Every key of `config.model`: DeepLabv3 on ResNet-50, without affinity.

    encoder, decoder: names, see above. encoder_options, decoder_options: fields of theirs.
    output_stride: 8, 16 or 32. multi_grid: factors on the last stage's dilations (ResNet) or None.
    norm: "batch" or "group". frozen_norm, remat: see `layers.Style`. dtype: of the computation,
    "float32" or "bfloat16". aux: have an auxiliary FCN head on the features before the last.
    affinity: None, or the options of `affinity_head.AffinityHead`; {} for its defaults.
    """
    return ml_collections.ConfigDict(
        {
            "encoder": "resnet50",
            "encoder_options": {},
            "output_stride": 8,
            "multi_grid": None,
            "norm": "batch",
            "frozen_norm": False,
            "dtype": "float32",
            "remat": False,
            "decoder": "deeplabv3",
            "decoder_options": {},
            "aux": False,
            "affinity": None,
        }
    )


class Segmenter(nn.Module):
    """Encoder, decoder, and, where there is one, the auxiliary and the affinity head."""

    encoder: nn.Module
    decoder: nn.Module
    aux_head: nn.Module | None = None
    affinity_head: nn.Module | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array | None]:
        """Images to scores.

        Args:
            images: RGB in [0, 255], `[B, H, W, 3]`, uint8 or float; normalised here.
            train: dropout is on and BatchNorm uses the batch.

        Returns:
            float32 arrays, each at the stride at which it was made: `logits` `[B, h, w, C]`,
            `affinity_logits` `[B, h', w', K]` or None, `aux_logits` `[B, h", w", C]` or None.

        Raises:
            ValueError: `images` have another shape.
        """
        x = normalise(images, self.encoder)
        features = self.encoder(x, train)
        logits, decoded = self.decoder(features, train)
        aux = affinities = None
        if self.aux_head is not None:
            aux = self.aux_head(features[:-1], train)[0].astype(jnp.float32)
        if self.affinity_head is not None:
            affinities = self.affinity_head(x, features, decoded, train).astype(jnp.float32)
        return {
            "logits": logits.astype(jnp.float32),
            "affinity_logits": affinities,
            "aux_logits": aux,
        }

    @property
    def offsets(self) -> np.ndarray | None:
        """The offsets of the affinity channels, `[K, 2]`; None without the head."""
        return None if self.affinity_head is None else self.affinity_head.offsets


def build(
    config: Mapping[str, Any], num_classes: int, *, axis_name: str | None = None
) -> Segmenter:
    """Composes a Segmenter from `config.model`; keys not given take `default_config`'s values.

    Args:
        config: see `default_config`.
        num_classes: C.
        axis_name: the mapped axis over which BatchNorm is synchronised, None for no such axis.

    Raises:
        ValueError: a key, name or option that is not allowed, or two that contradict each other.
    """
    config = _complete(config)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected a positive integer")
    style = _style(config, axis_name)
    encoder = build_encoder(
        config["encoder"],
        style,
        output_stride=config["output_stride"],
        multi_grid=config["multi_grid"],
        **config["encoder_options"],
    )
    make = lookup(decoders, config["decoder"], "decoder")
    given = {"num_classes": num_classes, "style": style, "output_stride": config["output_stride"]}
    decoder = options.make_module(make, given, config["decoder_options"], "decoder_options")
    aux = fcn.FCN(num_classes, style) if config["aux"] else None
    head = None
    if config["affinity"] is not None:
        head = options.make_module(
            affinity_head.AffinityHead, {"style": style}, config["affinity"], "affinity"
        )
    return Segmenter(encoder, decoder, aux, head)


def build_encoder(
    name: str,
    style: layers.Style = layers.Style(),  # noqa: B008 - frozen
    *,
    output_stride: int = 32,
    multi_grid: tuple[int, ...] | None = None,
    **encoder_options: Any,
) -> nn.Module:
    """Returns the encoder of this name. Raises ValueError as `build`."""
    layers.check_choice("output_stride", output_stride, OUTPUT_STRIDES)
    make = lookup(encoders, name, "encoder")
    given: dict[str, Any] = {"style": style, "output_stride": output_stride}
    if multi_grid is not None:
        if "multi_grid" not in options.fields(make):
            raise ValueError(f"multi_grid is {multi_grid}, but encoder {name!r} has no such option")
        encoder_options = encoder_options | {"multi_grid": multi_grid}
    return options.make_module(make, given, encoder_options, "encoder_options")


def normalise(images: jax.Array, encoder: nn.Module) -> jax.Array:
    """(images - mean) / std in float32, then the dtype of the computation.

    Raises:
        ValueError: `images` are not `[B, H, W, 3]`.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}; expected RGB [B, H, W, 3]")
    mean, std = (jnp.array(v, jnp.float32) for v in (encoder.mean, encoder.std))
    return ((images.astype(jnp.float32) - mean) / std).astype(encoder.style.dtype)


def lookup(package: Any, name: str, kind: str) -> Callable[..., nn.Module]:
    """Finds a variant by name in the files of `package`, or by "module:attribute" anywhere.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        return getattr(importlib.import_module(module), attribute)
    found: dict[str, Callable[..., nn.Module]] = {}
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        found |= importlib.import_module(info.name).VARIANTS
    if name not in found:
        raise ValueError(
            f"{kind} is {name!r}; allowed: {', '.join(sorted(found))}, or 'module:attribute'"
        )
    return found[name]


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults, as plain dicts."""
    defaults = default_config().to_dict()
    given = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    options.check_keys(given, list(defaults), "config.model")
    full = defaults | given
    for key in ("encoder", "decoder"):
        if not isinstance(full[key], str):
            raise ValueError(f"{key} is {full[key]!r}; expected a name")
    for key in ("aux", "frozen_norm", "remat"):
        if not isinstance(full[key], bool):
            raise ValueError(f"{key} is {full[key]!r}; expected True or False")
    for key in ("encoder_options", "decoder_options", "affinity"):
        if not (isinstance(full[key], Mapping) or (key == "affinity" and full[key] is None)):
            also = " or None" if key == "affinity" else ""
            raise ValueError(f"{key} is {full[key]!r}; expected a dict of options{also}")
    return full


def _style(config: Mapping[str, Any], axis_name: str | None) -> layers.Style:
    layers.check_choice("norm", config["norm"], ("batch", "group"))
    layers.check_choice("dtype", config["dtype"], DTYPES)
    if config["frozen_norm"] and config["norm"] != "batch":
        raise ValueError(
            f"frozen_norm is set and norm is {config['norm']!r}; only norm='batch' has statistics "
            "to freeze"
        )
    return layers.Style(
        config["norm"],
        config["frozen_norm"],
        getattr(jnp, config["dtype"]),
        axis_name,
        config["remat"],
    )
