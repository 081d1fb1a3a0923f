"""Names and axes of torch's state dicts, and back: one explicit rule for every parameter.

A parameter at `encoder/layer1_0/conv2/norm/scale` stands in torch under
`backbone.layer1.0.bn2.weight`. The rules are regular expressions that stand with the layers they
name (`torch_keys` of each encoder and decoder); what no rule names keeps its path, joined by dots.
"""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import numpy as np

from dilaff_jax.errors import UserError
from dilaff_jax.interop.files import State

# Where the parts of a Segmenter stand in torchvision's segmentation models; a decoder whose files
# have other names says so (`torch_parts`).
PARTS = {
    "encoder": "backbone.",
    "decoder": "classifier.",
    "aux_head": "aux_classifier.",
    "affinity_head": "affinity_head.",
    "boundary_head": "boundary_head.",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"


class KeyMismatchError(UserError):
    """A weight file and a model that do not fit; the message lists every key that does not."""


def key(model: nn.Module, path: str) -> str:
    """The torch name of a module or parameter path of a Segmenter or Classifier.

    The path is joined by slashes: `encoder/conv1/conv` becomes `backbone.conv1`.
    """
    part, _, rest = path.partition("/")
    if hasattr(model, "decoder"):
        owner = getattr(model, part)
        prefix = (PARTS | dict(getattr(model.decoder, "torch_parts", ())))[part]
    else:  # a Classifier: torchvision's ImageNet models put no prefix before the encoder
        owner, prefix = model.encoder, ""
        rest = rest if part == "encoder" else path
    rules = owner.torch_keys
    if part == "aux_head":
        rules = getattr(model.decoder, "aux_torch_keys", rules)
    for pattern, replacement in rules:
        rest = re.sub(pattern, replacement, rest)
    *modules, leaf = rest.split("/")
    return prefix + ".".join([*modules, _LEAVES.get(leaf, leaf)])


def keys(model: nn.Module, variables: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """The torch name of every parameter and statistic: (collection, *path) → name."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    return {path: key(model, "/".join(path[1:])) for path in flat}


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> State:
    """Returns the variables as a torch state dict of NumPy arrays, bit for bit.

    torch's counters `num_batches_tracked` are written as 0: Flax keeps none, and torch reads them
    only where a BatchNorm has no momentum.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables))
    state: State = {}
    for path, name in keys(model, variables).items():
        state[name] = _axes_to_torch(path[-1], np.asarray(flat[path]))
        if path[-1] == "var":
            state[name.removesuffix("running_var") + _COUNTER] = np.array(0, np.int64)
    return state


def from_torch(
    model: nn.Module,
    variables: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    *,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns `variables` with the values of a torch state dict, as float32.

    Every key has to find its place and every place its key. Exceptions are named, as patterns
    (`fc.*`), and a pattern that fits nothing is an error too.

    Args:
        model: the Segmenter or Classifier.
        variables: of `model.init`; says which shapes are expected.
        state: torch names to arrays.
        drop: keys of `state` that are not used.
        keep: torch names whose value in `variables` stays.

    Raises:
        KeyMismatchError: keys that are missing, extra or of another shape; all are listed.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables))
    names = keys(model, variables)
    wanted = {path: n for path, n in names.items() if not _matches(n, keep)}
    given = {k: v for k, v in state.items() if not k.endswith(_COUNTER) and not _matches(k, drop)}
    new = {
        path: _axes_from_torch(path[-1], given[name], flat[path].ndim)
        for path, name in wanted.items()
        if name in given
    }
    unused = [f"drop {p!r}" for p in drop if not fnmatch.filter(state, p)]
    unused += [f"keep {p!r}" for p in keep if not fnmatch.filter(names.values(), p)]
    _raise_unless_empty(
        {
            "missing": [n for n in wanted.values() if n not in given],
            "not in the model": sorted(set(given) - set(wanted.values())),
            "of another shape": [
                f"{names[path]} {given[names[path]].shape}, expected "
                f"{_axes_to_torch(path[-1], np.empty(flat[path].shape)).shape}"
                for path, value in new.items()
                if value.shape != flat[path].shape
            ],
            "patterns that fit nothing": unused,
        }
    )
    return flax.traverse_util.unflatten_dict(flat | new)


def _raise_unless_empty(problems: Mapping[str, Sequence[str]]) -> None:
    named = {kind: names for kind, names in problems.items() if names}
    if named:
        lines = [f"{len(names)} {kind}:\n  " + "\n  ".join(names) for kind, names in named.items()]
        raise KeyMismatchError(
            "weights and model do not fit (`drop` names keys not to use, `keep` those to leave as "
            "initialised)\n" + "\n".join(lines)
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _axes_to_torch(leaf: str, value: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, DHWIO to OIDHW, (in, out) to (out, in)."""
    if leaf != "kernel":
        return value
    spatial = range(value.ndim - 2)
    return value.transpose(value.ndim - 1, value.ndim - 2, *spatial)


def _axes_from_torch(leaf: str, value: np.ndarray, ndim: int) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if leaf == "kernel":
        if ndim == 2 and value.shape[2:] == (1, 1):  # a linear layer kept as a 1×1 convolution
            value = value[:, :, 0, 0]
        value = value.transpose(*range(2, value.ndim), 1, 0)
    return np.ascontiguousarray(value)
