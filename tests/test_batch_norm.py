"""Our normalisation against Flax's and torch's: values, gradients, statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dilaff_jax.models.cpu.batch_norm import BatchNorm

CHANNELS = 5


def data(rows=3, size=6):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, size, size, CHANNELS)) * [1, 3, 0.1, 1, 10] + [0, 5, 0, -1, 30]
    return x.astype(np.float32), rng.normal(size=x.shape).astype(np.float32)


def variables():
    rng = np.random.default_rng(1)
    low, high = 0.5, 2.0
    return {
        "params": {
            "scale": rng.uniform(low, high, CHANNELS).astype(np.float32),
            "bias": rng.normal(size=CHANNELS).astype(np.float32),
        },
        "batch_stats": {
            "mean": rng.normal(size=CHANNELS).astype(np.float32),
            "var": rng.uniform(low, high, CHANNELS).astype(np.float32),
        },
    }


def run(module, x, dy):
    """Result, statistics afterwards, gradients by the parameters and by x."""
    given = variables()

    def function(params, x):
        return module.apply({**given, "params": params}, x, mutable=["batch_stats"])

    y, back, after = jax.vjp(function, given["params"], x, has_aux=True)
    return y, after.get("batch_stats", given["batch_stats"]), *back(dy.astype(y.dtype))


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_it_is_flaxs_own(running, two_pass):
    x, dy = data()
    ours = BatchNorm(running, 0.9, 1e-5, two_pass=two_pass)
    theirs = nn.BatchNorm(running, momentum=0.9, epsilon=1e-5, use_fast_variance=not two_pass)
    assert jax.tree.map(np.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(
        np.shape, theirs.init(jax.random.key(0), x)
    )
    # The gradient by x is a difference of sums of some hundred terms.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4),
        run(ours, x, dy),
        run(theirs, x, dy),
    )


def test_it_is_torchs():
    x, dy = data()
    given = variables()
    y, after, by_params, by_x = run(BatchNorm(False, 0.9, 1e-5), x, dy)
    theirs = torch.nn.BatchNorm2d(CHANNELS, eps=1e-5, momentum=0.1)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(given["params"]["scale"]))
        theirs.bias.copy_(torch.from_numpy(given["params"]["bias"]))
        theirs.running_mean.copy_(torch.from_numpy(given["batch_stats"]["mean"]))
    image = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    found = theirs(image)
    found.backward(torch.from_numpy(dy).permute(0, 3, 1, 2))
    back = (0, 2, 3, 1)
    np.testing.assert_allclose(y, found.detach().permute(back), atol=1e-5)
    np.testing.assert_allclose(by_x, image.grad.permute(back), atol=2e-4)
    np.testing.assert_allclose(by_params["scale"], theirs.weight.grad, atol=1e-3)
    np.testing.assert_allclose(by_params["bias"], theirs.bias.grad, atol=1e-4)
    np.testing.assert_allclose(after["mean"], theirs.running_mean, atol=1e-5)


def test_a_channel_that_hardly_varies_stays_what_it_is():
    x = np.full((2, 8, 8, CHANNELS), 7.0, np.float32)
    y, after, *gradients = run(BatchNorm(False, 0.9, 1e-5), x, np.ones_like(x))
    np.testing.assert_allclose(
        y, np.broadcast_to(variables()["params"]["bias"], x.shape), atol=1e-3
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((after, gradients)))


def test_two_passes_tell_apart_what_one_takes_for_rounding():
    # Two images of one pixel each, as in a decoder's pooled branch.
    x = np.array([1000.0, 1000.5], np.float32).reshape(2, 1, 1, 1)
    module = BatchNorm(False, 0.9, 1e-5, two_pass=True)
    y, _ = module.apply(module.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), [-1, 1], atol=1e-3)


def test_bfloat16_is_normalised_in_float32():
    x, _ = data()
    narrow = jnp.asarray(x, jnp.bfloat16)
    y, after = BatchNorm(False, 0.9, 1e-5, jnp.bfloat16).apply(
        variables(), narrow, mutable=["batch_stats"]
    )
    wide, expected = BatchNorm(False, 0.9, 1e-5).apply(
        variables(), narrow.astype(jnp.float32), mutable=["batch_stats"]
    )
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, after, expected)
