"""The keys of `config.data`: what they mean, their defaults and their check."""

import difflib
from collections.abc import Sequence
from typing import Any

import ml_collections


def default(**changes: Any) -> ml_collections.ConfigDict:
    """Returns `config.data` with defaults, and `changes` applied.

    Keys:
        dataset: Module in `dilaff_jax.data`, and the name it was prepared under if it has one:
            "shapes", "camvid", "image_folder/pets", "cityscapes".
        data_dir: Folder that `prepare` wrote to.
        train_split: "train", or several: "train+aug".
        eval_split: "validation", "test", ..., or "held_out".
        hold_out: Name prefixes (CamVid: sequences) that are left out of `train_split`; exactly
            they are evaluated with eval_split="held_out".
        resize: Factor applied to every image (by area) and label (nearest) when it is read, in
            training and in evaluation: 0.5 trains at half resolution, and evaluation then counts
            pixels at half resolution.
        crop_size: (height, width) of training crops.
        scale_range: Random scale, uniform between the two.
        base_size: If given, the shorter side is scaled to this × the random scale; by default the
            random scale is of the image's own size.
        cat_max_ratio: A crop in which one class has more than this share of the labelled pixels is
            drawn again, up to 10 times (mmsegmentation's option). 1.0 turns it off.
        flip: Probability of a horizontal flip.
        photometric: Random brightness, contrast, saturation and hue (SSD's, as in mmsegmentation).
        pad_rgb: What fills an image outside its content: the mean pixel. Labels get 255.
        eval_size: (height, width) that evaluation images are padded to, at the bottom and right;
            None takes the largest height and width in the split.
        workers: Worker processes. 0 reads in threads of this process.
        prefetch: Batches made ahead, by each worker.
        cache: Keep decoded images in memory, in each worker. Changes no result.

    Raises:
        ValueError: as `check`.
    """
    config = ml_collections.ConfigDict(
        {
            "dataset": "shapes",
            "data_dir": "data",
            "train_split": "train",
            "eval_split": "validation",
            "hold_out": (),
            "resize": 1.0,
            "crop_size": (128, 128),
            "scale_range": (0.5, 2.0),
            "base_size": ml_collections.config_dict.placeholder(int),
            "cat_max_ratio": 0.75,
            "flip": 0.5,
            "photometric": True,
            "pad_rgb": (124, 116, 104),  # the mean of ImageNet
            "eval_size": ml_collections.config_dict.placeholder(tuple),
            "workers": 0,
            "prefetch": 2,
            "cache": False,
        }
    )
    _known(changes, config)
    with config.ignore_type():  # `check` says more than a failed cast
        config.update(changes)
    check(config)
    return config


def _known(keys: Any, allowed: Any) -> None:
    for key in keys:
        if key not in allowed:
            close = difflib.get_close_matches(key, list(allowed), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"config.data has no key {key!r}{hint}; allowed: {', '.join(sorted(allowed))}"
            )


def check(config: Any) -> None:
    """Checks `config.data`.

    Raises:
        ValueError: an unknown or missing key, or a value out of range; the message names the key,
            the value and what is allowed.
    """
    _known(config, _CHECKS)
    for key, (allowed, wanted) in _CHECKS.items():
        if key not in config:
            raise ValueError(f"config.data lacks {key!r}; start from data.config.default()")
        try:
            fits = allowed(config[key])
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"config.data.{key}={config[key]!r}: want {wanted}")


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_size(value: Any) -> bool:
    return _is_sequence(value, 2) and all(_is_int(v, 1) for v in value)


def _is_sequence(value: Any, length: int | None = None) -> bool:
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    return fits and (length is None or len(value) == length)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_CHECKS = {
    "dataset": (_is_name, "the name of a data set, such as 'shapes' or 'image_folder/pets'"),
    "data_dir": (_is_name, "the folder that `prepare` wrote to"),
    "train_split": (_is_name, "the name of a split, or several joined by +"),
    "eval_split": (_is_name, "the name of a split, or 'held_out'"),
    "hold_out": (
        lambda v: _is_sequence(v) and all(map(_is_name, v)),
        "a tuple of name prefixes, such as ('0006R0',)",
    ),
    "resize": (lambda v: 0 < v <= 8, "a factor above 0, up to 8"),
    "crop_size": (_is_size, "(height, width) in pixels, such as (512, 512)"),
    "scale_range": (
        lambda v: _is_sequence(v, 2) and 0.01 <= v[0] <= v[1] <= 100,
        "(lowest, highest), such as (0.5, 2.0)",
    ),
    "base_size": (lambda v: v is None or _is_int(v, 1), "a number of pixels, or None"),
    "cat_max_ratio": (lambda v: 0 < v <= 1, "a share above 0, up to 1"),
    "flip": (lambda v: 0 <= v <= 1, "a probability, 0 to 1"),
    "photometric": (lambda v: isinstance(v, bool), "True or False"),
    "pad_rgb": (
        lambda v: _is_sequence(v, 3) and all(_is_int(c, 0) and c < 256 for c in v),
        "(red, green, blue), whole numbers 0 to 255",
    ),
    "eval_size": (lambda v: v is None or _is_size(v), "(height, width) in pixels, or None"),
    "workers": (lambda v: _is_int(v, 0), "a number of processes, 0 or more"),
    "prefetch": (lambda v: _is_int(v, 1), "a number of batches, 1 or more"),
    "cache": (lambda v: isinstance(v, bool), "True or False"),
}
