"""The dilated neighbourhood: its offsets, their dilations and their opposites.

An edge joins pixel i with i + o, for every offset o = d·u with d a dilation and u a step to one of
the 3^n - 1 neighbours in n dimensions.
"""

import collections
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dilaff_jax.errors import UserError


def offsets(
    dilations: Sequence[int] = (1, 2, 4, 8),
    ndim: int = 2,
    symmetric: bool = False,
    spacing: Sequence[float] | None = None,
) -> Int[np.ndarray, " K ndim"]:
    """Returns the offsets O = {d·u : d in dilations, u in {-1,0,1}^ndim without 0}, `[K, ndim]`.

    Dilation-major, then row-major over u; K = (3^ndim - 1)·len(dilations). `symmetric=True` keeps
    of each pair o, -o the one that points forward (first non-zero entry positive), K/2 in all; the
    other half follows by `mirror`. The dilations (1, 2, 4, 8) are our choice.

    `spacing`, the size of a voxel along each axis, keeps neighbours equally far: d counts voxels of
    the finest axis, and a step along axis j is max(1, round(d·min(spacing)/spacing_j)); with
    (40, 4, 4) and d = 20 (2, 20, 20). It is never 0, as the next slice is the nearest there is, so
    that small dilations have the same neighbours straight along a coarse axis. Our choice.

    Raises:
        UserError: a dilation is not a positive integer, is given twice, or `ndim` < 1; `spacing`
            has not `ndim` positive numbers.
    """
    if ndim < 1:
        raise UserError(f"ndim is {ndim}; a neighbourhood needs at least one spatial dimension")
    if not dilations or any(int(d) != d or d < 1 for d in dilations):
        raise UserError(f"dilations are {tuple(dilations)}; give one or more positive integers")
    if len(set(dilations)) < len(dilations):
        raise UserError(f"dilations are {tuple(dilations)}; each may be given once")
    sizes = np.ones(ndim) if spacing is None else np.asarray(spacing, np.float64)
    if sizes.shape != (ndim,) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise UserError(
            f"spacing is {spacing}; give the size of a voxel along each of {ndim} axes, such as "
            f"{(4.0, *(1.0,) * (ndim - 1))}"
        )
    steps = _steps(ndim)
    if symmetric:
        steps = steps[[points_forward(u) for u in steps.tolist()]]
    along = np.maximum(1, np.floor(np.outer(dilations, sizes.min() / sizes) + 0.5))
    return (along[:, None] * steps).reshape(-1, ndim).astype(np.int32)


def _steps(ndim: int) -> Int[np.ndarray, " n ndim"]:
    """{-1,0,1}^ndim without 0, row-major."""
    return np.array([u for u in itertools.product((-1, 0, 1), repeat=ndim) if any(u)])


def dilation_of(offsets: Int[np.ndarray, " K ndim"]) -> Int[np.ndarray, " K"]:
    """Returns the dilation of each offset, `[K]`.

    In whole neighbourhoods, as `offsets` gives them, that of the finest axis; else max_j |o_j|.
    """
    rows = check_offsets(offsets)
    steps = _steps(rows.shape[1])
    if len(rows) % len(steps) == 0:
        blocks = rows.reshape(-1, *steps.shape)
        along = np.abs(blocks).max(axis=1)
        if along.all() and (blocks == along[:, None] * steps).all():
            return np.repeat(along.max(axis=1), len(steps))
    return np.abs(rows).max(axis=1)


def places(wanted: Int[np.ndarray, " n ndim"], offsets: Int[np.ndarray, " K ndim"]) -> list[int]:
    """Where each of `wanted` stands among `offsets`; the second of equals where the second does.

    Raises:
        UserError: one does not stand there.
    """
    standing = collections.defaultdict(list)
    for k, offset in enumerate(map(tuple, offsets.tolist())):
        standing[offset].append(k)
    found = []
    for offset in map(tuple, wanted.tolist()):
        if not standing[offset]:
            raise UserError(f"there is no offset {offset}")
        found.append(standing[offset].pop(0))
    return found


def distinct_dilations(offsets: Int[np.ndarray, " K ndim"]) -> list[int]:
    """Returns the D dilations of the offsets, each once, in the order of the channels."""
    return list(dict.fromkeys(dilation_of(offsets).tolist()))


def check_offsets(offsets: np.ndarray) -> Int[np.ndarray, " K ndim"]:
    """Returns `offsets` as an integer array `[K, ndim]`; raises UserError for any other thing."""
    array = np.asarray(offsets)
    if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"offsets have shape {array.shape} and dtype {array.dtype}; expected integers [K, ndim]"
        )
    return array


def points_forward(offset: Sequence[int]) -> bool:
    """Whether the first entry that is not 0 is positive."""
    return next((x > 0 for x in offset if x), False)
