"""The keys of `config.ablate`: what they mean, their defaults and their check."""

from typing import Any

import ml_collections

# In the order in which they are reported. "refined" is "joint" and propagation, never trained.
ARMS = ("baseline", "joint", "refined", "aaf")
CRITERIA = ("miou", "miou+boundary_f", "smaller_gain")
RIVALS = ("dense_crf", "pamr")


def default() -> ml_collections.ConfigDict:
    """Every key of `config.ablate`.

    arms: which of `ARMS` are trained where they are not yet, evaluated and reported. baseline:
    no affinity loss, hence no head. joint: the config as it is. refined: the trained networks of
    joint, and propagation. aaf: the baseline with the Adaptive Affinity Fields loss of weight aaf.
    seeds: each arm is trained once with every one.

    selection_split: what operators, rivals and biases are chosen by; never reported. For CamVid
    "held_out", with `data.hold_out` naming sequences. report_split: what is reported. criterion:
    of the selection, one of `CRITERIA`, averaged over seeds: mIoU, the mean of mIoU and boundary
    F, or the smaller of their gains over doing nothing, which buys neither with the other.
    grid: {label: {option: values}} of propagation; every combination is a candidate, and so is
    doing nothing. The label is the operator's name for `propagate.operator`, unless the key name
    gives it. bias: "fitted" takes the one fitted to each run on the selection split, one a
    dilation; "fitted*0.5" half of it (the fitted one calibrates and smooths most; nearer to 0, more
    of the edges that the head sees are kept); a number is the same for all. rivals: {dense_crf:
    ..., pamr: ...} likewise; without a rival's entry it is left out. rival_images: they are
    selected on so many images, evenly spread; 0 for all.

    changes: {name: nested dict of changes to the config}; `--mode study` trains a network with
    each, beside baseline and joint.

    processes: for DenseCRF; 0 for one a core. resamples: of the bootstrap over images. pictures:
    how many of the best, of the median and of the worst images are drawn. repeats: of each timing.
    """
    return ml_collections.ConfigDict(
        {
            "arms": ARMS,
            "seeds": (0, 1, 2),
            "aaf": 1.0,
            "selection_split": "validation",
            "report_split": "test",
            "criterion": "miou",
            "grid": {
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
            "rivals": {
                "dense_crf": {
                    "steps": (5,),
                    "spatial_sigma": (1.0, 3.0),
                    "bilateral_sigma": (20.0, 80.0),
                    "color_sigma": (5.0, 13.0),
                    "bilateral_weight": (4.0, 10.0),
                },
                "pamr": {"steps": (1, 3, 10), "temperature": (0.1, 0.3)},
            },
            "rival_images": 0,
            "changes": {},
            "processes": 0,
            "resamples": 2000,
            "pictures": 2,
            "repeats": 7,
        }
    )


def check(config: ml_collections.ConfigDict) -> None:
    """Checks `config.ablate` against the whole config.

    Raises:
        ValueError: arms, seeds or splits that cannot be: above all, a selection split that is
            reported or trained on.
    """
    ablate = config.ablate
    _check_names("arms", ablate.arms, ARMS)
    if "refined" in ablate.arms and "joint" not in ablate.arms:
        raise ValueError("ablate.arms has 'refined', which are the networks of 'joint': name both")
    if {"joint", "refined"} & set(ablate.arms) and not config.loss.affinity:
        raise ValueError(
            "loss.affinity is 0, so that 'joint' would be the baseline; give its weight, or leave "
            "'joint' and 'refined' out of ablate.arms"
        )
    seeds = ablate.seeds
    if not seeds or len(set(seeds)) < len(seeds) or any(_is_no_seed(s) for s in seeds):
        raise ValueError(f"ablate.seeds are {seeds!r}; expected different whole numbers, (0, 1, 2)")
    if ablate.criterion not in CRITERIA:
        raise ValueError(
            f"ablate.criterion is {ablate.criterion!r}; allowed: {', '.join(CRITERIA)}"
        )
    _check_names("rivals", ablate.rivals, RIVALS)
    for key, low in (("rival_images", 0), ("processes", 0), ("resamples", 1), ("repeats", 1)):
        if ablate[key] < low:
            raise ValueError(f"ablate.{key} is {ablate[key]}; expected {low} or more")
    _check_splits(config)


def _check_splits(config: ml_collections.ConfigDict) -> None:
    """Three splits of which no two share an image."""
    splits = {
        "data.train_split": config.data.train_split,
        "ablate.selection_split": config.ablate.selection_split,
        "ablate.report_split": config.ablate.report_split,
    }
    parts = {key: set(split.split("+")) for key, split in splits.items()}
    keys = list(parts)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            shared = parts[one] & parts[other]
            if shared:
                raise ValueError(
                    f"{one} is {splits[one]!r} and {other} is {splits[other]!r}: both hold "
                    f"{', '.join(sorted(shared))!r}. What is trained on, selected by and reported "
                    "must be three splits; 'held_out' with data.hold_out takes one from training"
                )


def _check_names(key: str, found: Any, allowed: tuple[str, ...]) -> None:
    unknown = [name for name in found if name not in allowed]
    if unknown or (key == "arms" and not found):
        raise ValueError(f"ablate.{key} are {tuple(found)}; allowed: {', '.join(allowed)}")


def _is_no_seed(seed: Any) -> bool:
    return not isinstance(seed, int) or isinstance(seed, bool) or seed < 0
