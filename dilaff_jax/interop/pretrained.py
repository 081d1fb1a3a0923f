"""Weight files into models, in one call: an ImageNet backbone, or a whole segmentation network."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from dilaff_jax.interop import bn_folded, files, torch_layout
from dilaff_jax.models import classifier

# A classifier's layers, which a Segmenter has no place for.
_HEAD = ("head/conv", "head/norm", "fc")


def load_backbone(
    model: nn.Module,
    variables: Mapping[str, Any],
    path: str | pathlib.Path,
    *,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    entry: str | None = None,
    folded: bool = False,
    calibration_images: jax.Array | None = None,
) -> dict[str, Any]:
    """Returns `variables` with the encoder's from an ImageNet classification file.

    The file has the names of torchvision's (for EfficientNet-Lite: of the package
    `efficientnet_lite_pytorch`) classification model. Its classification head is not read; all
    else must fit the encoder exactly.

    Args:
        model: a Segmenter.
        variables: of `model.init`.
        path: `.pth`, `.safetensors` or `.npz`, see `files.read`.
        drop: patterns of further keys of the file that are not used.
        keep: patterns of names (as in the file) that stay as initialised.
        entry: see `files.read`.
        folded: the file's BatchNorm is folded into its convolutions, see `bn_folded`.
        calibration_images: for a folded file, `[N, H, W, 3]`, to calibrate BatchNorm on; needed
            where training will use batch statistics.

    Raises:
        KeyMismatchError: the keys do not fit; the message lists them.
        UserError: as `files.read`.
    """
    state = files.read(path, entry)
    head = [torch_layout.key(classifier.Classifier(model.encoder), p) + ".*" for p in _HEAD]
    drop = [*drop, *(p for p in head if any(k.startswith(p[:-1]) for k in state))]
    alone = classifier.Classifier(model.encoder)
    part = {c: {"encoder": tree["encoder"]} for c, tree in variables.items() if "encoder" in tree}
    if folded:
        state = bn_folded.unfold(alone, part, state)
    part = torch_layout.from_torch(alone, part, state, drop=drop, keep=keep)
    merged = {c: {**tree, **part.get(c, {})} for c, tree in variables.items()}
    if calibration_images is not None:
        merged = bn_folded.calibrate(model, merged, calibration_images, part="encoder")
    return merged


def load_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    path: str | pathlib.Path,
    *,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    entry: str | None = None,
) -> dict[str, Any]:
    """Returns `variables` with all values from a file of the whole model, names as torchvision's.

    For another number of classes say so: `drop=keep=("classifier.4.*", "aux_classifier.4.*")`.

    Raises:
        KeyMismatchError: the keys do not fit; the message lists them.
        UserError: as `files.read`.
    """
    return torch_layout.from_torch(model, variables, files.read(path, entry), drop=drop, keep=keep)


def save_model(model: nn.Module, variables: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Writes all variables in torch's layout; the suffix says how, see `files.read`."""
    files.write(path, torch_layout.to_torch(model, variables))
