"""Where a run's numbers and pictures go beside metrics.jsonl: TensorBoard, W&B, MLflow.

A run that is resumed goes on in the same run of a tracker: WORKDIR/trackers.json knows its name
there.
"""

import functools
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from absl import logging

from dilaff_jax import schema
from dilaff_jax.errors import MissingPackageError, UserError
from dilaff_jax.runtime import files
from dilaff_jax.schema import Key, Rule

_FILE = "trackers.json"
# MLflow's limits: of a parameter's value, and of parameters that it takes at a time.
_LONGEST, _AT_ONCE = 6000, 100


class Tracker(Protocol):
    """Something that takes numbers and pictures."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers by name."""

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Takes RGB uint8 pictures `[H, W, 3]` by name."""

    def close(self) -> None:
        """Ends."""


class TensorBoard:
    """Events in WORKDIR/tensorboard.

    Args:
        workdir: of the run.
        step: at which the run goes on; later events are hidden.
    """

    def __init__(self, workdir: pathlib.Path, step: int, *_: Any) -> None:
        import tensorboardX  # here, because it imports torch where that is installed

        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds pictures."""
        for name, picture in pictures.items():
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the file."""
        self._board.close()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in WORKDIR/wandb.

    Args:
        workdir: of the run.
        step: at which the run goes on. What was logged after it, and lost, stays there.
        options: `config.reporting`.
        config: of the run, which W&B shows beside it.

    Raises:
        MissingPackageError: the package is not installed.
        UserError: it cannot begin, as without a login.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        options: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._library = wandb
        try:
            self._run = wandb.init(
                project=options["project"],
                name=options["name"] or None,
                id=_identity(workdir, "wandb", lambda: secrets.token_hex(8)),
                resume="allow",
                dir=workdir,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases does not begin: {error}; `wandb login` once, or set "
                "WANDB_MODE=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers."""
        self._run.log({"step": step, **values})

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Logs pictures."""
        made = {name: self._library.Image(picture) for name, picture in pictures.items()}
        self._run.log({"step": step, **made})

    def close(self) -> None:
        """Waits until all is sent, or kept."""
        self._run.finish()


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, else in WORKDIR/mlflow.db and WORKDIR/mlartifacts.

    A server that does not answer costs what was to be logged, which a warning says, and not the
    training.

    Args:
        workdir: of the run.
        step: at which the run goes on.
        options: `config.reporting`.
        config: of the run, its parameters there.

    Raises:
        MissingPackageError: the package is not installed.
        UserError: it cannot begin, as without an answer of the server.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        options: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        try:
            import mlflow
            from mlflow import entities
        except ImportError as error:
            raise _missing("mlflow") from error
        self._entities, self._error = entities, mlflow.exceptions.MlflowException
        given, here = os.environ.get("MLFLOW_TRACKING_URI"), workdir.resolve()
        address = given or f"sqlite:///{here / 'mlflow.db'}"
        self._artifacts = None if given else (here / "mlartifacts").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=address)
        try:
            self._run = _identity(workdir, "mlflow", lambda: self._new(options))
            self._client.update_run(self._run, status="RUNNING")
            self._parameters(config)
        except self._error as error:
            raise UserError(f"MLflow at {address} does not begin: {error}") from error

    def _new(self, options: Mapping[str, Any]) -> str:
        found = self._client.get_experiment_by_name(options["project"])
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(options["project"], self._artifacts)
        )
        return self._client.create_run(experiment, run_name=options["name"] or None).info.run_id

    def _parameters(self, config: Mapping[str, Any]) -> None:
        """The config, a parameter a key; those that are there stay, as MLflow wants."""
        known = self._client.get_run(self._run).data.params
        made = [
            self._entities.Param(key, str(value)[:_LONGEST])
            for key, value in _flat(config)
            if key not in known
        ]
        for first in range(0, len(made), _AT_ONCE):
            self._client.log_batch(self._run, params=made[first : first + _AT_ONCE])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers."""
        metric = self._entities.Metric
        made = [metric(_allowed(name), float(v), 0, step) for name, v in values.items()]
        self._try(lambda: self._client.log_batch(self._run, metrics=made))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Keeps pictures as artifacts, NAME/STEP.png."""
        for name, picture in pictures.items():
            file = f"{_allowed(name)}/{step}.png"
            self._try(functools.partial(self._client.log_image, self._run, picture, file))

    def close(self) -> None:
        """Says that the run has ended."""
        self._try(lambda: self._client.set_terminated(self._run))

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except self._error as error:
            logging.warning("MLflow did not take what was to be logged: %s", error)


_KINDS: Mapping[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}

# `config.reporting`.
KEYS: schema.Section = {
    "writers": Key(
        ("tensorboard",),
        Rule(
            f"some of {', '.join(_KINDS)}",
            lambda v: schema.is_sequence(v) and set(v) <= _KINDS.keys() and len(set(v)) == len(v),
        ),
        "Where numbers and pictures go beside `metrics.jsonl`: `tensorboard`, `wandb` (extra "
        "`wandb`), `mlflow` (extra `mlflow`).",
    ),
    "project": Key(
        "dilaff",
        Rule("a name", lambda v: isinstance(v, str) and bool(v)),
        "Of W&B, or experiment of MLflow.",
    ),
    "name": Key(
        "", Rule("text", lambda v: isinstance(v, str)), "Of the run there; empty: they choose."
    ),
}


def begin(
    workdir: pathlib.Path, step: int, options: Mapping[str, Any], config: Mapping[str, Any]
) -> list[Tracker]:
    """Begins, or goes on with, what `options`, `config.reporting`, names."""
    return [_KINDS[name](workdir, step, options, config) for name in options["writers"]]


def _missing(extra: str) -> MissingPackageError:
    return MissingPackageError(
        f"config.reporting.writers names {extra}, which is not installed: "
        f"pip install 'dilaff-jax[{extra}]'"
    )


def _identity(workdir: pathlib.Path, tracker: str, new: Callable[[], str]) -> str:
    """The name of the run in a tracker; a new one, noted, where there is none."""
    path = workdir / _FILE
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        found = known.get(tracker)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: {error}; remove it, and new runs begin there"
        ) from error
    if found is None:
        found = new()
        files.write_text(path, json.dumps({**known, tracker: found}) + "\n")
    return str(found)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _allowed(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)
