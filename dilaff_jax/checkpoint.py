"""Saving and restoring, by Orbax: one checkpoint holds {state, position of the data, metrics}.

No other file knows Orbax. A checkpoint that cannot be read is set aside and the one before it is
taken; one that belongs to another model is an error. Nothing is ever unpickled.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from dilaff_jax.parallel import Devices


class Checkpoints:
    """The checkpoints of one run, in `directory`; written in the background.

    Args:
        directory: created where it does not exist.
        devices: how the state lies on them.
        keep_latest: how many of the latest are kept, at least 1; the best one is kept besides.
    """

    def __init__(self, directory: pathlib.Path, devices: Devices, *, keep_latest: int = 2) -> None:
        self._devices, self._directory = devices, directory.resolve()
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep_latest),
                policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers=_handlers(),
            options=ocp.CheckpointManagerOptions(best_fn=_score, preservation_policy=policy),
        )

    def save(self, step: int, state: Any, iterator: Any, score: float | None = None) -> None:
        """Starts writing; returns when the state has been copied off the devices.

        score: of this step's evaluation, if there was one; the highest marks the best checkpoint.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(self._devices.to_global(state)),
            data=ocp.args.JsonSave(iterator.get_state()),
        )
        self._manager.save(
            step, args=arguments, metrics=None if score is None else {"score": score}, force=True
        )

    def restore(self, abstract: Any, iterator: Any) -> tuple[int, Any] | None:
        """Returns (step, state) of the newest checkpoint that can be read, or None without any.

        Sets the position of `iterator` to the one saved with it.

        Args:
            abstract: the state's shapes and dtypes, from `jax.eval_shape`.
            iterator: the training data's.

        Raises:
            ValueError: the checkpoint belongs to another model or configuration.
            RuntimeError: there are checkpoints, and none can be read.
        """
        failed = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._check_structure(step, abstract)
            try:
                return step, self._read(step, abstract, iterator)
            except Exception as e:  # Orbax raises whatever the file system or the codec raised
                reason = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
                failed.append(f"{self._directory / str(step)} ({reason})")
                logging.warning("checkpoint %s cannot be read; trying the one before", failed[-1])
        if failed:
            raise RuntimeError(
                f"no checkpoint can be read: {'; '.join(failed)}. Nothing was changed; move the "
                "folder away to start afresh, or restore it from a copy"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Sets aside what is newer than `step` and could not be read, as NAME.unreadable."""
        newer = [s for s in self._manager.all_steps() if s > step]
        if newer and jax.process_index() == 0:
            for s in newer:
                folder = self._directory / str(s)
                folder.rename(folder.with_name(f"{s}.unreadable"))
        self._manager.reload()

    def close(self) -> None:
        """Waits, then releases the writer's threads."""
        self._manager.close()

    def _read(self, step: int, abstract: Any, iterator: Any) -> Any:
        target = self._devices.abstract(abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target),
                data=ocp.args.JsonRestore(),
            ),
        )
        iterator.set_state(restored["data"])
        return self._devices.from_global(restored["state"])

    def _check_structure(self, step: int, abstract: Any) -> None:
        try:
            found = _shapes(self._manager.item_metadata(step)["state"]["params"])
        except Exception:  # unreadable; `restore` goes on to the one before
            return
        _check_same(found, _shapes(abstract.params), self._directory / str(step))


def latest_step(workdir: pathlib.Path) -> int | None:
    """The step of the newest finished checkpoint of a run, None without any."""
    folder = workdir.resolve() / "checkpoints"
    if not folder.is_dir():
        return None
    return max(ocp.utils.checkpoint_steps(folder), default=None)


def read_variables(
    workdir: pathlib.Path, like: Mapping[str, Any], *, latest: bool = False
) -> tuple[int, dict[str, Any]]:
    """Returns step and {params, batch_stats} of the best (else the latest) checkpoint of a run.

    Args:
        workdir: of the run.
        like: variables of the model, for their structure.
        latest: take the latest, whatever its score.

    Raises:
        FileNotFoundError: `workdir` has no checkpoint.
        ValueError: the checkpoint is of another model.
    """
    folder = workdir.resolve() / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} holds no checkpoints: {folder} does not exist")
    options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_score)
    with ocp.CheckpointManager(folder, item_handlers=_handlers(), options=options) as manager:
        step = None if latest else manager.best_step()
        step = manager.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"{workdir} holds no finished checkpoint")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            manager.item_metadata(step)["state"],
            is_leaf=lambda x: hasattr(x, "shape"),
        )
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        state = manager.restore(step, args=arguments)["state"]
    found = state["average"] or {k: state[k] for k in ("params", "batch_stats")}
    _check_same(_shapes(found), _shapes(dict(like)), folder / str(step))
    return step, {k: found[k] for k in like}


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    # Named at the start, so that what a checkpoint holds can be asked before it is restored.
    return {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _check_same(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], path: pathlib.Path
) -> None:
    """Raises ValueError listing where a checkpoint's parameters are not those of the model."""
    lines = [
        f"  {name}: checkpoint {found.get(name, 'absent')}, model {wanted.get(name, 'absent')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if lines:
        raise ValueError(
            f"{path} was written by another model; {len(lines)} parameters differ:\n"
            + "\n".join(lines[:10])
            + "\nuse the config it was written with, or another workdir"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        "/".join(str(getattr(k, "key", k)) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
    }
