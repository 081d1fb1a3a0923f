"""Region mutual information against its formula in float64 and in loops, and what it is made for."""

import itertools

import jax
import numpy as np
import pytest

from dilaff_jax import losses

CLASSES = 3
ALPHA = 5e-4


def scene(shape=(2, 17, 20), ignored=0.1, sure=2.0, seed=0):
    """Labels with insides and borders, and logits that know them, more or less."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, CLASSES, (shape[0], *(-(-n // 4) for n in shape[1:])))
    coarse[1:][coarse[1:] == 2] = 0  # the second image lacks a class
    labels = coarse
    for axis in range(1, len(shape)):
        labels = labels.repeat(4, axis)
    labels = labels[tuple(slice(n) for n in shape)].astype(np.uint8)
    logits = sure * (2 * np.eye(CLASSES)[labels] - 1) + rng.normal(size=(*shape, CLASSES))
    labels[rng.random(shape) < ignored] = 255
    return logits.astype(np.float32), labels


def pooled(x, pool):
    """Means over windows with zeros around, of one map."""
    reach = pool // 2
    padded = np.pad(x, reach)
    sides = [(n + 2 * reach - pool) // pool + 1 for n in x.shape]
    out = np.zeros(sides)
    for at in np.ndindex(*sides):
        out[at] = padded[tuple(slice(pool * i, pool * i + pool) for i in at)].mean()
    return out


def regions(x, radius):
    """A column a place: the region that begins there."""
    places = itertools.product(*(range(n - radius + 1) for n in x.shape))
    columns = [x[tuple(slice(i, i + radius) for i in at)].ravel() for at in places]
    found = np.array(columns).T
    return found - found.mean(axis=1, keepdims=True)


def expected_of(logits, labels, weight, radius, pool):
    """Of one image, as the paper has it: with an inverse and a difference of covariances."""
    logits, valid = logits.astype(np.float64), labels != 255
    probs = 1 / (1 + np.exp(-logits))
    binary = unknown = 0.0
    for c in range(CLASSES):
        truth, p = (labels == c).astype(float), probs[..., c]
        binary -= (np.log(np.where(labels == c, p, 1 - p)) * valid).sum() / valid.sum()
        if not truth.any():
            continue
        y = regions(pooled(truth, pool), radius)
        p = regions(pooled(np.where(valid, p, 0) + 1e-6, pool), radius)
        little = ALPHA * np.eye(len(y))
        m = y @ y.T - y @ p.T @ np.linalg.inv(p @ p.T + little) @ (p @ y.T) + little
        unknown += 0.5 * np.linalg.slogdet(m)[1] / len(y)
    return weight * binary + (1 - weight) * unknown


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 17, 20), {}),
        ((2, 17, 20), {"weight": 0.2, "radius": 2, "pool": 1}),
        ((2, 16, 12), {"weight": 0.0, "radius": 1}),
        ((2, 12, 13), {"weight": 1.0}),
        ((2, 11, 12, 13), {"radius": 2}),
    ],
)
def test_it_equals_the_formula_in_loops(shape, options):
    logits, labels = scene(shape)
    found = losses.region_mutual_information(logits, labels, **options)
    full = {"weight": 0.5, "radius": 3, "pool": 3} | options
    expected = sum(expected_of(x, y, **full) for x, y in zip(logits, labels, strict=True))
    assert found.count == 2
    assert float(found.sum) == pytest.approx(expected, rel=1e-4)


def test_its_gradient_is_the_slope_of_the_formula():
    logits, labels = scene()
    gradient = jax.grad(lambda x: losses.region_mutual_information(x, labels).sum)(logits)
    rng, options = np.random.default_rng(1), (0.5, 3, 3)
    for _ in range(20):
        image, *at = (int(rng.integers(n)) for n in logits.shape)
        moved = [logits[image].astype(np.float64) for _ in range(2)]
        for maps, by in zip(moved, (1e-4, -1e-4), strict=True):
            maps[tuple(at)] += by
        up, down = (expected_of(maps, labels[image], *options) for maps in moved)
        assert float(gradient[(image, *at)]) == pytest.approx(
            (up - down) / 2e-4, rel=1e-3, abs=1e-6
        )


@pytest.mark.parametrize("sure", [5.0, 50.0, 500.0])
def test_it_stays_finite_where_nothing_is_left_to_learn(sure):
    """There a difference of covariances is below 0 in float32."""
    logits, labels = scene((2, 60, 66), sure=sure)
    found, gradient = jax.value_and_grad(
        lambda x: losses.finish(losses.region_mutual_information(x, labels))
    )(logits)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


def test_a_better_segmentation_has_less_of_it():
    _, labels = scene(ignored=0)
    perfect = 8.0 * (2 * np.eye(CLASSES, dtype=np.float32)[labels] - 1)
    found = [
        float(losses.region_mutual_information(np.roll(perfect, n, axis=2), labels, weight=0.0).sum)
        for n in (0, 1, 2)
    ]
    assert found == sorted(found)
    assert found[0] < found[1] - 1


def test_descending_along_the_gradient_finds_the_truth():
    _, labels = scene((2, 12, 12), ignored=0)
    logits = np.random.default_rng(0).normal(scale=0.1, size=(*labels.shape, CLASSES))
    step = jax.jit(
        jax.grad(lambda x: losses.finish(losses.region_mutual_information(x, labels, pool=1)))
    )
    for _ in range(400):
        logits = logits - 3 * np.asarray(step(logits))
    assert (logits.argmax(-1) == labels).mean() > 0.99


def test_an_image_without_labels_counts_nothing():
    logits, labels = scene()
    labels[1] = 255
    found = losses.region_mutual_information(logits, labels)
    alone = losses.region_mutual_information(logits[:1], labels[:1])
    assert found.count == 1
    assert float(found.sum) == pytest.approx(float(alone.sum), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "weight is 1.5; expected 0 to 1"),
        ({"radius": 0}, "radius is 0 and pool 3; expected a radius of 1 or more and an odd pool"),
        ({"pool": 2}, "radius is 3 and pool 2"),
        ({"radius": 7}, "pooled labels are 6x7, smaller than a region of 7 along each axis"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        losses.region_mutual_information(*scene(), **options)
