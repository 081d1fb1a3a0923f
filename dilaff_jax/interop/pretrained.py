"""Weight files into models, in one call: an ImageNet backbone, or a whole segmentation network."""

import collections
import fnmatch
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from absl import logging

from dilaff_jax.interop import bn_folded, files, input_bands, layouts, torch_layout
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

    The file has the names of torchvision's classification model (for EfficientNet-Lite: of the
    package `efficientnet_lite_pytorch`; for MiT, ConvNeXt and ViT: Hugging Face's or their
    authors', see `layouts`). Its classification head is not read, nor what an encoder says that it
    has no use for (`unused`); what such a file has not (`fresh`) stays as initialised. All else
    must fit the encoder exactly, but for a first convolution for other bands than red, green and
    blue, see `input_bands`.

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
    state = layouts.hugging_face(files.read(path, entry))
    head = [torch_layout.key(classifier.Classifier(model.encoder), p) + ".*" for p in _HEAD]
    alone = classifier.Classifier(model.encoder)
    part = {c: {"encoder": tree["encoder"]} for c, tree in variables.items() if "encoder" in tree}
    state, drop = _without_prefix(state, drop, torch_layout.keys(alone, part).values())
    of_no_use = [*head, *getattr(model.encoder, "unused", ())]
    drop = [*drop, *(p for p in of_no_use if fnmatch.filter(state, p))]
    fresh = getattr(model.encoder, "fresh", ())
    keep = [*keep, *(p for p in fresh if not fnmatch.filter(state, p))]
    if folded:
        state = bn_folded.unfold(alone, part, state)
    state = input_bands.adapted(alone, part, state)
    part = torch_layout.from_torch(alone, part, state, drop=drop, keep=keep)
    merged = {c: {**tree, **part.get(c, {})} for c, tree in variables.items()}
    if calibration_images is not None:
        merged = bn_folded.calibrate(model, merged, calibration_images, ("encoder",))
    return merged


def load_model(
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
    """Returns `variables` with all values from a file of the whole model.

    The names are torchvision's; of SegFormer and UPerNet Hugging Face's, or their authors' and
    mmsegmentation's (see `layouts`). For another number of classes say so:
    `drop=keep=("classifier.4.*", "aux_classifier.4.*")`; for a head that the file knows nothing of:
    `keep=("affinity_head.*",)`. The names of TensorFlow's mobile DeepLab are known, too.

    Args:
        model: a Segmenter.
        variables: of `model.init`.
        path: as for `load_backbone`, and so are all that follow.
        drop: patterns of keys of the file that are not used.
        keep: patterns of names (as in the file) that stay as initialised.
        entry: see `files.read`.
        folded: the file's BatchNorm is folded into its convolutions, see `bn_folded`.
        calibration_images: as for `load_backbone`.

    Raises:
        KeyMismatchError: the keys do not fit; the message lists them.
        UserError: as `files.read`.
    """
    state = layouts.hugging_face(files.read(path, entry))
    if "concat_projection.weight" in state:
        state = bn_folded.mobile_deeplab_keys(state)
    names = torch_layout.keys(model, variables).values()
    state, drop = _without_prefix(state, drop, names)
    if folded:
        state = bn_folded.unfold(model, variables, state)
    state = input_bands.adapted(model, variables, state)
    loaded = torch_layout.from_torch(model, variables, state, drop=drop, keep=keep)
    if calibration_images is None:
        return loaded
    return bn_folded.calibrate(model, loaded, calibration_images, ("encoder", "decoder"))


def _without_prefix(
    state: files.State, drop: Sequence[str], expected: Iterable[str]
) -> tuple[files.State, Sequence[str]]:
    """The weights by the names that are expected, where all of them stand below one prefix.

    Such as `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.`, `encoder.`: it is
    found, said, and taken away, and what stands elsewhere is left out. Also returns the patterns of
    `drop` that are still to be used: those of whole names are used first.

    Raises:
        KeyMismatchError: the weights stand below several prefixes.
    """
    wanted = set(expected)
    if wanted & state.keys():
        return state, drop
    used = [p for p in drop if fnmatch.filter(state, p)]
    left = {k: v for k, v in state.items() if not any(fnmatch.fnmatchcase(k, p) for p in used)}
    prefixes: collections.Counter[str] = collections.Counter()
    for name in left:
        parts = name.split(".")
        rests = ((".".join(parts[:i]), ".".join(parts[i:])) for i in range(1, len(parts)))
        prefixes.update(prefix for prefix, rest in rests if rest in wanted)
    if not prefixes:
        return state, drop
    (prefix, count), *others = prefixes.most_common()
    if others and others[0][1] == count:
        named = ", ".join(f"{p}." for p, n in prefixes.items() if n == count)
        raise torch_layout.KeyMismatchError(
            f"the weights stand in the file {len([n for n in prefixes.values() if n == count])} "
            f"times, below {named}; name those not to use by `drop`, such as {others[0][0]}.*"
        )
    below = f"{prefix}."
    inside = {k.removeprefix(below): v for k, v in left.items() if k.startswith(below)}
    elsewhere = [k for k in left if not k.startswith(below)]
    logging.warning(
        "the weights stand below %r in the file; %d keys elsewhere are not used%s",
        below,
        len(elsewhere),
        f" ({', '.join(elsewhere[:3])}{', ...' if len(elsewhere) > 3 else ''})" * bool(elsewhere),
    )
    return inside, [p for p in drop if p not in used]


def save_model(model: nn.Module, variables: Mapping[str, Any], path: str | pathlib.Path) -> None:
    """Writes all variables in torch's layout; the suffix says how, see `files.read`."""
    files.write(path, torch_layout.to_torch(model, variables))
