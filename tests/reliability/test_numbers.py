"""Numbers that are not finite stop a run where they appear; half precision stays near the full."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import step, train
from tests.reliability import runs
from tests.running import lines, make_config, saved

AT = 5  # counted from 1; checkpoints are of steps 3, 6, ...


def poison(value, at, bad):
    """`value`, with its first number `bad` in step AT."""
    where = (at == AT - 1) & (jnp.arange(value.size).reshape(value.shape) == 0)
    return jnp.where(where, jnp.asarray(bad, value.dtype), value)


def poison_first(tree, at, bad):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([poison(leaves[0], at, bad), *leaves[1:]])


def in_a_batch(patch, bad):
    call = step.TrainStep.__call__

    def poisoned(self, state, batch, seed):
        image = poison(batch["image"].astype(jnp.float32), state.step, bad)
        return call(self, state, {**batch, "image": image}, seed)

    patch.setattr(step.TrainStep, "__call__", poisoned)


def in_a_weight(patch, bad):
    call = step.TrainStep.__call__

    def poisoned(self, state, batch, seed):
        poor = state.replace(params=poison_first(state.params, state.step, bad))
        return call(self, poor, batch, seed)

    patch.setattr(step.TrainStep, "__call__", poisoned)


def in_the_loss(patch, bad):
    gradient = step.TrainStep._gradient

    def poisoned(self, state, *others):
        found, stats, terms, confusion = gradient(self, state, *others)
        terms = {**terms, "segmentation": poison(terms["segmentation"], state.step, bad)}
        return found, stats, terms, confusion

    patch.setattr(step.TrainStep, "_gradient", poisoned)


def in_the_gradient(patch, bad):
    gradient = step.TrainStep._gradient

    def poisoned(self, state, *others):
        found, *rest = gradient(self, state, *others)
        return (poison_first(found, state.step, bad), *rest)

    patch.setattr(step.TrainStep, "_gradient", poisoned)


def small(data_dir, **changes):
    """Without affinity head: a program that compiles in a moment, for each of these tests anew."""
    config = runs.configure(make_config(data_dir), num_steps=9, **changes)
    config.loss.affinity = 0.0
    return config


@pytest.mark.parametrize(
    ("inject", "bad", "source"),
    [
        (in_a_batch, np.nan, "image"),
        (in_a_weight, np.inf, "parameters"),
        (in_the_loss, np.nan, "segmentation"),
        (in_the_gradient, -np.inf, "gradient"),
    ],
)
def test_the_run_stops_names_step_and_source_and_keeps_the_last_good_checkpoint(
    inject, bad, source, data_dir, tmp_path, monkeypatch
):
    inject(monkeypatch, bad)
    expected = re.escape(f"step {AT}: NaN or infinity, first in: {source} ")
    with pytest.raises(FloatingPointError, match=expected):
        train.train_and_evaluate(small(data_dir), tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert runs.steps(tmp_path) == [3]
    kept = saved(tmp_path, 3)
    assert all(np.isfinite(value).all() for value in kept.values())


def test_half_precision_stays_near_full_precision(data_dir, tmp_path, record_property):
    """Losses of nine steps on `shapes`, from the same weights and batches.

    bfloat16 has 8 bits, a relative rounding of 2⁻⁹ = 0.2 % an operation; through a handful of layers
    and steps the losses stay within 2 %.
    """
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = small(data_dir)
        config.model.dtype = dtype
        train.train_and_evaluate(config, tmp_path / dtype)
        found = lines(tmp_path / dtype)
        losses[dtype] = np.array([line["train/loss"] for line in found if "train/loss" in line])
    apart = np.abs(losses["bfloat16"] / losses["float32"] - 1)
    record_property("bfloat16_relative_loss_difference", float(apart.max()))
    assert 0 < apart.max() < 0.02
