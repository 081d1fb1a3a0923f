"""Saving and restoring, by Orbax: one checkpoint holds {state, position of the data, metrics}.

No other file knows Orbax. A checkpoint that cannot be read is set aside and the one before it is
taken; one that belongs to another model is an error. Nothing is ever unpickled.

Orbax's format notices damage to its structure, not to the numbers: a byte that flips on disk gives
other weights. So every checkpoint also holds the digest of what was saved, within its data item and
hence written and committed with the rest, and it is compared with what is restored.
"""

import contextlib
import itertools
import json
import logging as stdlib_logging
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import digest, files, interrupts, parameter_names
from dilaff_jax.runtime.parallel import Devices


class _OwnWords(stdlib_logging.Filter):
    """Leaves out what Orbax logs of a failure, page by page: it is raised too, and said once here.

    With `-v 1` it is shown.
    """

    def filter(self, record: stdlib_logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or logging.get_verbosity() >= logging.DEBUG


_OWN_WORDS = _OwnWords()


class Checkpoints:
    """The checkpoints of one run, in `directory`; written in the background.

    Args:
        directory: created where it does not exist.
        devices: how the state is placed on them.
        keep_latest: how many of the latest are kept, at least 1; the best one is kept besides.
    """

    def __init__(self, directory: pathlib.Path, devices: Devices, *, keep_latest: int = 2) -> None:
        self._devices, self._directory = devices, directory.resolve()
        logging.get_absl_logger().addFilter(_OWN_WORDS)
        # Here, because Orbax would only find out at the first save.
        self._directory.mkdir(parents=True, exist_ok=True)
        self._shared = _seen_by_all(self._directory)
        # Orbax reads all scores before anything else; without its own, `restore` refuses one.
        self._set_aside([file for file, _ in _unreadable_scores(self._directory)])
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep_latest),
                policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._manager = ocp.CheckpointManager(
            files.without_patterns(self._directory),
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,
                preservation_policy=policy,
                cleanup_tmp_directories=True,
                create=False,  # it is there
                multiprocessing_options=_processes(self._shared),
            ),
        )

    def save(self, step: int, state: Any, iterator: Any) -> None:
        """Starts writing; returns when the state has been copied off the devices.

        Raises:
            OSError: this one, or the one before in the background, could not be written.
        """
        position = iterator.get_state()
        data = {"position": position, "digest": digest.digest(state, position)}
        if self._shared:
            state = _to_global(self._devices, state)
        else:  # process 0 has it all, and alone writes
            state = jax.device_get(jax.tree.map(digest.whole, state))
            if jax.process_index() > 0:
                return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
        )
        with _writing(self._directory):
            self._manager.save(step, args=arguments, force=True)

    def rate(self, step: int, score: float) -> None:
        """Notes the score of a saved step's evaluation; the highest marks the best checkpoint.

        Raises:
            OSError: the checkpoint, or its score, could not be written.
        """
        with _writing(self._directory):
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                # In the form in which Orbax keeps them; whole, or not there.
                part = self._directory / f".score-{step}"
                shutil.rmtree(part, ignore_errors=True)
                content = {"score": score, "crc": digest.crc_of_json(score)}
                files.write_text(part / "metrics", json.dumps(content))
                shutil.rmtree(self._directory / str(step) / "metrics", ignore_errors=True)
                part.rename(self._directory / str(step) / "metrics")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"the score of step {step} is written")
        self._manager.reload()

    def is_rated(self, step: int) -> bool:
        """Whether a saved step has a score."""
        return (self._directory / str(step) / "metrics" / "metrics").exists()

    def restore(self, abstract: Any, iterator: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the newest checkpoint that can be read, or None without any.

        Sets the position of `iterator` to the one saved with it.

        Args:
            abstract: the state's shapes and dtypes, from `jax.eval_shape`.
            iterator: the training data's.

        Raises:
            UserError: the checkpoint belongs to another model, optimiser or training data.
            OSError: there are checkpoints, and none can be read.
        """
        failed = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._check_structure(step, abstract)
            try:
                state, position = self._read(step, abstract)
            except Exception as e:  # Orbax raises whatever the file system or the codec raised
                failed.append(f"{self._directory / str(step)} ({_reason(e)})")
                logging.warning("checkpoint %s cannot be read; trying the one before", failed[-1])
            else:
                iterator.set_state(position)  # a position in other data is no damage
                self._check_agreed(step)
                return step, state
        self._check_agreed(-1)
        if failed:
            raise OSError(
                f"no checkpoint can be read: {'; '.join(failed)}. Nothing was changed; move the "
                "folder away to start afresh, or restore it from a copy"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Sets aside what is newer than `step` and could not be read, as NAME.unreadable."""
        newer = [s for s in self._manager.all_steps() if s > step]
        self._set_aside([self._directory / str(s) for s in newer])
        self._manager.reload()

    def _set_aside(self, paths: list[pathlib.Path]) -> None:
        """Renames files or folders to NAME.unreadable, for all processes at once."""
        if jax.process_index() == 0 or not self._shared:
            for path in paths:
                names = (f"{path.name}.unreadable{n or ''}" for n in itertools.count())
                free = (p for p in map(path.with_name, names) if not p.exists())
                logging.warning("%s is set aside as %s", path, path.rename(next(free)).name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("what cannot be read is set aside")

    def _check_agreed(self, step: int) -> None:
        """Raises OSError where processes that each have a folder of their own found other steps."""
        if not self._shared:
            found = multihost_utils.process_allgather(np.asarray(step)).tolist()
            if len(set(found)) > 1:
                raise OSError(
                    f"{self._directory}: the processes of this run do not see the same folder, and "
                    f"go on at different steps there ({found}, -1 for none); give a workdir that "
                    "all see, or one in a bucket"
                )

    def close(self) -> None:
        """Waits, then releases the writer's threads; raises OSError as `save`."""
        with _writing(self._directory):
            self._manager.close()

    def _read(self, step: int, abstract: Any) -> tuple[Any, Any]:
        target = self._devices.abstract(abstract, "state")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target),
                data=ocp.args.JsonRestore(),
            ),
        )
        data, state = restored["data"], _from_global(self._devices, restored["state"])
        digest.check(state, data, self._manager.metrics(step), self._directory / str(step))
        return state, digest.position_in(data)

    def _check_structure(self, step: int, abstract: Any) -> None:
        try:
            stored = self._manager.item_metadata(step)["state"]
            params, whole = parameter_names.shapes(stored["params"]), parameter_names.shapes(stored)
        except Exception:  # unreadable; `restore` goes on to the one before
            return
        path = self._directory / str(step)
        parameter_names.check_same(params, parameter_names.shapes(abstract.params), path)
        # Not the sums for the next report: they are no part of what is trained.
        differing = {
            name.split("/")[0]
            for name in whole.keys() ^ parameter_names.shapes(abstract).keys()
            if not name.startswith("window/")
        }
        if differing:
            raise UserError(
                f"{path} was written with another optimiser or average of the parameters (its "
                f"{' and '.join(sorted(differing))} has other parts); go on with the settings of "
                "optim that it was written with, or in another workdir, from its weights "
                "(config.init.workdir)"
            )


