"""Whether a config fits a machine, and what it can reach there at best, before it is rented.

    python -m dilaff_jax.main --mode preflight --topology v5e:4x4 --config ... --workdir DIR

The real training step, evaluation step and propagation are compiled ahead of time, for a TPU slice
that need not be there or for the devices of this machine; no data set is needed. The floor of a
step's time is the largest of arithmetic / peak FLOP/s, memory traffic / bandwidth and collectives /
interconnect: nothing runs faster, most things run slower.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import objective, optim
from dilaff_jax.data import datasets, pipeline
from dilaff_jax.eval_step import EvalStep
from dilaff_jax.models import segmenter
from dilaff_jax.preflight.footprint import Footprint, available, measure, table
from dilaff_jax.runtime import chips
from dilaff_jax.runtime.chips import GIB, Chip
from dilaff_jax.runtime.parallel import AXIS, Devices
from dilaff_jax.step import TrainStep, seed_of

# The search for the largest batch ends when it is known to this share.
_RESOLUTION = 1 / 16
_MOST_COMPILATIONS = 8
# How far beyond what one measurement predicts the search looks for what is too large: memory that
# does not grow with the batch makes that prediction too low.
_BEYOND = 4
TRAIN = "training step"
# What the training step would need without `optim.frozen`.
NOTHING_FROZEN = "nothing frozen"


class Programs:
    """The programs of a run, lowered for given devices from shapes alone.

    Args:
        config: the whole config.
        num_classes: C.
        eval_size: (height, width) of evaluation images, or three sides of volumes.
        devices: mapped by shard_map.

    Raises:
        UserError: the config cannot be.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        num_classes: int,
        eval_size: tuple[int, ...],
        devices: Devices,
    ) -> None:
        # Which weights classes have changes nothing that is compiled.
        config = objective.with_class_weights(config, np.ones(num_classes))
        self._config, self._devices, self._eval_size = config, devices, eval_size
        self._model = segmenter.build(segmenter.config_of_run(config), num_classes, axis_name=AXIS)
        channels = self._model.channels
        self._num_classes, self._image = num_classes, (1, *config.data.crop_size, channels)
        self._tx, _ = optim.optimiser(config.optim, config.num_steps, self._model.encoder)
        self._train = TrainStep(config, self._model, num_classes, self._tx, devices.spread)
        self._eval = EvalStep(config, self._model, num_classes)
        self._seed = seed_of(config)
        # Bands may be of fewer bits; what floating point needs is enough for all.
        self._dtype = jnp.float32 if config.data.bands else jnp.uint8
        self._state = jax.eval_shape(lambda: self._train.init(self._image, self._seed))

    def all(self, rows: int) -> dict[str, tuple[Callable[[int], Any], int]]:
        """{name: (what lowers it, images a device)}; the training step with `rows`."""
        evaluated = -(-self._config.eval.batch_size // self._devices.total)
        programs: dict[str, tuple[Callable[[int], Any], int]]
        programs = {TRAIN: (self.train_step, rows)}
        if self._config.optim.frozen:
            programs[NOTHING_FROZEN] = (self.thawed_step, rows)
        programs["eval step"] = (self.eval_step, evaluated)
        if self._model.offsets is not None:
            programs["propagation"] = (self.propagation, evaluated)
        return programs

    def train_step(self, rows: int) -> Any:
        """The training step with `rows` images a device, lowered."""
        return self._lower_step(self._train, self._state, rows)

    def thawed_step(self, rows: int) -> Any:
        """The training step as it would be with nothing frozen, lowered."""
        config = self._config.copy_and_resolve_references()
        config.optim.frozen = ()
        spread = self._devices.spread
        step = TrainStep(config, self._model, self._num_classes, self._tx, spread)
        return self._lower_step(
            step, jax.eval_shape(lambda: step.init(self._image, self._seed)), rows
        )

    def eval_step(self, rows: int) -> Any:
        """The evaluation step, lowered."""
        program = self._devices.map(self._eval, out=("replicated", "sharded"))
        return self._lower(program, self._state.evaluated, self._batch(rows, self._eval_size))

    def propagation(self, rows: int) -> Any:
        """The refinement alone, from logits to labels, lowered."""
        outputs = jax.eval_shape(
            lambda variables, x: self._model.apply(variables, x, train=False),
            self._state.evaluated,
            self._batch(rows, self._eval_size)["image"],
        )
        maps = {name: outputs[name] for name in ("logits", "affinity_logits")}
        if maps["logits"] is None:  # then another network's, taken to be on the affinity's grid
            shape = (*maps["affinity_logits"].shape[:3], self._num_classes)
            maps["logits"] = jax.ShapeDtypeStruct(shape, jnp.float32)

        def program(_: Any, x: dict[str, jax.Array]) -> jax.Array:
            return self._eval.propagate(x["logits"], x["affinity_logits"], self._eval_size)

        return self._lower(self._devices.map(program, out="sharded"), (), maps)

    def _lower_step(self, train_step: TrainStep, state: Any, rows: int) -> Any:
        program = self._devices.map(train_step, out="state", donate=True, shared=1)
        batch = self._batch(rows, self._config.data.crop_size)
        return self._lower(program, state, batch, self._seed)

    def _batch(self, rows: int, size: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (rows * self._devices.total, *size)
        return {
            "image": jax.ShapeDtypeStruct((*shape, self._model.channels), self._dtype),
            "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
        }

    def _lower(self, program: Any, state: Any, batch: Any, *shared: Any) -> Any:
        placed = self._devices.abstract(state, "state"), self._devices.abstract(batch, "sharded")
        whole = self._devices.abstract(shared)
        platform = self._devices.local[0].platform
        return program.trace(*placed, *whole).lower(lowering_platforms=(platform,))


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
    if topology != "auto":
        # The TPU compiler is used as a library; this machine has no such device to start.
        jax.config.update("jax_platforms", "cpu")
    slice_devices = chips.devices(topology)
    chip, count = chips.of(slice_devices[0]), len(slice_devices)
    devices = Devices.of(config.parallel, slice_devices)
    of_data = classes_and_size(config, classes)
    if not config.data.bands:  # given by hand where the data set is not prepared
        config = datasets.completed(config)
    programs = Programs(config, *of_data, devices)
    print(_heading(topology, chip, count), flush=True)

    footprints: dict[str, Footprint] = {}
    limit, parts = memory_limit(chip, slice_devices), config.optim.accumulate
    each = devices.per_process(config.batch_size) // count
    for name, (lower, rows) in programs.all(each).items():
        repeats = parts if name in (TRAIN, NOTHING_FROZEN) else 1
        footprints[name] = measure(name, lower, rows, limit, repeats)
    print(table(footprints, chip, count), flush=True)
    report = {
        "topology": topology,
        "devices": count,
        "chip": dataclasses.asdict(chip),
        "jax": jax.__version__,
        "config": json.loads(config.to_json_best_effort()),
        "programs": {n: f.record(chip, count) for n, f in footprints.items()},
    }
    print(f"written: {_write(workdir, report)}", flush=True)
    if not search:
        return report
    # Last, because it takes longest: whoever has seen enough may stop it here.
    print("searching the largest batch that fits (Ctrl-C to do without)", flush=True)
    fits, fails = largest(
        lambda rows: measure(TRAIN, programs.train_step, rows, limit, parts),
        footprints[TRAIN],
        parts,
    )
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
