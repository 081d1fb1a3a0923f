"""CSPN against its authors' way in torch, loops over pixels, and as an operator to train through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dilaff_jax import affinity, baselines, propagate
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter
from dilaff_jax.objective import Objective
from tests import tiny_config


def scene(shape=(2, 9, 7), classes=4, dilations=(1, 3)):
    rng = np.random.default_rng(0)
    offsets = affinity.offsets(dilations, len(shape) - 1)
    probs = rng.dirichlet(np.ones(classes), shape).astype(np.float32)
    return probs, rng.normal(0, 2, (*shape, len(offsets))).astype(np.float32), offsets


def loops(probs, guide, offsets, steps):
    start = np.log(probs.astype(np.float64))
    scores = start
    for _ in range(steps):
        after = np.empty_like(start)
        for at in np.ndindex(*probs.shape[:-1]):
            there = [
                (k, (at[0], *np.add(at[1:], o)))
                for k, o in enumerate(offsets)
                if (np.add(at[1:], o) >= 0).all() and (np.add(at[1:], o) < probs.shape[1:-1]).all()
            ]
            total = sum(abs(float(guide[at][k])) for k, _ in there) or 1.0
            kappa = {there_: float(guide[at][k]) / total for k, there_ in there}
            after[at] = (1 - sum(kappa.values())) * start[at]
            after[at] += sum(w * scores[there_] for there_, w in kappa.items())
        scores = after
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("shape", [(2, 9, 7), (1, 5, 4, 6), (1, 2, 3)])
def test_it_equals_loops_over_pixels(shape, steps):
    probs, guide, offsets = scene(shape)
    guide[0, 0, 0] = 0  # a pixel that asks nobody stays as it is
    found = baselines.cspn(probs, guide, offsets, steps=steps)
    np.testing.assert_allclose(found, loops(probs, guide, offsets, steps), atol=2e-5)
    if steps:
        np.testing.assert_allclose(found[0, 0, 0], probs[0, 0, 0], atol=1e-6)


def test_it_equals_the_authors_way_on_a_window_of_three():
    """Guidance and scores in eight shifted and padded maps, the absolute values summed to one."""
    torch = pytest.importorskip("torch")
    probs, guide, offsets = scene(dilations=(1,))
    height, width = probs.shape[1:3]

    def shifted(x):
        """`[B, C, H, W]` at each neighbour, zeros outside: `[K, B, C, H, W]`."""
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        return torch.stack(
            [padded[:, :, 1 + v : 1 + v + height, 1 + u : 1 + u + width] for v, u in offsets]
        )

    raw = torch.log(torch.tensor(probs).movedim(-1, 1))
    there = shifted(torch.ones_like(raw[:, :1]))
    gates = torch.tensor(guide).movedim(-1, 0)[:, :, None] * there
    gates = gates / gates.abs().sum(0)
    scores = raw
    for _ in range(3):
        scores = (1 - gates.sum(0)) * raw + (gates * shifted(scores)).sum(0)
    expected = torch.softmax(scores, 1).movedim(1, -1)
    found = baselines.cspn(probs, guide, offsets, steps=3)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_its_gradients_are_those_of_differences():
    probs, guide, offsets = scene((1, 3, 4), 3, (1,))

    def loss(p, g):
        return jnp.sum(baselines.cspn(p, g, offsets, steps=3)[..., 0] ** 2)

    # Under jit, where a difference may step below zero.
    check_grads(jax.jit(loss), (probs + 0.1, guide), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_it_is_an_operator_with_a_bias_by_its_name():
    probs, guide, offsets = scene()
    by_name = propagate.operator("dilaff_jax.baselines:cspn", bias=0.5, steps=2)
    np.testing.assert_array_equal(
        by_name(probs, guide, offsets), baselines.cspn(probs, guide - 0.5, offsets, steps=2)
    )
    # As --mode fit writes it: one a dilation.
    np.testing.assert_array_equal(
        baselines.cspn(probs, guide, offsets, bias=[0.5, -1.0]),
        baselines.cspn(probs, guide, offsets, bias=np.repeat([0.5, -1.0], 8)),
    )
    each = np.linspace(-1, 1, len(offsets))
    np.testing.assert_allclose(
        baselines.cspn(probs, guide, offsets, bias=each),
        baselines.cspn(probs, (guide - each).astype(np.float32), offsets),
        atol=1e-5,
    )


def test_a_network_learns_its_weights_through_it_alone():
    """No loss of the affinities: their gradient comes by the propagated result."""
    config = tiny_config.get_config()
    config.loss.update({"affinity": 0.0, "refined": 1.0})
    with config.ignore_type():
        config.refine = {"name": "dilaff_jax.baselines:cspn", "steps": 3}
    model = segmenter.build(segmenter.config_of_run(config), 5)
    objective = Objective(config, model, 5)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 5, (2, 32, 32)).astype(np.uint8)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), image)

    def loss(params):
        outputs = model.apply({**variables, "params": params}, image, train=False)
        found = objective(outputs, labels)
        assert "affinity" not in found
        return (found["refined"].sum / found["refined"].count).sum()

    of_head = jax.jit(jax.grad(loss))(variables["params"])["affinity_head"]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(of_head))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(of_head))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1; expected a whole number"),
        ({"steps": 1.5}, r"steps is 1.5; expected a whole number"),
        ({"bias": np.zeros(3)}, r"bias has shape \(3,\); expected a scalar, \[2\] .* or \[16\]"),
        (
            {"guide": np.zeros((2, 9, 7, 3))},
            r"affinity_logits has shape \(2, 9, 7, 3\); expected \(2, 9, 7, 16\)",
        ),
        ({"guide": np.full((2, 9, 7, 16), np.nan)}, "affinity_logits holds NaN or infinity"),
        ({"probs": np.full((2, 9, 7, 4), -1.0)}, r"probs has values in \[-1, -1\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    probs, guide, offsets = scene()
    arrays = {"probs": probs, "guide": guide} | change
    options = {k: arrays.pop(k) for k in ("steps", "bias") if k in arrays}
    with pytest.raises(UserError, match=message):
        baselines.cspn(arrays["probs"], arrays["guide"], offsets, **options)
