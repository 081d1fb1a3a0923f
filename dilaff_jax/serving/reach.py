"""How far a propagated result depends on its surroundings: what tiles and slabs need."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from dilaff_jax import affinity, propagate
from dilaff_jax.errors import UserError


def reach(refine: Mapping[str, Any], offsets: np.ndarray) -> int:
    """How far a result of propagation depends on its surroundings, in cells of the affinities.

    T steps of the largest dilation; where a step is a sweep over the dilations, of their sum.

    Raises:
        UserError: an operator of the user's, of which nobody knows.
    """
    name = refine["name"]
    if name == "identity":
        return 0
    if name not in ("signed", "random_walk"):
        raise UserError(
            f"refine.name is {name!r}, an operator of your own, of which nobody knows how far it "
            "reaches; in tiles 'signed', 'random_walk' and 'identity' can be used (--refine=none)"
        )
    function = getattr(propagate, name)
    steps = refine.get("steps", inspect.signature(function).parameters["steps"].default)
    dilations = affinity.distinct_dilations(offsets)
    sweeps = refine.get("order", "joint") != "joint"
    return int(steps) * (sum(dilations) if sweeps else max(dilations))
