"""The arrays of a state by their names, and whether those of a checkpoint are those of a model."""

import fnmatch
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from dilaff_jax.errors import UserError


def named(tree: Any) -> dict[str, Any]:
    """The leaves by name, PART/.../PART; the same for a state and for what Orbax makes of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    return {_name(path): leaf for path, leaf in leaves}


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes by name."""
    return {name: tuple(leaf.shape) for name, leaf in named(tree).items()}


def check_same(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: pathlib.Path
) -> None:
    """Raises UserError listing where a checkpoint's parameters are not those of the model."""
    lines = [
        f"  {name}: checkpoint {stored.get(name, 'absent')}, model {wanted.get(name, 'absent')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if lines:
        raise UserError(
            f"{path} was written by another model; {len(lines)} parameters differ:\n"
            + "\n".join(lines[:10])
            + "\nuse the config it was written with, or another workdir; a run that starts from "
            "its weights may leave some out (config.init.drop and .keep)"
        )


def select(
    stored: Mapping[str, Any],
    like: Mapping[str, Any],
    drop: Sequence[str],
    keep: Sequence[str],
    path: pathlib.Path,
) -> dict[str, Any]:
    """Returns `like` with the values of a checkpoint.

    Args:
        stored: {params, batch_stats} of the checkpoint.
        like: the same of the model.
        drop: patterns of names, without the collection, that are not used.
        keep: patterns of names whose value in `like` stays.
        path: of the checkpoint, for messages.

    Raises:
        UserError: the rest does not fit the model; a pattern fits nothing.
    """
    names, wanted = named(stored), named(dict(like))
    for option, patterns, there in (("drop", drop, names), ("keep", keep, wanted)):
        for pattern in patterns:
            if not any(_fits(name, (pattern,)) for name in there):
                raise UserError(
                    f"{option} has the pattern {pattern!r}, which fits no parameter of "
                    f"{path if option == 'drop' else 'the model'}; it has such as "
                    f"{', '.join(_plain(name) for name in list(there)[-3:])}"
                )
    taken = {name: value for name, value in names.items() if not _fits(name, drop)}
    asked = {name: value for name, value in wanted.items() if not _fits(name, keep)}
    check_same(
        {name: tuple(value.shape) for name, value in taken.items()},
        {name: tuple(value.shape) for name, value in asked.items()},
        path,
    )
    return jax.tree_util.tree_map_with_path(
        lambda at, initial: taken.get(_name(at), initial), dict(like), is_leaf=_is_array
    )


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts as one; the value of the first where both have one."""
    return traverse_util.unflatten_dict(
        {**traverse_util.flatten_dict(dict(second)), **traverse_util.flatten_dict(dict(first))}
    )


def averaged(params: Any, batch_stats: Any, average: Any) -> dict[str, Any]:
    """{params, batch_stats} with the moving average of those that change, where one is kept."""
    variables = {"params": params, "batch_stats": batch_stats}
    return {k: merge(average[k], v) for k, v in variables.items()} if average else variables


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _name(path: Any) -> str:
    def part(key: Any) -> str:
        return str(next(getattr(key, k) for k in ("key", "name", "idx") if hasattr(key, k)))

    return "/".join(map(part, path))


def _plain(name: str) -> str:
    """A name without its collection (params, batch_stats)."""
    return name.partition("/")[2]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(_plain(name), p) for p in patterns)