def latest_step(workdir: pathlib.Path) -> int | None:
    """The step of the newest finished checkpoint of a run, None without any."""
    folder = workdir.resolve() / "checkpoints"
    if not folder.is_dir():
        return None
    return max(ocp.utils.checkpoint_steps(folder), default=None)


def read_variables(
    workdir: pathlib.Path,
    like: Mapping[str, Any],
    *,
    latest: bool = False,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> tuple[int, dict[str, Any]]:
    """Returns step and {params, batch_stats} of the best (else the latest) checkpoint of a run.

    Args:
        workdir: of the run.
        like: variables of the model, for their structure.
        latest: take the latest, whatever its score.
        drop: patterns of names, such as `decoder/logits/*`, that are not used.
        keep: patterns of names whose value in `like` stays.

    Raises:
        FileNotFoundError: `workdir` has no checkpoint.
        UserError: the checkpoint is of another model, or damaged; a pattern fits nothing.
    """
    folder = workdir.resolve() / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints: {folder} does not exist")
    for file, reason in _unreadable_scores(folder):
        raise _damaged(file.parents[1], f"its score: {reason}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what is only read will not be written
    try:
        options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_score)
        reader = ocp.CheckpointManager(
            files.without_patterns(folder), item_handlers=_handlers(), options=options
        )
    finally:
        logging.set_verbosity(verbosity)
    with reader as manager:
        step = None if latest else manager.best_step()
        step = manager.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"{workdir} holds no finished checkpoint")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                manager.item_metadata(step)["state"],
                is_leaf=lambda x: hasattr(x, "shape"),
            )
            arguments = ocp.args.Composite(
                state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
            )
            restored = manager.restore(step, args=arguments)
            state, data = restored["state"], restored["data"]
            digest.check(state, data, manager.metrics(step), folder / str(step))
        except Exception as e:  # whatever the file system or the codec raised
            raise _damaged(folder / str(step), _reason(e)) from e
    variables = parameter_names.averaged(state["params"], state["batch_stats"], state["average"])
    return step, parameter_names.select(variables, like, drop, keep, folder / str(step))


