"""The training loop, from config and workdir to a trained model: read it top to bottom."""

import contextlib
import datetime
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils

from dilaff_jax import (
    evaluate,
    initialise,
    locks,
    metrics,
    optim,
    reporting,
    settings,
    step,
    timing,
)
from dilaff_jax.checkpoint import Checkpoints
from dilaff_jax.data import batches as data_batches
from dilaff_jax.data import config as data_config
from dilaff_jax.data import datasets, pipeline
from dilaff_jax.data.classes import Classes
from dilaff_jax.models import segmenter
from dilaff_jax.parallel import AXIS, Devices


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> evaluate.Results | None:
    """Trains to `config.num_steps`, resuming what `workdir` holds; returns its last evaluation.

    A run that is killed and started again ends bit-identical to one that was not: one checkpoint
    holds state, data position and what has been summed for the next report.

    Raises:
        ValueError: the config cannot be; a checkpoint of another model lies in `workdir`.
        Busy: another process trains in `workdir`; a `ValueError` too.
        FloatingPointError: a step gave NaN or infinity; the last good checkpoint stays.
        Preempted: the process was asked to stop; a checkpoint was written first.
    """
    entered = time.perf_counter()
    check(config)
    parts = _parts(config)  # what is wrong with a config shows before anything is written
    with locks.held(lock_file(workdir)) as mine:
        if not mine:
            raise Busy(
                f"{workdir}: another process trains there; wait for it, or use another workdir"
            )
        return _train_and_evaluate(config, workdir, parts, entered)


class _Parts(NamedTuple):
    """What a run is made of; `rows` are the images of a step in this process."""

    devices: Devices
    rows: int
    source: datasets.Source
    model: segmenter.Segmenter
    schedule: optax.Schedule
    train_step: step.TrainStep


def _parts(config: ml_collections.ConfigDict) -> _Parts:
    devices = Devices(config.parallel.mode, config.parallel.devices)
    rows = devices.per_process(config.batch_size)
    source = datasets.load(config.data, config.data.train_split)
    model = segmenter.build(step.model_config(config), source.num_classes, axis_name=AXIS)
    tx, schedule = optim.optimiser(config.optim, config.num_steps)
    train_step = step.TrainStep(config, model, source.num_classes, tx)
    return _Parts(devices, rows, source, model, schedule, train_step)


