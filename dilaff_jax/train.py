"""The training loop, from config and workdir to a trained model: read it top to bottom."""

import contextlib
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
from absl import logging

from dilaff_jax import evaluate, initialise, metrics, objective, optim, resume, settings
from dilaff_jax.data import datasets, pipeline
from dilaff_jax.data.batch_iterator import DevicePrefetch
from dilaff_jax.data.class_list import Classes
from dilaff_jax.errors import NotFiniteError, UserError
from dilaff_jax.models import frozen, segmenter
from dilaff_jax.runtime import files, goodput, locks, preemption, provenance, reporting, trackers
from dilaff_jax.runtime.checkpoint import Checkpoints
from dilaff_jax.runtime.parallel import AXIS, Devices
from dilaff_jax.runtime.preemption import Preempted
from dilaff_jax.step import RunningMetrics, TrainStep, fault_message, seed_of
from dilaff_jax.storage import bucket, mirror


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> evaluate.Results | None:
    """Trains to `config.num_steps`, resuming what `workdir` holds; returns its last evaluation.

    A run that is killed and started again ends bit-identical to one that was not: one checkpoint
    holds state, data position and what has been summed for the next report.

    Raises:
        UserError: the config cannot be; `workdir` holds a run of another model, of other settings
            or data.
        Taken: another process trains in `workdir`; a `UserError` too.
        NotFiniteError: a step gave NaN or infinity; the last good checkpoint stays.
        Preempted: the process was asked to stop; a checkpoint was written first.
    """
    entered = time.perf_counter()
    settings.check(config)
    with mirror.written(workdir, "the workdir", alone=True) as folder:
        # First: what is wrong with a config shows before the run writes anything.
        run = _assemble(config, folder)
        with locks.held(lock_file(folder)) as mine:
            if not mine:
                raise locks.Taken(
                    f"{workdir}: another process trains there; wait for it, or use another workdir"
                )
            return _train(run, entered)


# How often an evaluation is begun that never comes to its end.
_ATTEMPTS = 5


