"""Whether a workdir's run is the one that is asked for: same settings, same training data.

A run that went on with other settings would leave a record (config.json, classes.json) of something
that never ran, and weights that nobody can make again.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from dilaff_jax import schema, settings
from dilaff_jax.data import datasets
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import checkpoint, files

# Parts of a config that do not decide which weights a run ends with.
FREE = (
    *("ablate", "eval", "inference", "refine", "parallel", "profile_steps", "best_metric"),
    "reporting",
    *("keep_latest", "log_every", "eval_every", "checkpoint_every", "resume_changed"),
    "patience",
    *("data.data_dir", "data.eval_split", "data.eval_size"),
    *("data.workers", "data.prefetch", "data.cache"),
)
# Sections of a config that decide which weights a run ends with.
_DECIDING = ("data", "model", "loss", "optim", "init")
# These decide nothing either where no loss trains an affinity head.
OF_THE_HEAD = (
    *("model.affinity", "loss.affinity_loss", "loss.affinity_options"),
    *("loss.affinity_class_weights", "loss.affinity_schedule", "loss.soft_targets"),
)
_DATA_FILE = "train_data.json"


def differences(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[str]:
    """A line for each setting that decides weights and is not what `workdir` was trained with.

    None where `workdir` holds no config.json.
    """
    path = workdir / "config.json"
    if not path.exists():
        return []
    try:
        trained = deciding(json.loads(path.read_text()))
    except (ValueError, AttributeError) as e:
        logging.warning("%s is damaged (%s); what was trained there cannot be compared", path, e)
        return []
    wanted = deciding(as_json(config))
    # What a run was trained before was at its default then: every option defaults to what was.
    defaults = _defaults()
    trained |= {k: defaults[k] for k in wanted.keys() & defaults.keys() - trained.keys()}
    unknown = sorted(wanted.keys() - trained.keys())
    if unknown:
        logging.warning(
            "%s was trained before there was %s; taken to be as in this config", path, unknown
        )
    differing = [k for k in sorted(trained) if k in wanted and trained[k] != wanted[k]]
    differing += sorted(trained.keys() - wanted.keys())
    return [
        f"{k}: found {trained[k]!r}, wanted {wanted.get(k, 'no such key')!r}" for k in differing
    ]


def data_differences(source: datasets.Source, workdir: pathlib.Path) -> list[str]:
    """A line where `workdir` was trained on other examples than those of `source`.

    None where `workdir` holds no record of them.
    """
    path = workdir / _DATA_FILE
    if not path.exists():
        return []
    try:
        trained = json.loads(path.read_text())
    except ValueError as e:
        logging.warning("%s is damaged (%s); the training data cannot be compared", path, e)
        return []
    now = _examples(source)
    if trained == now:
        return []
    if trained.get("examples") != now["examples"]:
        found, wanted = (f"{x.get('examples')} examples" for x in (trained, now))
    else:
        found, wanted = "other names, sizes or labels", f"the {now['examples']} examples there"
    return [f"training data ({source.title}): found {found}, wanted {wanted}"]


def check(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, source: datasets.Source
) -> list[str]:
    """What differs between the run in `workdir` and `config`, where `config.resume_changed`.

    Nothing where `workdir` has no checkpoint to go on from.

    Raises:
        UserError: something differs, and config.resume_changed is False.
    """
    if checkpoint.latest_step(workdir) is None:
        return []
    lines = [*differences(config, workdir), *data_differences(source, workdir)]
    if lines and not config.resume_changed:
        raise UserError(
            f"{workdir} holds a run with another config or other data:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nuse what it was trained with, or another workdir (config.init.workdir takes over "
            "its weights); config.resume_changed=True goes on here all the same"
        )
    return lines


def record_data(source: datasets.Source, workdir: pathlib.Path) -> None:
    """Writes what identifies the training data, for `data_differences`; one process does."""
    if jax.process_index() == 0:
        files.write_text(workdir / _DATA_FILE, json.dumps(_examples(source), indent=1) + "\n")


def as_json(config: ml_collections.ConfigDict) -> Any:
    """The config as config.json holds it."""
    return json.loads(config.to_json_best_effort())


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of a config.json, without what does not decide a run's weights."""
    flat = _flat(config)
    loss = config.get("loss", {})
    headless = not loss.get("affinity") and not loss.get("refined")
    # Training through the propagation makes its operator part of the training.
    free = [k for k in FREE if not (k == "refine" and loss.get("refined"))]
    free += OF_THE_HEAD if headless else ()
    return {k: v for k, v in flat.items() if not any(k == f or k.startswith(f + ".") for f in free)}


def _examples(source: datasets.Source) -> dict[str, Any]:
    """Number and digest of the examples: names, sizes, pixels of each class in the whole split."""
    pixels = None if source.class_pixels is None else np.asarray(source.class_pixels).tolist()
    content = [list(source.names), np.asarray(source.sizes).tolist(), pixels]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"examples": len(source), "classes": list(source.class_names), "digest": digest}


def _defaults() -> dict[str, Any]:
    """{dotted key: default} of the parts that decide a run's weights, as `deciding` has them."""
    parts = {name: schema.defaults(settings.SECTIONS[name]) for name in _DECIDING}
    return _flat(as_json(ml_collections.ConfigDict(parts)))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    parts = ((f"{prefix}.{k}" if prefix else k, v) for k, v in tree.items())
    return {k: v for name, value in parts for k, v in _flat(value, name).items()}
