"""Which pieces of a state lie where, in the mode "fsdp": one rule, by shape.

The mesh has two axes: along "fsdp" a state is cut into pieces, along "data" there are copies of it;
a batch is divided over both. An array of parameters, of the optimiser's state or of the average is
cut along the largest of its axes that the pieces divide, the last one of equals. Arrays of fewer
numbers than `min_size`, which are not worth moving, and all else (statistics, counters, metrics)
are whole on every device. As in ZeRO (https://arxiv.org/abs/1910.02054); the compiler gathers what
a layer needs when it needs it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dilaff_jax.errors import UserError

AXES = ("data", "fsdp")
# The parts of a state of which arrays are cut.
_CUT = ("params", "opt_state", "average")


def mesh(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> Mesh:
    """Devices as a mesh of {"data": copies, "fsdp": pieces}; {} for one copy.

    Raises:
        UserError: other axes, or not as many devices.
    """
    given = {"data": 1, "fsdp": len(devices)} if not sizes else {"data": 1, "fsdp": 1} | dict(sizes)
    wrong = [k for k, v in given.items() if k not in AXES or type(v) is not int or v < 1]
    if wrong or math.prod(given.values()) != len(devices):
        raise UserError(
            f"parallel.mesh is {dict(sizes)}; expected {{'data': D, 'fsdp': F}} with D x F = "
            f"{len(devices)}, the devices of all processes"
        )
    shape = given["data"], given["fsdp"]
    return Mesh(np.array(devices).reshape(shape), AXES)


def spec(shape: Sequence[int], pieces: int, min_size: int) -> PartitionSpec:
    """How an array of this shape is cut into so many pieces; PartitionSpec() where it is not."""
    if pieces == 1 or math.prod(shape) < min_size:
        return PartitionSpec()
    divisible = [axis for axis, n in enumerate(shape) if n % pieces == 0]
    if not divisible:
        return PartitionSpec()
    axis = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(None,) * axis, "fsdp")


def of_state(tree: Any, where: Mesh, min_size: int) -> Any:
    """The sharding of each array of a TrainState, or of {params, batch_stats}."""
    pieces = where.shape["fsdp"]

    def place(path: Any, x: Any) -> NamedSharding:
        names = {getattr(entry, "name", getattr(entry, "key", None)) for entry in path}
        cut = not names.isdisjoint(_CUT) and "batch_stats" not in names
        whole = PartitionSpec()
        return NamedSharding(where, spec(np.shape(x), pieces, min_size) if cut else whole)

    return jax.tree_util.tree_map_with_path(place, tree)


def table(params: Any, pieces: int, min_size: int) -> str:
    """One line a rule: how many arrays and numbers are cut along which axis, or whole."""
    lines: dict[str, list[int]] = {}
    for x in jax.tree.leaves(params):
        cut = spec(np.shape(x), pieces, min_size)
        kind = f"cut along axis {len(cut) - 1} of {np.ndim(x)}" if len(cut) else "whole"
        count = lines.setdefault(kind, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + int(np.size(x))
    total = sum(size for _, size in lines.values())
    rows = [
        f"  {kind}: {arrays} arrays, {size:,} numbers ({100 * size / total:.1f} %)"
        for kind, (arrays, size) in sorted(lines.items())
    ]
    return "\n".join([f"parameters in {pieces} pieces:", *rows])
