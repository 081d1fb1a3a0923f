"""Accelerators: what each can do at most, and TPU slices that need not be there to compile for."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import jax
from packaging.version import Version

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import machine

GIB = 2**30
EXTRA = "pip install 'dilaff-jax[preflight]' (or: pip install 'jax[tpu]')"

# By chip the first TPU compiler that compiles the configs' training steps: earlier ones end in a
# segmentation fault.
_COMPILER_FROM = {"TPU v6 lite": "0.0.43.2"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device, from its maker's data sheet; None where unknown.

    Attributes:
        name: what people call it.
        memory: bytes of main memory (HBM).
        flops: bfloat16 operations a second, a multiply-add being two.
        bandwidth: of that memory, bytes a second.
        interconnect: to the other chips, all links together, bytes a second.
    """

    name: str
    memory: float | None
    flops: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None


# By JAX's `device_kind`. TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
CHIPS = {
    "TPU v4": Chip("TPU v4", 32 * GIB, 275e12, 1228e9, 300e9),
    "TPU v5 lite": Chip("TPU v5e", 16 * GIB, 197e12, 819e9, 200e9),
    "TPU v5": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip("TPU v6e", 32 * GIB, 918e12, 1640e9, 448e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 40 * GIB, 312e12, 1555e9, 600e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 80 * GIB, 312e12, 2039e9, 600e9),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 80 * GIB, 989e12, 3352e9, 900e9),
    "NVIDIA H200": Chip("H200", 141 * GIB, 989e12, 4800e9, 900e9),
}
# Dimensions of a slice; a v4 or v5p chip has two cores that JAX sees as one ("megacore").
GENERATIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
_MEGACORE = ("v4", "v5p")


def of(device: jax.Device) -> Chip:
    """The chip of a device; for others than `CHIPS` only the memory it states, or the machine's."""
    if device.device_kind in CHIPS:
        return CHIPS[device.device_kind]
    if device.platform == "cpu":
        return Chip(device.device_kind, machine.memory())
    return Chip(device.device_kind, (device.memory_stats() or {}).get("bytes_limit"))


def compiler_fault(device: jax.Device) -> str:
    """What is known against the installed TPU compiler for a device, and what helps; "" if nothing.

    Of one that TPU_LIBRARY_PATH names nothing is known.
    """
    wanted = _COMPILER_FROM.get(device.device_kind)
    installed = importlib.util.find_spec("libtpu") is not None
    if wanted is None or not installed or os.environ.get("TPU_LIBRARY_PATH"):
        return ""
    version = importlib.metadata.version("libtpu")
    if Version(version) >= Version(wanted):
        return ""
    return (
        f"libtpu {version} ends in a segmentation fault on the training steps of most networks for "
        f"{CHIPS[device.device_kind].name}; pip install --no-deps libtpu=={wanted}"
    )


def devices(topology: str) -> list[Any]:
    """Devices of a TPU slice such as "v5e:4x4", which need not exist; "auto": this machine's.

    Programs can be compiled for the devices of a slice, not run. Needs the TPU compiler (libtpu).

    Raises:
        UserError: no such slice; libtpu is not installed or is of another version than JAX needs.
    """
    if topology == "auto":
        return jax.local_devices()
    generation, shape = _parse(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU compiler, libtpu: {EXTRA}")
    # Asks no cloud metadata server for a TPU that is not there, and leaves libtpu to others too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if generation in _MEGACORE:
        options["chip_config_name"] = "megacore"
    if set(shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        slice_ = topologies.get_topology_desc(topology, platform="tpu", **options)
    except Exception as error:  # XLA's own, and whatever a libtpu of another version raises
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology}: libtpu knows no such slice ({reason}). Hosts have 2x2 chips, "
            "so sides are even: v5e:2x2, v5e:4x4, v4:2x2x4; or one chip: v5e:1x1. If the name is "
            f"right, install the libtpu that belongs to JAX {jax.__version__}: {EXTRA}"
        ) from error
    return list(slice_.devices)


def _parse(topology: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    sides = tuple(map(int, match[2].split("x"))) if match else ()
    if not match or match[1] not in GENERATIONS or len(sides) != GENERATIONS[match[1]]:
        raise UserError(
            f"--topology={topology!r}; expected 'auto' or GENERATION:CHIPSxCHIPS, such as v5e:4x4, "
            "v6e:2x2, v4:2x2x4, v5p:2x2x2 (chips along each side: two for v5e and v6e, three for "
            "v4 and v5p)"
        )
    return match[1], sides