def _train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, parts: _Parts, entered: float
) -> evaluate.Results | None:
    devices, rows, source, model, schedule, train_step = parts

    # 1. The state: this workdir's newest checkpoint, or a fresh one.
    host_batches = pipeline.train_batches(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batches = data_batches.DevicePrefetch(host_batches, devices.shard)
    checkpoints = Checkpoints(workdir / "checkpoints", devices, keep_latest=config.keep_latest)
    shape = (1, *config.data.crop_size, 3)
    abstract = jax.eval_shape(lambda: train_step.init(shape))
    restored = checkpoints.restore(abstract, batches)
    if restored is not None:
        begin, state = restored
        checkpoints.discard_after(begin)
    else:
        begin, state = 0, initialise.fresh(config, train_step, model, source, shape)
    state = devices.replicate(state)
    save_config(config, workdir, source)  # not before: a workdir of another model stays as it is
    if begin < config.num_steps:
        _note_start(workdir, begin)

    # 2. The program, compiled before the first step, so that its needs are known.
    reporter = reporting.Reporter(workdir, config.num_steps, begin)
    if restored is not None:
        reporter.say(f"resumed at step {begin} of {config.num_steps}")
    reporter.say(reporting.parameter_table(state.params))
    mapped = devices.map(_with_token(train_step), out="replicated", donate=True)
    started = time.perf_counter()
    example = {
        "image": np.zeros((rows, *config.data.crop_size, 3), np.uint8),
        "label": np.zeros((rows, *config.data.crop_size), np.uint8),
    }
    compiled = mapped.lower(state, devices.shard(example)).compile()
    # What pmap compiles ahead of time takes global arrays; with several processes it is called
    # through itself, and finds the compiled program in the cache.
    program = compiled if jax.process_count() == 1 else mapped
    reporter.say(
        f"{devices.total} devices ({devices.local[0].device_kind}), {config.parallel.mode}"
    )
    reporter.say(reporting.memory_line(compiled))
    reporter.say(f"compiled in {time.perf_counter() - started:.1f} s")
    evaluation = evaluate.Evaluation(config, model, devices, workdir)

    # 3. The steps.
    results = evaluate.read_results(workdir, begin)
    running = None
    with (
        contextlib.closing(batches),
        contextlib.closing(checkpoints),
        contextlib.closing(reporter),
        _stop_signal() as stop,
    ):
        for at in range(begin + 1, config.num_steps + 1):
            last = at == config.num_steps
            _profile(config.profile_steps, at, workdir)
            state, token = program(state, next(batches))
            # One step waits on the device while one runs, no more: a signal, a fault or a bar that
            # is many dispatched steps ahead of the device tells nothing.
            jax.block_until_ready(running)
            running = token
            if at == begin + 1:
                jax.block_until_ready(token)
                reporter.say(f"first step after {time.perf_counter() - entered:.1f} s")
            reporter.advance(config.batch_size)

            stopped = _agreed(stop, at)
            log = last or at % config.log_every == 0
            evaluates = last or at % config.eval_every == 0
            saves = last or stopped or at % config.checkpoint_every == 0
            if log or evaluates or saves:
                message = step.fault_message(jax.device_get(state.fault))
                if message:
                    raise FloatingPointError(message)
            if log:
                reporter.scalars(at, _train_metrics(jax.device_get(state.window), schedule, at))
            with reporter.paused():
                score = None
                if evaluates:
                    results = evaluation(state.evaluated, at)
                    score = evaluation.score(results)
                    reporter.scalars(at, {f"eval/{k}": v for k, v in results.scalars.items()})
                    reporter.pictures(at, results.pictures)
                    reporter.say(results.table)
                if saves:
                    reporter.sync()
                    checkpoints.save(at, state, batches, score)
            if stopped and not last:
                raise Preempted(
                    f"asked to stop: step {at} is saved in {workdir}; run again to go on"
                )
    return results


class Preempted(Exception):  # noqa: N818 - it is no error
    """The process was asked to stop, and its state is saved."""


class Busy(ValueError):  # noqa: N818 - as above
    """Another process trains in this workdir."""


def lock_file(workdir: pathlib.Path) -> pathlib.Path:
    """What a run holds while it trains: each of its processes one of its own."""
    return workdir / f".lock-{jax.process_index()}"


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a config that cannot be; see `settings.check`."""
    settings.check(config)
    data_config.check(config.data)


def save_config(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, source: datasets.Source
) -> None:
    """Writes config and classes beside the run, so that it can be used without its data set."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1) + "\n")
        Classes(source.class_names, source.colors).write(workdir)


def _note_start(workdir: pathlib.Path, begin: int) -> None:
    """Adds to starts.jsonl what runs from here on: step, commit, versions, hardware, time."""
    if jax.process_index() == 0:
        about = {
            "step": begin,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "processes": jax.process_count(),
            **timing.provenance("jaxlib", "flax", "optax", "grain", "numpy"),
        }
        with (workdir / "starts.jsonl").open("a") as file:
            file.write(json.dumps(about) + "\n")


def _train_metrics(window: step.Window, schedule: optax.Schedule, at: int) -> dict[str, float]:
    """The means of a window, ready for metrics.jsonl."""
    steps = int(window.steps)
    means = {f"train/{k}_loss": float(v) / steps for k, v in window.losses.items()}
    norms = {f"train/{k}_norm": float(v) / steps for k, v in window.norms.items()}
    iou = metrics.segmentation_summary(window.confusion)
    return (
        {"train/loss": means.pop("train/total_loss")}
        | means
        | {"train/miou": iou["miou"], "train/learning_rate": float(schedule(at - 1))}
        | norms
    )


def _with_token(train_step: step.TrainStep) -> Callable[[Any, Any], tuple[Any, jax.Array]]:
    """The step, and a copy of its number that can be waited for once the state is given away."""

    def advance(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        state = train_step(state, batch)
        return state, state.step

    return advance


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Turns SIGTERM into an event, so that the step under way is finished and saved."""
    stop = threading.Event()
    # With several processes JAX's own service listens, so that all stop at the same step.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
    # Asked to stop when the run ended anyway: whoever called it has to know.
    if stop.is_set() and callable(before):
        before(signal.SIGTERM, None)


def _agreed(stop: threading.Event, at: int) -> bool:
    """Whether all processes are to stop after this step."""
    if jax.process_count() > 1:
        return bool(multihost_utils.reached_preemption_sync_point(at))
    return stop.is_set()


def _profile(steps: tuple[int, ...], at: int, workdir: pathlib.Path) -> None:
    if steps and at == steps[0]:
        jax.profiler.start_trace(str(workdir / "profile"))
    if steps and at == steps[1] + 1:
        jax.profiler.stop_trace()
