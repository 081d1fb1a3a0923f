"""The digest of a checkpoint: what was saved, so that what is read can be compared with it."""

import concurrent.futures
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import parameter_names


def position_in(data: Mapping[str, Any]) -> Any:
    """The data's position; without a digest the data item is it."""
    return data.get("position", data)


def digest(state: Any, position: Any) -> dict[str, str]:
    """CRC-32 of every array of a state and of the data's position, by name.

    Any change within 32 bits is found, another one but for 1 in 2³². Costs one copy of the state
    to the host; state on several devices or hosts is the same on all, so each takes its own. What
    lies in pieces on several hosts is put together on each.
    """

    def crc(array: Any) -> str:
        value = np.ascontiguousarray(array)
        return f"{zlib.crc32(value.reshape(-1).view(np.uint8).data):08x}"

    arrays = parameter_names.named(jax.device_get(jax.tree.map(whole, state)))
    with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib leaves the interpreter free
        sums = dict(zip(arrays, pool.map(crc, arrays.values()), strict=True))
    return sums | {"data position": crc_of_json(position)}


def whole(x: Any) -> Any:
    """An array of which each process has all; one in pieces on several hosts is put together."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return multihost_utils.process_allgather(x, tiled=True)


def crc_of_json(value: Any) -> str:
    """CRC-32 of a value in the one form in which JSON's keys are sorted."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def check(
    state: Any, data: Mapping[str, Any], metrics: Mapping[str, Any] | None, path: pathlib.Path
) -> None:
    """Raises UserError where something is not what was saved; warns if that cannot be known."""
    if "digest" not in data and "position" not in data:
        logging.warning(
            "%s was written without a digest, by an older version: whether its numbers are still "
            "those that were saved cannot be known",
            path,
        )
        return
    computed, wanted = digest(state, position_in(data)), dict(data["digest"])
    score = None if metrics is None else metrics["score"]
    # Older versions saved the score with the rest, and a score without a sum of its own.
    if "score" in wanted or (metrics is not None and "crc" in metrics):
        computed["score"] = crc_of_json(score)
        wanted.setdefault("score", (metrics or {}).get("crc"))
    changed = sorted(k for k in computed.keys() | wanted.keys() if computed.get(k) != wanted.get(k))
    if changed:
        raise UserError(
            f"not what was saved: {', '.join(changed[:3])}"
            + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        )