def _to_global(devices: Devices, tree: Any) -> Any:
    """Replicated state as arrays that all processes share, the form in which it is saved."""
    if devices.mode != "pmap" or jax.process_count() == 1:
        return tree
    return jax.tree.map(ocp.utils.fully_replicated_host_local_array_to_global_array, tree)


def _from_global(devices: Devices, tree: Any) -> Any:
    """The inverse of `_to_global`, for what was restored."""
    if devices.mode != "pmap" or jax.process_count() == 1:
        return tree
    return devices.replicate(jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree))


def _seen_by_all(directory: pathlib.Path) -> bool:
    """Whether the processes of this run see one and the same folder; tried with a file."""
    if jax.process_count() == 1:
        return True
    name = multihost_utils.broadcast_one_to_all(np.asarray(secrets.randbits(30)))
    file = directory / f".seen-{int(name)}"
    if jax.process_index() == 0:
        file.touch()
    multihost_utils.sync_global_devices("a file is there")
    seen = multihost_utils.process_allgather(np.asarray(file.exists()))
    if jax.process_index() == 0:
        file.unlink()
    return bool(seen.all())


def _processes(shared: bool) -> Any:
    """Orbax's processes that work on a checkpoint together: all, or each for itself."""
    if shared:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    # Named at the start, so that what a checkpoint holds can be asked before it is restored.
    return {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    """Names the folder, and what to do, where Orbax raises whatever the file system raised."""
    try:
        with interrupts.unbroken():
            yield
    except jax.errors.JaxRuntimeError:  # another process is gone, or a device: no matter of files
        raise
    except Exception as e:
        raise OSError(
            f"a checkpoint could not be written to {directory} ({_reason(e)}). Those before it "
            "stay; make room, or fix what keeps the folder from being written, and run again"
        ) from e


def _unreadable_scores(directory: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Files with a score that is none, and why."""
    unreadable = []
    for file in sorted(directory.glob("*/metrics/metrics")):
        try:
            if file.parents[1].name.isdigit():
                float(_score(json.loads(file.read_text())))
        except (ValueError, KeyError, TypeError, OSError) as e:
            unreadable.append((file, _reason(e)))
            logging.warning("the score in %s cannot be read (%s)", *unreadable[-1])
    return unreadable


def _reason(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 1000 else f'{line[:1000]} ...'}"


def _damaged(path: pathlib.Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {path} cannot be read ({reason}); restore it from a copy, or move that folder "
        "away: then another checkpoint is taken"
    )
