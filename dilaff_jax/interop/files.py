"""Weight files as flat dicts of arrays: `.pth`, `.safetensors`, `.npz`. No pickle is run."""

import json
import pathlib
import pickle  # for its error
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from dilaff_jax.errors import UserError

State = dict[str, np.ndarray]

_TORCH = (".pth", ".pt", ".bin")
# Of a file that lists in which files beside it the weights are.
_INDEX = ".safetensors.index.json"
SUFFIXES = (*_TORCH, ".safetensors", ".npz")


def read(path: str | pathlib.Path, entry: str | None = None) -> State:
    """Reads every array of a weight file.

    `.pth`, `.pt` and `.bin` go through `torch.load(weights_only=True)` (the extra `torch`), `.npz`
    through `numpy.load(allow_pickle=False)`: code in a file is not run. What a training checkpoint
    holds besides arrays, such as its arguments, is passed over unread. Of weights in several files
    `.safetensors.index.json` names them all.

    Args:
        path: the file.
        entry: the key under which a training checkpoint keeps the weights, such as "model".

    Raises:
        UserError: another suffix; a file that is not what its suffix says, or holds other things
            than arrays.
        FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = _load(path)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as {path.suffix or 'weights'}: {reason}") from error
    if entry is not None:
        if not isinstance(values.get(entry), Mapping):
            raise UserError(f"{path} has no entry {entry!r}; it holds {_some(values)}")
        values = values[entry]
    other = [k for k, v in values.items() if not hasattr(v, "shape")]
    if other:
        raise UserError(
            f"{path} holds {_some(other)}, which are not arrays; where the weights stand under one "
            "of these keys, name it as `entry`"
        )
    return {k: _array(v) for k, v in values.items()}


def write(path: str | pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file; its suffix says how, see `read`."""
    path = pathlib.Path(path)
    _check_suffix(path)
    arrays = {k: np.ascontiguousarray(v) if np.ndim(v) else v for k, v in state.items()}
    if path.suffix == ".npz":
        np.savez(path, allow_pickle=False, **arrays)
    elif path.suffix == ".safetensors":
        import safetensors.numpy

        safetensors.numpy.save_file(arrays, str(path))
    else:
        import torch

        torch.save({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}, path)


def _load(path: pathlib.Path) -> dict[str, Any]:
    if path.name.endswith(_INDEX):
        named = set(json.loads(path.read_text())["weight_map"].values())
        # Beside it, whatever it says: an index chooses no file elsewhere.
        parts = [read(path.parent / pathlib.PurePath(name).name) for name in sorted(named)]
        return {k: v for part in parts for k, v in part.items()}
    _check_suffix(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    if path.suffix == ".safetensors":
        import safetensors.numpy

        return safetensors.numpy.load_file(str(path))
    import torch

    serialization = torch.serialization
    # A training checkpoint also holds settings and counters, of classes that torch would have to
    # be told to trust. They are replaced by empty shells: nothing of theirs is imported or run.
    foreign = [] if _is_legacy(path) else serialization.get_unsafe_globals_in_checkpoint(path)
    # Not what looks like a function of Python's own: no honest checkpoint asks for exec.
    shells: list[Any] = [
        (type("Shell", (_Shell,), {}), name) for name in foreign if not name.startswith("builtins.")
    ]
    try:
        with serialization.safe_globals(shells):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch advises to run what it refused
        lines = [line.strip() for line in str(error).splitlines()]
        asks = [line for line in lines if line.startswith(("Trying", "Unsupported", "Can only"))]
        raise UserError(
            "it asks for code to be run, which is refused"
            + (f" ({asks[0]})" if asks else "")
            + "; save its weights alone, as .safetensors or with torch.save(model.state_dict())"
        ) from error
    if not isinstance(values, Mapping):
        raise UserError(f"it holds a {type(values).__name__}, not a dict of weights")
    return dict(values)


class _Shell:
    """Takes the place of an object of a class that is not trusted; keeps nothing of it."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _is_legacy(path: pathlib.Path) -> bool:
    """Whether it is of torch before 1.6: no archive, so what it asks for cannot be listed."""
    return not zipfile.is_zipfile(path)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    # NumPy has no bfloat16 of torch's; every bfloat16 is a float32 exactly.
    return (value.float() if "bfloat16" in str(value.dtype) else value).numpy()


def _check_suffix(path: pathlib.Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: suffix is {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")


def _some(keys: Any, most: int = 8) -> str:
    keys = [str(k) for k in keys]
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
