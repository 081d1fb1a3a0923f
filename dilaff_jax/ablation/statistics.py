"""Mean ± std over seeds; paired differences, with intervals over seeds and over images.

Two intervals, which answer two questions. Over seeds (Student's t, paired): would other trainings
show the difference? It needs two seeds or more. Over images (bootstrap, seeds held fixed): would
other images show the difference between *these* networks? It says nothing of other trainings, and
is all there is with one seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

LEVEL = 0.95


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values by seed, mean and (n - 1) standard deviation, which one seed has not."""
    x = np.asarray(values, np.float64)
    return {
        "values": x.tolist(),
        "mean": float(x.mean()),
        "std": float(x.std(ddof=1)) if len(x) > 1 else None,
    }


def seed_interval(differences: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean paired difference over seeds, d̄ ± t·s/√n; None with one seed."""
    d = np.asarray(differences, np.float64)
    if len(d) < 2:
        return None
    half = half_width(float(d.std(ddof=1)), len(d))
    return [float(d.mean() - half), float(d.mean() + half)]


def half_width(std: float, seeds: int) -> float:
    """Half of the 95 % interval of a mean over so many seeds whose values scatter by `std`."""
    return float(scipy.stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * std / np.sqrt(seeds))


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two of `spread`'s results, seed by seed, with its interval over seeds."""
    differences = [a - b for a, b in zip(one["values"], other["values"], strict=True)]
    return spread(differences) | {"over_seeds": seed_interval(differences)}


def draws(images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each image is drawn when as many are drawn as there are, `[R, N]`."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples)


def image_interval(differences: np.ndarray) -> list[float] | None:
    """95 % percentile interval of what `draws` gave, `[seeds, R]`, averaged over seeds."""
    mean = np.asarray(differences).mean(axis=0)
    known = mean[~np.isnan(mean)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
