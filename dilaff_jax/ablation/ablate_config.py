"""The keys of `config.ablate`: what they mean, their defaults and their check."""

import copy
from typing import Any

import ml_collections

from dilaff_jax import schema
from dilaff_jax.errors import UserError
from dilaff_jax.schema import Key, Rule

# In the order in which they are reported. "refined" is "joint" and propagation, never trained.
ARMS = ("baseline", "joint", "refined", "aaf")
CRITERIA = ("miou", "boundary_f", "trimap_miou", "miou+boundary_f", "smaller_gain")
RIVALS = ("dense_crf", "pamr")


_NAMES = Rule("a tuple of names", lambda v: schema.is_sequence(v) and all(map(schema.is_name, v)))

KEYS: schema.Section = {
    "arms": Key(
        ARMS,
        _NAMES,
        "Which are trained where they are not yet, evaluated and reported: `baseline` (no affinity "
        "loss, hence no head), `joint` (the config as it is), `refined` (the networks of joint, "
        "and propagation), `aaf` (the baseline with the Adaptive Affinity Fields loss).",
    ),
    "seeds": Key(
        (0, 1, 2),
        Rule(
            "different whole numbers, (0, 1, 2)",
            lambda v: (
                schema.is_sequence(v)
                and bool(v)
                and len(set(v)) == len(v)
                and all(schema.is_whole(x, 0) for x in v)
            ),
        ),
        "Each arm is trained once with every one.",
    ),
    "aaf": Key(1.0, schema.FROM_0, "Weight of the AAF loss in its arm."),
    "selection_split": Key(
        "validation",
        schema.NAME,
        "What operators, rivals and biases are chosen by; never reported. For CamVid `held_out`, "
        "with `data.hold_out` naming sequences.",
    ),
    "report_split": Key("test", schema.NAME, "What is reported."),
    "criterion": Key(
        "miou",
        schema.choice(*CRITERIA),
        "Of the selection, averaged over seeds: `miou`, `boundary_f`, `trimap_miou` (within 8 "
        "pixels of true boundaries), `miou+boundary_f` (the mean of both) or `smaller_gain` "
        "(the smaller of both gains over doing nothing, which buys neither with the other).",
    ),
    # The bias that was fitted calibrates and smooths most; nearer to 0, more of the edges that the
    # head predicts are kept.
    "grid": Key(
        {
            "random_walk": {
                "steps": (1, 3, 5),
                "sharpness": (1.0, 4.0, 8.0),
                "restart": (0.0, 0.3),
                "bias": ("fitted", "fitted*0.5", 0.0),
            },
            "signed": {
                "steps": (3, 5, 10),
                "strength": (0.05, 0.1, 0.2, 0.3),
                "bias": ("fitted", "fitted*0.5", "fitted*0.25", 0.0),
            },
            "signed_weak_repulsion": {
                "name": "signed",
                "steps": (5,),
                "strength": (0.1, 0.2, 0.4),
                "bias": ("fitted*0.25", 0.0),
                "repulsion": (0.0, 0.25, 0.5),
            },
        },
        schema.OPTIONS,
        "{label: {option: values}} of propagation; every combination is a candidate, and so is "
        "doing nothing. The label is the operator's name for `propagate.operator`, unless the key "
        "`name` gives it. `bias`: `fitted` is the one fitted to each run on the selection split, "
        "one a dilation; `fitted*0.5` half of it; a number is the same for all. {}: nothing is "
        "selected, and `--mode study` compares evaluations on `report_split`.",
    ),
    "rivals": Key(
        {
            "dense_crf": {
                "steps": (5,),
                "spatial_sigma": (1.0, 3.0),
                "bilateral_sigma": (20.0, 80.0),
                "color_sigma": (5.0, 13.0),
                "bilateral_weight": (4.0, 10.0),
            },
            "pamr": {"steps": (1, 3, 10), "temperature": (0.1, 0.3)},
        },
        schema.OPTIONS,
        "The same for `dense_crf` and `pamr`; without an entry a rival is left out.",
    ),
    "rival_images": Key(
        0,
        schema.WHOLE,
        "Rivals are selected on so many images, evenly spread; 0: all.",
    ),
    "changes": Key(
        {},
        schema.OPTIONS,
        "{name: nested dict of changes to the config}; `--mode study` trains a network with each, "
        "beside baseline and joint.",
    ),
    "processes": Key(0, schema.WHOLE, "For DenseCRF; 0: one a core."),
    "resamples": Key(2000, schema.COUNT, "Of the bootstrap over images."),
    "pictures": Key(2, schema.WHOLE, "How many of the best, median and worst images are drawn."),
    "repeats": Key(7, schema.COUNT, "Of each timing."),
}


def default() -> ml_collections.ConfigDict:
    """Every key of `config.ablate` at its default, see `KEYS`."""
    return schema.defaults(KEYS)


def check_images(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a run of volumes, which pictures and rivals are not made for."""
    if config.model.get("ndim", 2) != 2:
        raise UserError(
            f"{config.data.dataset} holds volumes, and an ablation with rivals and pictures is of "
            "images; --mode study with config.ablate.grid={} compares networks by their "
            "evaluations, --mode fit chooses an operator for one"
        )


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config, with the defaults as `config.ablate` where it has none."""
    if "ablate" in config:
        return config
    result = copy.deepcopy(config)
    with result.unlocked():
        result.ablate = default()
    return result


def check(config: ml_collections.ConfigDict) -> None:
    """Checks `config.ablate` against the whole config.

    Raises:
        UserError: arms, seeds or splits that cannot be: above all, a selection split that is
            reported or trained on.
    """
    ablate = config.ablate
    schema.check(ablate, KEYS, "config.ablate")
    if config.model.get("segmentation", {}) is None:
        raise UserError(
            "model.segmentation is None: an ablation compares segmentations, and this network has "
            "none of its own; --mode refine --truth says what it adds to another network's"
        )
    _check_names("arms", ablate.arms, ARMS)
    if "refined" in ablate.arms and "joint" not in ablate.arms:
        raise UserError("ablate.arms has 'refined', which are the networks of 'joint': name both")
    if {"joint", "refined"} & set(ablate.arms) and not config.loss.affinity:
        raise UserError(
            "loss.affinity is 0, so that 'joint' would be the baseline; give its weight, or leave "
            "'joint' and 'refined' out of ablate.arms"
        )
    _check_names("rivals", ablate.rivals, RIVALS)
    _check_splits(config)


def _check_splits(config: ml_collections.ConfigDict) -> None:
    """Three splits of which no two share an image."""
    splits = {
        "data.train_split": config.data.train_split,
        "ablate.selection_split": config.ablate.selection_split,
        "ablate.report_split": config.ablate.report_split,
    }
    if not config.ablate.grid:
        del splits["ablate.selection_split"]
    parts = {key: set(split.split("+")) for key, split in splits.items()}
    keys = list(parts)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            shared = parts[one] & parts[other]
            if shared:
                raise UserError(
                    f"{one} is {splits[one]!r} and {other} is {splits[other]!r}: both hold "
                    f"{', '.join(sorted(shared))!r}. What is trained on, selected by and reported "
                    "must be three splits; 'held_out' with data.hold_out takes one from training"
                )


def _check_names(key: str, given: Any, allowed: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in allowed]
    if unknown or (key == "arms" and not given):
        raise UserError(f"ablate.{key} are {tuple(given)}; allowed: {', '.join(allowed)}")
