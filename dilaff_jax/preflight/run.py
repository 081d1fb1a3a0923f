"""Whether a config fits a machine, and what it can reach there at best, before it is rented.

    python -m dilaff_jax.main --mode preflight --topology v5e:4x4 --config ... --workdir DIR

The real training step, evaluation step and propagation are compiled ahead of time, for a TPU slice
that need not be there or for the devices of this machine; no data set is needed. The floor of a
step's time is the largest of arithmetic / peak FLOP/s, memory traffic / bandwidth and collectives /
interconnect: nothing runs faster, most things run slower.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import logging

from dilaff_jax.data import datasets, pipeline
from dilaff_jax.preflight.apart import Source, measure
from dilaff_jax.preflight.footprint import Footprint, available, table
from dilaff_jax.preflight.programs import TRAIN
from dilaff_jax.runtime import chips
from dilaff_jax.runtime.chips import GIB, Chip

# The search for the largest batch ends when it is known to this share.
_RESOLUTION = 1 / 16
_MOST_COMPILATIONS = 8
# How far beyond what one measurement predicts the search looks for what is too large: memory that
# does not grow with the batch makes that prediction too low.
_BEYOND = 4


def run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    topology: str,
    *,
    classes: int = 0,
    search: bool = True,
) -> dict[str, Any]:
    """Compiles, prints the table, writes WORKDIR/preflight.json and returns its content.

    Args:
        config: the whole config; its batch sizes are of all devices together.
        workdir: where the report goes.
        topology: a TPU slice such as "v5e:4x4", or "auto" for the devices of this machine.
        classes: how many, where neither the data set's builder nor its prepared files say.
        search: find the largest batch that fits, which takes some three compilations more.

    Raises:
        UserError: the config, the topology or the number of classes cannot be.
    """
    of_data = classes_and_size(config, classes)
    if not config.data.bands:  # given by hand where the data set is not prepared
        config = datasets.completed(config)
    source = Source(config, *of_data, topology)
    programs = source.programs()
    slice_devices = chips.devices(topology)
    chip, count = chips.of(slice_devices[0]), len(slice_devices)
    print(_heading(topology, chip, count), flush=True)
    if fault := chips.compiler_fault(slice_devices[0]):
        logging.warning("%s", fault)
    limit = memory_limit(chip, slice_devices)

    # This machine's own devices may be open in one process only.
    measured = programs.measure if topology == "auto" else functools.partial(measure, source)

    def need(name: str, rows: int) -> Footprint:
        print(f"compiling the {name}, {rows} images a device ...", end=" ", flush=True)
        found = measured(name, rows, limit)
        took = f"{found.compile_seconds:.0f} s"
        print(took if found.compiled else f"too large ({took})", flush=True)
        return found

    footprints: dict[str, Footprint] = {}
    report: dict[str, Any] = {
        "topology": topology,
        "devices": count,
        "chip": dataclasses.asdict(chip),
        "jax": jax.__version__,
        "config": json.loads(config.to_json_best_effort()),
        "programs": {},
    }
    for name, rows in programs.rows().items():
        footprints[name] = need(name, rows)
        report["programs"][name] = footprints[name].record(chip, count)
        # Each at once: the next may be too much for this machine.
        path = _write(workdir, report)
    print(table(footprints, chip, count), flush=True)
    print(f"written: {path}", flush=True)
    if not search:
        return report
    # Last, because it takes longest: whoever has seen enough may stop it here.
    print("searching the largest batch that fits (Ctrl-C to do without)", flush=True)
    try:
        fits, fails = largest(
            lambda rows: need(TRAIN, rows), footprints[TRAIN], config.optim.accumulate
        )
    except KeyboardInterrupt:
        print("\nwithout the largest batch, as asked", flush=True)
        return report
    print(_verdict(fits, fails, count), flush=True)
    report["largest_batch_per_device"] = {
        "fits": fits and fits.record(chip, count),
        "does_not_fit": fails and fails.record(chip, count),
    }
    _write(workdir, report)
    return report


def largest(
    need: Callable[[int], Footprint], first: Footprint, unit: int = 1
) -> tuple[Footprint | None, Footprint | None]:
    """Finds the largest batch that fits and the smallest found that does not, to 1/16.

    From above: a compiler refuses what is too large within seconds and says what it needs, and
    takes longest for what hardly fits. Memory is taken as affine in the batch, through the two
    sizes measured that are nearest to the limit.

    Args:
        need: measures a number of images a device.
        first: what is known already.
        unit: the images a device are a multiple of this.

    Returns:
        None for a bound that was not met.
    """
    known = [first]
    while True:
        fits = max((f for f in known if f.fits), key=lambda f: f.rows, default=None)
        fails = min((f for f in known if not f.fits), key=lambda f: f.rows, default=None)
        low = fits.rows if fits else 0
        # The gap that may be left, in images.
        gap = max(unit, int(low * _RESOLUTION) // unit * unit)
        close = fails is not None and fails.rows - low <= gap
        if close or first.limit is None or len(known) == _MOST_COMPILATIONS:
            return fits, fails
        rows = _predict(known, unit)
        if fails is not None:
            known.append(need(min(max(rows, low + gap), fails.rows - unit)))
            continue
        # Measured once: far beyond. Later, from a line: where it would be too large.
        rows = _BEYOND * rows if fits is first else rows + unit
        known.append(need(max(rows, low + gap)))


def _predict(known: list[Footprint], unit: int) -> int:
    """The largest multiple of `unit` for which the line through two measurements leaves room."""
    limit = min(f.limit for f in known if f.limit is not None)
    near, *others = sorted(known, key=lambda f: abs(f.memory - limit))
    rows = near.rows * limit / near.memory
    if others:
        slope = (near.memory - others[0].memory) / (near.rows - others[0].rows)
        rows = near.rows + (limit - near.memory) / slope if slope > 0 else rows
    return max(unit, int(rows) // unit * unit)


def memory_limit(chip: Chip, devices: list[Any]) -> float | None:
    """Memory for one device's program; the CPU "devices" of a machine share its memory."""
    if devices[0].platform == "tpu":
        return available(devices[0])
    if devices[0].platform == "cpu" and chip.memory:
        return chip.memory / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit", chip.memory)


