"""What a compiled program needs of a device, and the least time that it can take there."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dilaff_jax.errors import UserError
from dilaff_jax.preflight import hlo
from dilaff_jax.runtime import reporting
from dilaff_jax.runtime.chips import GIB, Chip

# As XLA says it when temporaries alone, or the whole program, are too large.
_SIZE = r"([\d.]+)([KMGT]?)"
_REFUSALS = (
    rf"HLO temporaries \({_SIZE}B?\) exceeds available HBM \({_SIZE}B?\)",
    rf"[Uu]sed {_SIZE} of {_SIZE} hbm",
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What one program needs on each device, in one execution.

    Attributes:
        rows: images a device.
        memory: bytes in all; what is given away and reused counts once.
        limit: bytes that the device has for it; None where unknown.
        compiled: False where the compiler refused it as too large; what follows is then unknown.
        arguments: bytes of state and batch.
        temporaries: bytes beside arguments and results.
        flops: operations, as XLA counts them in the compiled program: bodies of loops once.
        traffic: bytes to and from main memory, see `hlo`.
        xla_bytes: XLA's own count of bytes accessed.
        collectives: what is exchanged with other devices.
        compile_seconds: wall time.
    """

    rows: int
    memory: float
    limit: float | None
    compiled: bool = True
    arguments: int = 0
    temporaries: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    xla_bytes: float = 0.0
    collectives: tuple[hlo.Collective, ...] = ()
    compile_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the device has that memory."""
        return self.compiled and (self.limit is None or self.memory <= self.limit)

    def floors(self, chip: Chip, devices: int) -> dict[str, float]:
        """Seconds of one execution at peak: arithmetic, memory traffic, interconnect."""
        exchanged = sum(
            # A ring reduces, then gathers: every device sends all shares but its own, twice.
            c.bytes * (2 if c.kind == "all-reduce" else 1) * (devices - 1) / devices
            for c in self.collectives
        )
        amounts = {
            "arithmetic": (self.flops, chip.flops),
            "memory traffic": (self.traffic, chip.bandwidth),
            "interconnect": (exchanged, chip.interconnect),
        }
        if not self.compiled:
            return {}
        return {name: amount / peak for name, (amount, peak) in amounts.items() if peak}

    def record(self, chip: Chip, devices: int) -> dict[str, Any]:
        """Everything as what JSON can hold, with what follows for one image and one second."""
        floors = self.floors(chip, devices)
        best = max(floors.values(), default=0.0)
        return dataclasses.asdict(self) | {
            "collectives": [dataclasses.asdict(c) for c in self.collectives],
            "fits": self.fits,
            "flops_per_image": self.flops / self.rows,
            "traffic_per_image": self.traffic / self.rows,
            "floor_seconds": floors,
            "bound_by": max(floors, key=floors.__getitem__) if best else None,
            "images_per_second_per_device_at_best": self.rows / best if best else None,
        }


def measure(
    lower: Callable[[int], Any], rows: int, limit: float | None, repeats: int = 1
) -> Footprint:
    """Compiles a program for `rows` images a device and reads what it needs.

    Args:
        lower: gives the program lowered for a number of images a device.
        rows: that number.
        limit: bytes that the device has.
        repeats: how often the loop runs that holds nearly all arithmetic; XLA counts it once.

    Raises:
        UserError: the compiler refused it for another reason than its size.
    """
    lowered, started = lower(rows), time.perf_counter()
    try:
        with _not_kept():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, available = _refusal(str(error))
        seconds = time.perf_counter() - started
        return Footprint(rows, used, available, compiled=False, compile_seconds=seconds)
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    program = hlo.Program(compiled.as_text())
    return Footprint(
        rows,
        # What the outputs share with donated arguments is counted once.
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes,
        limit,
        True,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops", 0.0) * repeats,
        program.traffic(),
        cost.get("bytes accessed", 0.0),
        tuple(program.collectives()),
        seconds,
    )


def table(by_program: Mapping[str, Footprint], chip: Chip, devices: int) -> str:
    """Figures of each program, one column a program."""
    footprints = list(by_program.values())
    floors = [f.floors(chip, devices) for f in footprints]
    rows = [
        ["images a device", *(str(f.rows) for f in footprints)],
        ["memory, GiB", *(f"{f.memory / GIB:.3g}" for f in footprints)],
        ["  of what there is", *map(_share, footprints)],
    ]

    def row(name: str, value: Callable[[Footprint], str]) -> None:
        rows.append([name, *(value(f) if f.compiled else "-" for f in footprints)])

    row("  state and batch, GiB", lambda f: f"{f.arguments / GIB:.3g}")
    row("  temporaries, GiB", lambda f: f"{f.temporaries / GIB:.3g}")
    row("GFLOP an image", lambda f: f"{f.flops / f.rows / 1e9:.4g}")
    row("memory traffic, GB an image", lambda f: f"{f.traffic / f.rows / 1e9:.3g}")
    row("  XLA's bytes accessed", lambda f: f"{f.xla_bytes / f.rows / 1e9:.3g}")
    row("collectives", _collectives)
    for name in ("arithmetic", "memory traffic", "interconnect"):
        rows.append([f"{name}, ms", *(_milliseconds(f.get(name)) for f in floors)])
    best = [max(f.values(), default=None) for f in floors]
    rows.append(["at best, ms a step", *map(_milliseconds, best)])
    rates = [f"{f.rows / b:.4g}" if b else "-" for f, b in zip(footprints, best, strict=True)]
    rows.append(["at best, images/s a device", *rates])
    row("compiled in, s", lambda f: f"{f.compile_seconds:.0f}")
    return reporting.table("on each device", ["", *by_program], rows)


def available(device: jax.Device) -> float:
    """Bytes that a TPU's compiler lets a program use, from its refusal of one that is too large."""
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    huge = jax.ShapeDtypeStruct((2**40,), jnp.uint8, sharding=place)
    program = jax.jit(lambda x: x + 1).trace(huge).lower(lowering_platforms=("tpu",))
    try:
        program.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refusal(str(error))[1]
    raise UserError(f"the compiler for {device.device_kind} names no limit of its memory")


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Keeps programs out of the compilation cache: those for absent devices cannot be read back."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def _share(footprint: Footprint) -> str:
    if footprint.limit is None:
        return "-"
    share = f"{100 * footprint.memory / footprint.limit:.0f} %"
    return share if footprint.fits else f"{share}: TOO LARGE"


def _collectives(footprint: Footprint) -> str:
    texts = [f"{c.count} {c.kind}, {c.bytes / 1e6:.3g} MB" for c in footprint.collectives]
    return "; ".join(texts) or "none"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def _refusal(message: str) -> tuple[float, float]:
    """Bytes needed and bytes available, from the compiler's message that there is too little."""
    for pattern in _REFUSALS:
        if match := re.search(pattern, message):
            return float(match[1]) * _UNITS[match[2]], float(match[3]) * _UNITS[match[4]]
    raise UserError(f"the compiler refused the program: {message.splitlines()[0]}")
