"""A logit of -inf is "never": a class that is switched off, at some pixels or at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilaff_jax
from dilaff_jax import affinity, propagate, resize

OFFSETS = affinity.offsets((1, 2))
SIZES = [(6, 8), (12, 16), (23, 31), (3, 4)]
OPERATORS = {
    "signed": propagate.operator("signed", steps=3, strength=0.2),
    "random_walk": propagate.operator("random_walk", steps=3, sharpness=2.0, restart=0.1),
    "identity": propagate.operator("identity"),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (2, 6, 8, 4)).astype(np.float32)
    return logits, rng.normal(0, 2, (2, 12, 16, len(OFFSETS))).astype(np.float32)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_class_that_is_off_everywhere_leaves_what_there_would_be_without_it(name, size, compiled):
    logits, guide = arrays()

    def refined(logits):
        return propagate.refine_logits(logits, guide, OFFSETS, size, OPERATORS[name])

    refined = jax.jit(refined) if compiled else refined
    others = [0, 1, 3]
    wanted, without = refined(logits[..., others])
    off = logits.copy()
    off[..., 2] = -np.inf
    labels, probs = refined(off)
    np.testing.assert_array_equal(probs[..., 2], 0)
    np.testing.assert_allclose(probs[..., others], without, atol=2e-6)
    np.testing.assert_array_equal(labels, np.array(others)[wanted])


def by_loops(x, size):
    """Linear interpolation between the pixels that are not -inf, pixel by pixel."""
    result = np.empty((*size, x.shape[-1]), np.float32)
    rows, columns = (resize.matrix(n, m) for n, m in zip(x.shape[:2], size, strict=True))
    for i, j, c in np.ndindex(*result.shape):
        weights = np.outer(rows[i], columns[j])
        nearest = x[
            (2 * i + 1) * x.shape[0] // (2 * size[0]), (2 * j + 1) * x.shape[1] // (2 * size[1])
        ]
        possible = np.isfinite(x[..., c])
        if np.isneginf(nearest[c]):
            result[i, j, c] = -np.inf
            continue
        known = (weights * possible).sum()
        result[i, j, c] = (weights * np.where(possible, x[..., c], 0)).sum() / known
    return result


@pytest.mark.parametrize("size", [s for s in SIZES if s != (3, 4)])
def test_one_pixel_that_is_off_spoils_nothing_around_it(size):
    logits, guide = arrays(1)
    logits[0, 2, 3, 1] = logits[0, 5, 7, 0] = logits[1, 0, 0, 3] = -np.inf
    logits[1, 3, 2:5, 2] = -np.inf
    enlarged = resize.bilinear_logits(jnp.asarray(logits), size)
    for image, wanted in zip(enlarged, (by_loops(x, size) for x in logits), strict=True):
        np.testing.assert_allclose(image, wanted, atol=1e-4)
    labels, probs = propagate.refine_logits(logits, guide, OFFSETS, size)
    assert np.isfinite(probs).all()
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probs == 0, np.isneginf(enlarged))
    np.testing.assert_array_equal(labels, probs.argmax(-1))


def test_where_all_is_finite_it_is_the_ordinary_interpolation():
    logits, _ = arrays(2)
    for size in SIZES:
        np.testing.assert_allclose(
            resize.bilinear_logits(jnp.asarray(logits), size),
            resize.bilinear(jnp.asarray(logits), size),
            atol=1e-6,
        )


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_finite_and_zero_where_a_class_is_off(name):
    logits, guide = arrays(3)
    logits[..., 2] = -np.inf
    logits[0, 1, 1, 0] = -np.inf

    def loss(logits, guide):
        _, probs = propagate.refine_logits(logits, guide, OFFSETS, (12, 16), OPERATORS[name])
        return jnp.sum(jnp.sin(3 * probs))

    by_logits, by_guide = jax.grad(loss, argnums=(0, 1))(jnp.asarray(logits), jnp.asarray(guide))
    assert np.isfinite(by_logits).all()
    assert np.isfinite(by_guide).all()
    np.testing.assert_array_equal(by_logits[np.isneginf(logits)], 0)
    assert np.abs(by_logits).max() > 0


def test_anybodys_logits_may_have_a_class_off():
    logits, guide = arrays(4)
    logits[..., 1] = -np.inf
    result = dilaff_jax.refine(logits, guide, size=(24, 32), dilations=(1, 2))
    assert not (result.labels == 1).any()
    assert len(np.unique(result.labels)) == 3
    logits[0, 0, 0] = -np.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        dilaff_jax.refine(logits, guide, size=(24, 32), dilations=(1, 2))
