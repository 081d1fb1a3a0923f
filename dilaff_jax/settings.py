"""All keys of a config, and the check of one before it costs anything.

A section's keys are in a table `KEYS` beside what uses them; `SECTIONS` has them all. The keys of
`config.refine` are the arguments of the operator that it names, see `propagate.operator`; those of
`config.ablate` are in `ablation.ablate_config`, and only configs that ablate have them.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from dilaff_jax import eval_step, initialise, metrics, objective, optim, schema
from dilaff_jax.data import data_config
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter, test_time
from dilaff_jax.runtime import parallel, trackers
from dilaff_jax.schema import Key, Rule

# Figures that evaluations of volumes alone have.
OF_VOLUMES = ("dice", "surface_dice")
_FIGURES = (
    *("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"),
    *("boundary_iou", "boundary_f", "affinity/mean/average_precision", "affinity/mean/f1"),
    *OF_VOLUMES,
)

RUN: schema.Section = {
    "seed": Key(0, schema.WHOLE, "Seed of the weights, of dropout and of the order of the images."),
    "num_steps": Key(10_000, schema.COUNT, "Steps of the whole run."),
    "batch_size": Key(
        16,
        schema.COUNT,
        "Images in a step, over all devices and processes together; a multiple of the devices.",
    ),
    "log_every": Key(
        50,
        schema.COUNT,
        "Steps between lines of `metrics.jsonl`. The last step has a line, an evaluation and a "
        "checkpoint.",
    ),
    "eval_every": Key(1000, schema.COUNT, "Steps between evaluations."),
    "patience": Key(
        0,
        schema.WHOLE,
        "Evaluations in a row without a better `best_metric` after which training ends; 0: it goes "
        "on to `num_steps`.",
    ),
    "checkpoint_every": Key(1000, schema.COUNT, "Steps between checkpoints."),
    "best_metric": Key(
        "miou",
        Rule(
            f"one of {', '.join(_FIGURES)}, or iou/CLASS",
            lambda v: (
                isinstance(v, str) and (v in _FIGURES or v.startswith(("iou/", "trimap_miou/")))
            ),
        ),
        "What marks the best checkpoint, of the refined result where there is a head.",
    ),
    "keep_latest": Key(
        2,
        schema.at_least(1, "1 or more"),
        "How many of the latest checkpoints are kept beside the best.",
    ),
    "resume_changed": Key(
        False,
        schema.SWITCH,
        "Go on in a workdir whose run began with other settings or other training data, which are "
        "named; otherwise that is refused.",
    ),
    "profile_steps": Key(
        (),
        Rule(
            "(first, last) step, or () for none",
            lambda v: (
                schema.is_sequence(v, 0)
                or (
                    schema.is_sequence(v, 2)
                    and all(schema.is_whole(x, 1) for x in v)
                    and v[0] <= v[1]
                )
            ),
        ),
        "(first, last) step that is profiled to `workdir/profile`; `()` for none.",
    ),
}
SECTIONS: Mapping[str, schema.Section] = {
    "data": data_config.KEYS,
    "model": segmenter.KEYS,
    "loss": objective.KEYS,
    "optim": optim.KEYS,
    "init": initialise.KEYS,
    "inference": test_time.KEYS,
    "eval": eval_step.KEYS,
    "parallel": parallel.KEYS,
    "reporting": trackers.KEYS,
}
# Checked where they are used.
_OTHERS = ("refine", "ablate")


def default_config() -> ml_collections.ConfigDict:
    """Every key of `RUN` and `SECTIONS` at its default, and the default refinement."""
    config = schema.defaults(RUN)
    for name, section in SECTIONS.items():
        config[name] = schema.defaults(section)
    # The refinement that is evaluated beside the plain segmentation: `propagate.operator`.
    config.refine = ml_collections.ConfigDict({"name": "signed", "steps": 5, "strength": 0.1})
    return config


def check(config: Mapping[str, Any]) -> None:
    """Checks keys and values of a config.

    Raises:
        UserError: a key that is missing or unknown, or a value that its rule does not allow; the
            message names the key, what was found and what is expected.
    """
    schema.check_keys(config, [*RUN, *SECTIONS, *_OTHERS], "config")
    schema.check({k: v for k, v in config.items() if k in RUN}, RUN, "config")
    for name, section in SECTIONS.items():
        if not schema.is_mapping(config.get(name)):
            raise UserError(f"config.{name} is {config.get(name)!r}; start from configs/default.py")
        schema.check(config[name], section, f"config.{name}")
    if (
        config["best_metric"].startswith(("boundary", "trimap", *OF_VOLUMES))
        and not config["eval"]["boundaries"]
    ):
        raise UserError(
            f"config.best_metric is {config['best_metric']!r}, and config.eval.boundaries is "
            "False; set it to True, or choose another metric"
        )


def check_best_metric(name: str, class_names: Sequence[str], model: segmenter.Segmenter) -> None:
    """Raises UserError for a figure that no evaluation of this model has."""
    kind, separator, which = name.partition("/")
    if kind != "affinity" and not model.segmentation:
        raise UserError(
            f"config.best_metric is {name!r}, and model.segmentation is None; an affinity network "
            "by itself has 'affinity/mean/average_precision' and 'affinity/mean/f1'"
        )
    if kind == "affinity":
        if model.offsets is None:
            raise UserError(
                f"config.best_metric is {name!r}, and the model has no affinity head; use 'miou', "
                "or give it one (model.affinity, loss.affinity)"
            )
        return
    if name in OF_VOLUMES and model.encoder.style.ndim != 3:
        raise UserError(
            f"config.best_metric is {name!r}, which is of volumes, and this data set holds images; "
            "use 'miou' or 'boundary_f'"
        )
    allowed = {"iou": list(class_names), "trimap_miou": [f"{w:g}" for w in metrics.WIDTHS]}
    if separator and which not in allowed[kind]:
        near = difflib.get_close_matches(which, allowed[kind], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"config.best_metric is {name!r}{hint}; expected {kind}/ and one of "
            f"{', '.join(allowed[kind])}"
        )