class _Run(NamedTuple):
    """What a run is made of; `rows` are the images of a step in this process."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    devices: Devices
    rows: int
    train_source: datasets.Source
    eval_source: datasets.Source
    model: segmenter.Segmenter
    schedule: optax.Schedule
    train_step: TrainStep


def _assemble(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> _Run:
    """Everything that a config says, without writing anything."""
    devices = Devices.of(config.parallel)
    rows = devices.per_process(config.batch_size)
    config = datasets.completed(config)
    train_source = datasets.load(config.data, config.data.train_split)
    eval_source = datasets.load(config.data, config.data.eval_split)
    if train_source.class_pixels is not None and not train_source.class_pixels.any():
        raise UserError(
            f"{train_source.title} has not one labelled pixel, so there is nothing to learn; look "
            "at its masks, and at what they are mapped to (--mask_values)"
        )
    classes = train_source.num_classes
    model = segmenter.build(segmenter.config_of_run(config), classes, axis_name=AXIS)
    settings.check_best_metric(config.best_metric, eval_source.class_names, model)
    if config.optim.frozen:  # to name the parameters, the model has to be traced
        frozen.Frozen(segmenter.abstract_variables(model)["params"], config.optim.frozen)
    tx, schedule = optim.optimiser(config.optim, config.num_steps, model.encoder)
    weighted = objective.with_class_weights(config, train_source.class_pixels)
    train_step = TrainStep(weighted, model, classes, tx, devices.spread)
    return _Run(
        config, workdir, devices, rows, train_source, eval_source, model, schedule, train_step
    )


def _train(run: _Run, entered: float) -> evaluate.Results | None:
    config, workdir, devices = run.config, run.workdir, run.devices
    changed = resume.check(config, workdir, run.train_source)

    # 1. The state: this workdir's newest checkpoint, or a fresh one.
    batches = DevicePrefetch(_host_batches(run), devices.shard)
    checkpoints = Checkpoints(workdir / "checkpoints", devices, keep_latest=config.keep_latest)
    begin, state = _first_state(run, checkpoints, batches)
    # Not before: a workdir of another model stays as it is.
    save_config(config, workdir, run.train_source)
    resume.record_data(run.train_source, workdir)
    if begin < config.num_steps:
        provenance.note_start(workdir, begin, changed)

    # 2. The program, compiled before the first step, so that its needs are known.
    file = workdir / goodput.FILE if jax.process_index() == 0 else None
    clock = goodput.Clock(file, begin, entered)
    reporter = _reporter(run, begin, changed, clock)
    with clock.within("compilation"):
        program, flops = _compile(run, state, reporter)
    evaluation = evaluate.Evaluation(config, run.model, devices, workdir, run.eval_source)

    # 3. The steps.
    results = failure = running = None
    with (
        contextlib.closing(batches),
        contextlib.closing(checkpoints),
        contextlib.closing(reporter),
        preemption.stop_signal() as stop,
    ):
        if begin:
            with clock.within("evaluation"):
                results, failure = _made_up(run, evaluation, state, begin, reporter, checkpoints)
        clock.turn("steps")
        for at in _steps(run, evaluation, begin, reporter):
            last = at == config.num_steps
            _profile(config.profile_steps, at, workdir)
            with clock.within("input"):
                batch = next(batches)
            state, token = program(state, batch)
            # One step waits on the device while one runs, no more: a signal, a fault or a bar that
            # is many dispatched steps ahead of the device tells nothing.
            jax.block_until_ready(running)
            running = token
            if at == begin + 1:
                jax.block_until_ready(token)
                reporter.say(f"first step after {time.perf_counter() - entered:.1f} s")
            reporter.advance(config.batch_size)

            stopped = preemption.all_agreed(stop, at)
            log = last or at % config.log_every == 0
            evaluates = _evaluates(config, at)
            saves = evaluates or stopped or at % config.checkpoint_every == 0
            if log or saves:
                message = fault_message(jax.device_get(state.fault))
                if message:
                    raise NotFiniteError(message)
            if log:
                reporter.scalars(at, _train_metrics(run, jax.device_get(state.window), at))
            if saves:  # first, so that an evaluation that ends the process costs no step
                with clock.within("checkpoints"):
                    evaluation.prepare(at)
                    reporter.sync()
                    checkpoints.save(at, state, batches)
            if evaluates:
                with clock.within("evaluation"):
                    results, failure = _evaluate(evaluation, state, at, reporter, checkpoints)
            if log or saves:
                clock.note(at)
            if stopped and not last:
                raise Preempted(
                    f"asked to stop: step {at} is saved in {workdir}; run again to go on"
                )
        images = config.batch_size / devices.total
        reporter.say(clock.report(images, flops, devices.local[0]))
    if failure is not None:
        failure.add_note(f"every step is saved in {workdir}; --mode=eval evaluates the last")
        raise failure
    return results


def _host_batches(run: _Run) -> Any:
    """The training data of this process."""
    return pipeline.train_batches(
        run.config.data,
        run.train_source,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _reporter(
    run: _Run, begin: int, changed: Sequence[str], clock: goodput.Clock
) -> reporting.Reporter:
    """Where numbers go; says where a run goes on, and with what changed."""
    evaluated = evaluate.read_results(run.workdir, begin) is not None
    steps = run.config.num_steps
    given = run.workdir, begin, run.config.reporting, resume.as_json(run.config)
    opened = functools.partial(trackers.begin, *given)
    reporter = reporting.Reporter(run.workdir, steps, begin, clock, evaluated, opened)
    if begin:
        reporter.say("\n  changed: ".join([f"resumed at step {begin} of {steps}", *changed]))
    return reporter


def _steps(
    run: _Run, evaluation: evaluate.Evaluation, begin: int, reporter: reporting.Reporter
) -> Iterator[int]:
    """The steps to take: to the last, or until nothing becomes better."""
    config = run.config
    for done in range(begin, config.num_steps):
        news = done == begin or _evaluates(config, done)
        if config.patience and news and evaluation.has_waited(config.patience, done):
            reporter.say(
                f"no better {config.best_metric} in {config.patience} evaluations: training ends "
                f"at step {done} of {config.num_steps} (config.patience)"
            )
            return
        yield done + 1


def _evaluates(config: ml_collections.ConfigDict, at: int) -> bool:
    return at == config.num_steps or at % config.eval_every == 0


def _made_up(
    run: _Run,
    evaluation: evaluate.Evaluation,
    state: Any,
    at: int,
    reporter: reporting.Reporter,
    checkpoints: Checkpoints,
) -> tuple[evaluate.Results | None, Exception | None]:
    """The evaluation of the step at which a run goes on, made up for where it did not end.

    What ends the process in the middle of it, such as a lack of memory, would do so at each start:
    one that was begun several times and never ended is left out. (Several processes might see
    different numbers, and would then wait for one another for ever.)
    """
    results = evaluate.read_results(run.workdir, at)
    if results is not None:
        score = evaluation.score(results)
        if score is not None and not checkpoints.is_rated(at):
            checkpoints.rate(at, score)
        return results, None
    if not _evaluates(run.config, at):
        return None, None
    if jax.process_count() == 1 and evaluation.begun(at) >= _ATTEMPTS:
        reporter.say(
            f"the evaluation at step {at} was begun {_ATTEMPTS} times and never ended: it is left "
            "out. --mode=eval tries again; a smaller eval.batch_size needs less memory"
        )
        return None, None
    return _evaluate(evaluation, state, at, reporter, checkpoints)


def _evaluate(
    evaluation: evaluate.Evaluation,
    state: Any,
    at: int,
    reporter: reporting.Reporter,
    checkpoints: Checkpoints,
) -> tuple[evaluate.Results | None, Exception | None]:
    """Evaluates, reports, rates; a failure is said and returned, as the steps are worth keeping."""
    try:
        results = evaluation(state.evaluated, at)
    except Exception as e:  # a full memory, a damaged image, a fault in a metric
        # The other processes wait for this one within the evaluation: no going on without them.
        if jax.process_count() > 1:
            raise
        logging.info("the evaluation at step %d failed", at, exc_info=True)
        reporter.say(f"the evaluation at step {at} failed ({type(e).__name__}: {e}); going on")
        return None, e
    results.report(reporter)
    reporter.sync()
    score = evaluation.score(results)
    if score is None:
        reporter.say(f"step {at} has no score: best_metric is undefined on these images")
    else:
        checkpoints.rate(at, score)
    evaluation.finish(results)
    return results, None


def _first_state(run: _Run, checkpoints: Checkpoints, batches: DevicePrefetch) -> tuple[int, Any]:
    """Step and state to go on from, on all devices; sets the position of `batches`."""
    shape = (1, *run.config.data.crop_size, run.model.channels)
    seed = seed_of(run.config)
    abstract = jax.eval_shape(lambda: run.train_step.init(shape, seed))
    restored = checkpoints.restore(abstract, batches)
    if restored is None:
        state = initialise.fresh(run.config, run.train_step, run.model, run.train_source, shape)
        return 0, run.devices.place(state)
    begin, state = restored
    checkpoints.discard_after(begin)
    return begin, run.devices.place(state)


def _compile(
    run: _Run, state: Any, reporter: reporting.Reporter
) -> tuple[Callable[[Any, Any], tuple[Any, jax.Array]], float]:
    """The training step on all devices, with this run's seed, and its FLOPs on each.

    Says what the parameters are, and what it needs.
    """
    devices, crop = run.devices, run.config.data.crop_size
    reporter.say(reporting.parameter_table(state.params))
    if pieces := devices.table(state.params):
        reporter.say(pieces)
    seed = devices.replicate(seed_of(run.config))
    out = ("state", "replicated")
    mapped = devices.map(_with_token(run.train_step), out=out, donate=True, shared=1)
    started = time.perf_counter()
    example = {
        "image": np.zeros((run.rows, *crop, run.model.channels), run.train_source.dtype),
        "label": np.zeros((run.rows, *crop), np.uint8),
    }
    compiled = mapped.lower(state, devices.shard(example), seed).compile()
    kind = devices.local[0].device_kind
    reporter.say(f"{devices.total} devices ({kind}), {run.config.parallel.mode}")
    reporter.say(reporting.memory_line(compiled))
    reporter.say(f"compiled in {time.perf_counter() - started:.1f} s")
    # What pmap compiles ahead of time takes global arrays; with several processes it is called
    # through itself, and finds the compiled program in the cache.
    program = compiled if jax.process_count() == 1 else mapped
    counted: Any = compiled.cost_analysis() or {}
    flops = counted.get("flops", 0.0) * run.config.optim.accumulate
    return lambda state, batch: program(state, batch, seed), flops


def lock_file(workdir: pathlib.Path) -> pathlib.Path:
    """What a run holds while it trains: each of its processes one of its own."""
    return workdir / f".lock-{jax.process_index()}"


def wait(workdir: str | os.PathLike) -> None:
    """Returns once no other process trains in `workdir`, to its end or not."""
    if bucket.is_address(workdir):
        mirror.wait(workdir)
        return
    with locks.held(lock_file(files.local(workdir, "the workdir")), wait=True):
        pass


def save_config(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, source: datasets.Source
) -> None:
    """Writes config and classes beside the run, so that it can be used without its data set."""
    if jax.process_index() == 0:
        files.write_text(workdir / "config.json", config.to_json_best_effort(indent=1) + "\n")
        Classes(source.class_names, source.colors).write(workdir)


def _train_metrics(run: _Run, window: RunningMetrics, at: int) -> dict[str, float]:
    """The means of a window, ready for metrics.jsonl."""
    steps = int(window.steps)
    means = {f"train/{k}_loss": float(v) / steps for k, v in window.losses.items()}
    norms = {f"train/{k}_norm": float(v) / steps for k, v in window.norms.items()}
    total = means.pop("train/total_loss")
    iou = {}
    if run.model.segmentation:
        iou = {"train/miou": metrics.segmentation_summary(window.confusion)["miou"]}
    return {
        "train/loss": total,
        **means,
        **iou,
        "train/learning_rate": float(run.schedule(at - 1)),
        **norms,
    }


def _with_token(train_step: TrainStep) -> Callable[[Any, Any, Any], tuple[Any, jax.Array]]:
    """The step, and a copy of its number that can be waited for once the state is given away."""

    def advance(state: Any, batch: Any, seed: jax.Array) -> tuple[Any, jax.Array]:
        state = train_step(state, batch, seed)
        return state, state.step

    return advance


def _profile(steps: tuple[int, ...], at: int, workdir: pathlib.Path) -> None:
    if steps and at == steps[0]:
        jax.profiler.start_trace(str(workdir / "profile"))
    if steps and at == steps[1] + 1:
        jax.profiler.stop_trace()
