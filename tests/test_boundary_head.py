"""Semantic boundaries as an auxiliary task: targets and loss against loops, the head by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import losses
from dilaff_jax.models import boundary_head

CLASSES = 3


def scene(seed=0):
    """Blocks, a strip of void, and two classes that meet."""
    labels = np.zeros((2, 8, 9), np.uint8)
    labels[0, 2:6, 3:7] = 1
    labels[0, 2:6, 6] = 255
    labels[1, :, 5:] = 2
    labels[1, 3, :] = 255
    logits = np.random.default_rng(seed).normal(size=(*labels.shape, CLASSES)).astype(np.float32)
    return logits, labels


def by_loop(labels):
    target = np.zeros((*labels.shape, CLASSES), bool)
    for b, y, x in np.ndindex(*labels.shape):
        window = labels[b, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        for c in range(CLASSES):
            labelled = window[window != 255]
            target[b, y, x, c] = (labelled == c).any() and (labelled != c).any()
    return target


def test_targets_are_those_of_a_loop():
    _, labels = scene()
    target, valid = losses.boundary_targets(labels, CLASSES)
    np.testing.assert_array_equal(target, by_loop(labels))
    np.testing.assert_array_equal(valid, np.repeat((labels != 255)[..., None], CLASSES, -1))
    assert target[..., 1].any()
    assert not target[1, ..., 1].any()


def test_targets_of_volumes_look_along_three_axes():
    labels = np.zeros((1, 5, 5, 5), np.uint8)
    labels[0, 3:] = 1
    target, _ = losses.boundary_targets(labels, 2)
    expected = np.zeros(labels.shape, bool)
    expected[0, 2:4] = True
    np.testing.assert_array_equal(target[..., 0], expected)
    turned, _ = losses.boundary_targets(np.moveaxis(labels, 1, 3), 2)
    np.testing.assert_array_equal(turned, np.moveaxis(np.asarray(target), 1, 3))


def test_the_loss_is_that_of_a_loop():
    logits, labels = scene()
    target, valid = by_loop(labels), labels != 255
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    halves = []
    for c in range(CLASSES):
        on, off = target[..., c] & valid, ~target[..., c] & valid
        halves += [-np.log(p[..., c][on]).mean(), -np.log(1 - p[..., c][off]).mean()]
    found = losses.finish(losses.semantic_boundaries(logits, labels))
    assert float(found) == pytest.approx(np.mean(halves), rel=1e-5)


def test_parts_of_a_batch_add():
    logits, labels = scene()
    whole = losses.semantic_boundaries(logits, labels)
    parts = [losses.semantic_boundaries(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    for found, expected in zip(parts[0] + parts[1], whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_gradient_is_that_of_differences():
    logits, labels = scene()

    def loss(x):
        return losses.finish(losses.semantic_boundaries(x, labels))

    direction = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    step = 1e-2
    slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    assert float(jnp.vdot(jax.grad(loss)(logits), direction)) == pytest.approx(
        float(slope), rel=1e-2
    )


def test_shapes_that_do_not_match_are_refused():
    logits, labels = scene()
    with pytest.raises(
        ValueError, match=r"logits have shape \(2, 8, 9, 3\) and labels \(2, 8, 8\)"
    ):
        losses.semantic_boundaries(logits, labels[..., :-1])


def features():
    rng = np.random.default_rng(0)
    sizes = {"stride2": 16, "stride4": 8, "stride8": 4, "stride32": 1}
    return {k: rng.normal(size=(2, n, n, 6)).astype(np.float32) for k, n in sizes.items()}


def test_a_side_adds_to_every_class_and_the_last_map_to_its_own():
    head = boundary_head.BoundaryHead(CLASSES)
    image = np.zeros((2, 32, 32, 3), np.float32)
    variables = head.init(jax.random.key(0), image, features(), False)
    weights = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    bias = np.array([0.5, -1.0, 2.0], np.float32)
    parameters = {**variables["params"], "fuse": weights, "bias": bias}
    fused, last = head.apply(variables | {"params": parameters}, image, features(), False)
    assert fused.shape == last.shape == (2, 16, 16, CLASSES)
    # The fused map without the last one is the same for all classes up to their weights.
    rest = fused - weights[0] * last - bias
    side = np.linalg.lstsq(weights[1:].T, np.moveaxis(rest, -1, 0).reshape(3, -1), rcond=None)[0]
    np.testing.assert_allclose(
        weights[1:].T @ side, np.moveaxis(rest, -1, 0).reshape(3, -1), atol=1e-4
    )
    for name in ("stride2", "stride4", "stride8"):
        assert parameters[name]["conv"]["kernel"].shape[-1] == 1
    assert parameters["stride32"]["conv"]["kernel"].shape[-1] == CLASSES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 3}, "boundaries.stride is 3; allowed: 1, 2, 4"),
        ({"last": "stride16"}, "'stride16', which this encoder does not give; it gives stride2"),
        ({"sides": ("stride3",)}, "'stride3', which this encoder does not give"),
    ],
)
def test_heads_that_cannot_be_are_refused(options, message):
    head = boundary_head.BoundaryHead(CLASSES, **options)
    with pytest.raises(ValueError, match=message):
        head.init(jax.random.key(0), np.zeros((2, 32, 32, 3)), features(), False)
