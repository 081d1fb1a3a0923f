"""The check of what a run is told, before it costs anything: every key of a config, one a line.

`config.data`, `config.model` and `config.ablate` have checks of their own, and so have the names
of optimisers, losses and operators, where they are looked up.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ml_collections

from dilaff_jax.models import options

# What is wanted, and the test of a value.
Rule: TypeAlias = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _is_whole(value: Any, low: int) -> bool:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= low


def _is_tuple(value: Any, length: int | None = None) -> bool:
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    return fits and (length is None or len(value) == length)


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping | ml_collections.ConfigDict)


_FIGURES = (
    *("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"),
    *("boundary_iou", "boundary_f"),
)
_COUNT: Rule = ("a whole number above 0", lambda v: _is_whole(v, 1))
_WHOLE: Rule = ("a whole number, 0 or more", lambda v: _is_whole(v, 0))
_ABOVE_0: Rule = ("a number above 0", lambda v: _is_number(v) and v > 0)
_FROM_0: Rule = ("0 or more", lambda v: _is_number(v) and v >= 0)
_SHARE: Rule = ("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1)
_UP_TO_1: Rule = ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_SWITCH: Rule = ("True or False", lambda v: isinstance(v, bool))
_TEXT: Rule = ("a text, '' for none", lambda v: isinstance(v, str))
_NAME: Rule = ("a name", lambda v: isinstance(v, str) and bool(v))
_OPTIONS: Rule = ("a dict of options", lambda v: _is_dict(v))
_WEIGHTS: Rule = (
    "a tuple of numbers, 0 or more, one for each class; () for none",
    lambda v: _is_tuple(v) and all(_is_number(x) and x >= 0 for x in v),
)
_PATTERNS: Rule = (
    "a tuple of patterns, such as ('fc.*',)",
    lambda v: _is_tuple(v) and all(isinstance(x, str) for x in v),
)

_TOP: dict[str, Rule] = {
    "seed": _WHOLE,
    "num_steps": _COUNT,
    "batch_size": _COUNT,
    "log_every": _COUNT,
    "eval_every": _COUNT,
    "checkpoint_every": _COUNT,
    "keep_latest": ("1 or more", lambda v: _is_whole(v, 1)),
    "best_metric": (
        f"one of {', '.join(_FIGURES)}, or iou/CLASS",
        lambda v: isinstance(v, str) and (v in _FIGURES or v.startswith(("iou/", "trimap_miou/"))),
    ),
    "profile_steps": (
        "(first, last) step, or () for none",
        lambda v: (
            _is_tuple(v, 0)
            or (_is_tuple(v, 2) and all(_is_whole(x, 1) for x in v) and v[0] <= v[1])
        ),
    ),
}
_PARTS: dict[str, dict[str, Rule]] = {
    "loss": {
        "segmentation": _NAME,
        "segmentation_options": _OPTIONS,
        "auxiliary": _FROM_0,
        "affinity": _FROM_0,
        "affinity_loss": _NAME,
        "affinity_options": _OPTIONS,
        "affinity_class_weights": _WEIGHTS,
        "soft_targets": _SWITCH,
        "aaf": _FROM_0,
        "refined": _FROM_0,
    },
    "optim": {
        "name": _NAME,
        "learning_rate": _FROM_0,
        "schedule": _NAME,
        "power": _ABOVE_0,
        "end": _UP_TO_1,
        "warmup_steps": _WHOLE,
        "momentum": _SHARE,
        "nesterov": _SWITCH,
        "b1": _SHARE,
        "b2": _SHARE,
        "weight_decay": _FROM_0,
        "head_multiplier": _FROM_0,
        "clip_norm": _FROM_0,
        "accumulate": _COUNT,
        "ema": _SHARE,
    },
    "inference": {
        "window": (
            "(height, width) or None",
            lambda v: v is None or (_is_tuple(v, 2) and all(_is_whole(x, 1) for x in v)),
        ),
        "stride": ("a share in (0, 1]", lambda v: _is_number(v) and 0 < v <= 1),
        "scales": (
            "positive numbers, 1 among them",
            # Affinities at another scale belong to other neighbours: they come from scale 1 alone.
            lambda v: _is_tuple(v) and all(_is_number(x) and x > 0 for x in v) and 1.0 in v,
        ),
        "flip": _SWITCH,
    },
    "eval": {
        "batch_size": _COUNT,
        "boundaries": _SWITCH,
        "tolerance": _FROM_0,
        "pictures": _WHOLE,
        "predictions": _SWITCH,
    },
    "init": {
        "workdir": _TEXT,
        "model": _TEXT,
        "encoder": _TEXT,
        "entry": _TEXT,
        "folded": _SWITCH,
        "drop": _PATTERNS,
        "keep": _PATTERNS,
    },
    "parallel": {
        "mode": _NAME,
        "devices": _WHOLE,
        "coordinator": _TEXT,
        "num_processes": _WHOLE,
        "process_id": ("-1 for none, or 0 and more", lambda v: _is_whole(v, -1)),
        "heartbeat": _COUNT,
    },
}
# With checks of their own; the keys of `refine` are the arguments of the operator that it names.
_OTHERS = ("data", "model", "ablate", "refine")


def check(config: Mapping[str, Any]) -> None:
    """Checks keys and values of a config.

    Raises:
        ValueError: a key that is missing or unknown, or a value of another type or out of range;
            the message names the key, what was found and what is expected.
    """
    options.check_keys(config, [*_TOP, *_PARTS, *_OTHERS], "config")
    _check(config, _TOP, "config")
    for part, rules in _PARTS.items():
        where = f"config.{part}"
        if not _is_dict(config.get(part)):
            raise ValueError(f"{where} is {config.get(part)!r}; start from configs/default.py")
        options.check_keys(config[part], list(rules), where)
        _check(config[part], rules, where)
    if (
        config["best_metric"].startswith(("boundary", "trimap"))
        and not config["eval"]["boundaries"]
    ):
        raise ValueError(
            f"config.best_metric is {config['best_metric']!r}, and config.eval.boundaries is "
            "False; set it to True, or choose another metric"
        )


def _check(config: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    for key, (wanted, fits) in rules.items():
        if key not in config:
            raise ValueError(f"{where} lacks {key!r}; start from configs/default.py")
        if not fits(config[key]):
            raise ValueError(f"{where}.{key} is {config[key]!r}; expected {wanted}")
