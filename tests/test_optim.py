"""Optimiser and schedule against torch, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from dilaff_jax import optim, schema

PARAMS = {
    "encoder": {"conv": {"kernel": np.ones((3, 2))}, "norm": {"scale": np.ones(2)}},
    "decoder": {"conv": {"kernel": np.full((3, 2), 2.0), "bias": np.zeros(2)}},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)


def config(**changes):
    result = schema.defaults(optim.KEYS)
    result.update(changes)
    return result


def ours(settings, steps=5, num_steps=10):
    """The parameters after `steps` with gradients that depend on parameter and step."""
    tx, _ = optim.optimiser(settings, num_steps)
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        gradient = jax.tree.map(lambda p, i=i: 0.3 * p + i + 1, params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.leaves(params)


def torchs(make, rates, decay, multiplier=1.0, clip=0.0, steps=5):
    """The same with a torch optimiser; `rates` are learning rates by step."""
    leaves = jax.tree_util.tree_leaves_with_path(PARAMS)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for _, x in leaves]
    groups = [
        {
            "params": [t],
            "weight_decay": decay if t.ndim > 1 else 0.0,
            "factor": 1.0 if path[0].key == "encoder" else multiplier,
        }
        for (path, _), t in zip(leaves, tensors, strict=True)
    ]
    optimiser = make(groups)
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rates[i] * group["factor"]
        for t in tensors:
            t.grad = 0.3 * t.detach() + i + 1
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors, clip)
        optimiser.step()
    return [t.detach().numpy() for t in tensors]


POLY = [0.1 * (1 - i / 10) ** 0.9 for i in range(10)]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1.5])
def test_sgd_equals_torch(nesterov, clip):
    settings = config(
        learning_rate=0.1,
        weight_decay=0.05,
        nesterov=nesterov,
        clip_norm=clip,
        head_multiplier=10.0,
    )
    expected = torchs(
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov),
        POLY, 0.05, 10.0, clip,
    )  # fmt: skip
    for found, wanted in zip(ours(settings), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_adamw_equals_torch():
    settings = config(name="adamw", learning_rate=0.1, weight_decay=0.05, head_multiplier=3.0)
    expected = torchs(lambda groups: torch.optim.AdamW(groups, lr=0.1), POLY, 0.05, 3.0)
    for found, wanted in zip(ours(settings), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_norms_and_biases_do_not_decay():
    mask = optim.decay_mask(PARAMS)
    assert mask["encoder"] == {"conv": {"kernel": True}, "norm": {"scale": False}}
    assert mask["decoder"]["conv"] == {"kernel": True, "bias": False}


def test_poly_falls_to_its_end():
    rate = optim.schedule(config(learning_rate=0.1, end=0.01), 100)
    expected = [0.001 + 0.099 * (1 - t / 100) ** 0.9 for t in (0, 50, 100)]
    np.testing.assert_allclose([rate(t) for t in (0, 50, 100)], expected, rtol=1e-5)


def test_cosine_is_half_way_at_half_time():
    rate = optim.schedule(config(schedule="cosine", learning_rate=0.2), 100)
    np.testing.assert_allclose([rate(t) for t in (0, 50, 100)], [0.2, 0.1, 0.0], atol=1e-7)


@pytest.mark.parametrize(("growth", "first"), [(1, 30), (2, 10)])
def test_warm_restarts_are_those_of_torch(growth, first):
    torch = pytest.importorskip("torch")
    restarts = 1 if growth == 1 else 2
    steps = first * sum(growth**i for i in range(restarts + 1))
    options = {"schedule": "cosine", "learning_rate": 0.2, "end": 0.1}
    rate = optim.schedule(config(**options, restarts=restarts, restart_growth=growth), steps)
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    falls = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        theirs, first, growth, eta_min=0.02
    )
    for t in range(steps):
        np.testing.assert_allclose(rate(t), theirs.param_groups[0]["lr"], rtol=1e-5)
        theirs.step()
        falls.step()


def test_the_last_cycle_ends_with_the_run():
    options = {"schedule": "cosine", "learning_rate": 0.2, "restarts": 2, "warmup_steps": 3}
    rate = optim.schedule(config(**options, restart_growth=1.5), 103)
    values = np.array([rate(t) for t in range(104)])
    assert (np.diff(values[3:]) > 0.1).sum() == 2
    np.testing.assert_allclose(values[-1], 0, atol=1e-7)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_warm_up_rises_from_zero_and_meets_the_schedule(name):
    rate = optim.schedule(config(schedule=name, learning_rate=0.1, warmup_steps=10), 110)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.05, 0.1], atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lion"}, r"optim.name is 'lion'; expected one of 'sgd', 'adamw'"),
        ({"schedule": "step"}, "optim.schedule is 'step'"),
        ({"warmup_steps": 10}, "optim.warmup_steps is 10; the run has 10 steps"),
        ({"warmup_steps": -1}, "optim.warmup_steps is -1"),
        ({"restarts": 2}, "optim.restarts is 2 and optim.schedule 'poly'; only 'cosine'"),
        ({"schedule": "cosine", "restarts": 20}, "no step of the 10 after the warm-up"),
        ({"restart_growth": 0.5}, "restart_growth is 0.5; expected a number of 1 or more"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        optim.optimiser(config(**changes), 10)


class Encoder:
    layer_groups = (("patch", "position_embeddings"), ("block_0",), ("block_1",))


def test_layer_decay_scales_the_rate_of_each_layer_and_of_nothing_else():
    """Of n groups the i-th has decay^(n - i): BEiT's rule, against its own words in numbers."""
    ones = {"kernel": jnp.ones((2, 2))}
    names = ("patch", "block_0", "block_1", "norm")
    params = {"encoder": dict.fromkeys(names, ones), "decoder": {"block_0": ones}}
    params["encoder"]["position_embeddings"] = jnp.ones((1, 3, 2))
    settings = config(
        name="sgd", momentum=0.0, weight_decay=0.0, learning_rate=1.0, schedule="constant"
    )
    settings.layer_decay = 0.5
    tx, _ = optim.optimiser(settings, 10, Encoder())
    updates, _ = tx.update(params, tx.init(params), params)
    found = {k: float(jax.tree.leaves(v)[0].ravel()[0]) for k, v in updates["encoder"].items()}
    assert found == {
        "patch": -0.125,
        "position_embeddings": -0.125,
        "block_0": -0.25,
        "block_1": -0.5,
        "norm": -1.0,
    }
    assert float(updates["decoder"]["block_0"]["kernel"][0, 0]) == -1.0


def test_tokens_and_positions_do_not_decay():
    tree = {"cls_token": jnp.ones((1, 1, 4)), "position_embeddings": jnp.ones((1, 5, 4))}
    assert optim.decay_mask({"encoder": {**tree, "patch": {"kernel": jnp.ones((2, 2, 3, 4))}}}) == {
        "encoder": {"cls_token": False, "position_embeddings": False, "patch": {"kernel": True}}
    }


def test_layer_decay_needs_an_encoder_with_an_order():
    settings = config(layer_decay=0.9)
    with pytest.raises(ValueError, match=r"layer_decay is 0\.9.*Leave it at 1"):
        optim.optimiser(settings, 10, object())