def classes_and_size(
    config: ml_collections.ConfigDict, classes: int
) -> tuple[int, tuple[int, ...]]:
    """Classes and size of evaluation images, from the data set if it is prepared."""
    data = config.data
    try:
        source = datasets.load(data, data.eval_split)
    except ValueError:
        names = datasets.builder_class(data.dataset.partition("/")[0]).class_names
        if not (classes or names):
            raise  # only the files of this data set say how many classes there are
        size = tuple(data.eval_size or data.crop_size)
        at = "x".join(map(str, size))
        print(f"{data.dataset} is not prepared: evaluation is taken at {at}")
        return classes or len(names), size
    return classes or source.num_classes, pipeline.eval_size(data, source)


def _heading(topology: str, chip: Chip, count: int) -> str:
    memory = "memory unknown" if chip.memory is None else f"{chip.memory / GIB:.0f} GiB"
    peaks = ""
    if chip.flops and chip.bandwidth:
        peaks = f", {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s"
    return f"{topology}: {count} x {chip.name}, each {memory}{peaks}"


def _verdict(fits: Footprint | None, fails: Footprint | None, devices: int) -> str:
    too_much = f"{fails.rows} need {fails.memory / GIB:.2f} GiB" if fails else "no more were tried"
    if fits is None:
        return f"no batch fits: {too_much}"
    return (
        f"largest batch that fits: {fits.rows} images a device, {fits.rows * devices} in all "
        f"({fits.memory / GIB:.2f} GiB); {too_much}"
    )


def _write(workdir: pathlib.Path, report: dict[str, Any]) -> pathlib.Path:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "preflight.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
