"""Frozen parameters: to the bit, without gradient and optimiser state, however the step is run."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dilaff_jax import train
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter
from dilaff_jax.models.frozen import Frozen
from dilaff_jax.preflight.run import run as preflight
from dilaff_jax.runtime import checkpoint, parallel, parameter_names
from dilaff_jax.step import seed_of
from tests import data_files
from tests import test_step as of_step
from tests.running import assert_bit_identical, killed_after, lines, saved
from tests.running import make_config as run_config

BASE = ("encoder", "decoder")


def make_config(frozen=BASE, **model):
    config = of_step.make_config(**model)
    config.optim.frozen = frozen
    config.model.affinity.sources = ("image", "stride4", "decoder", "probabilities")
    return config


def flat(tree):
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def changed(before, after):
    """Names of the arrays that differ in any bit."""
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {k for k in before if np.asarray(before[k]).tobytes() != np.asarray(after[k]).tobytes()}


@pytest.mark.parametrize(
    ("mode", "count", "options"),
    [
        ("pmap", 4, {"accumulate": 2}),
        ("shard_map", 2, {"ema": 0.9}),
        ("shard_map", 1, {"name": "adamw", "weight_decay": 0.1, "clip_norm": 1.0}),
    ],
)
def test_what_is_frozen_stays_to_the_bit_and_all_else_learns(mode, count, options):
    config = make_config()
    config.optim.update(options)
    before, after = (of_step.run(config, mode, count, steps=n) for n in (0, 50))
    for part in ("params", "batch_stats"):
        names = changed(getattr(before, part), getattr(after, part))
        assert names == {n for n in flat(getattr(before, part)) if n.startswith("affinity_head")}
    for part in ("params", "batch_stats"):
        names = changed(before.evaluated[part], after.evaluated[part])
        assert names == {n for n in flat(before.evaluated[part]) if n.startswith("affinity_head")}


def test_the_plain_output_is_that_of_the_weights_it_began_with():
    config = make_config()
    before, after = (of_step.run(config, steps=n) for n in (0, 3))
    model, _ = of_step.make(config, axis_name=None)
    image = of_step.make_batch()["image"]
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
    first, second = apply(before.evaluated, image), apply(after.evaluated, image)
    assert np.asarray(first["logits"]).tobytes() == np.asarray(second["logits"]).tobytes()
    assert np.abs(first["affinity_logits"] - second["affinity_logits"]).max() > 1e-3


def test_mappings_and_accumulation_change_nothing():
    config = make_config(norm="group")
    one = of_step.run(config)
    of_step.assert_same(of_step.run(config, "pmap", 4), one)
    config.optim.accumulate = 2
    of_step.assert_same(of_step.run(config, "shard_map", 2).params, one.params)


def test_the_rest_learns_as_it_does_without_frozen_parts():
    """Of a first step, with nothing that training does differently: the same update of the head."""
    model = {"norm": "group", "decoder_options": {"dropout": 0.0}}
    alone, together = (of_step.run(make_config(f, **model), steps=1) for f in (BASE, ()))
    of_step.assert_same(alone.params["affinity_head"], together.params["affinity_head"], 1e-6)
    assert changed(alone.params["encoder"], together.params["encoder"])


def test_frozen_modules_run_as_in_evaluation():
    """Neither batch statistics nor dropout: the loss of the base is that of the evaluated base."""
    config = make_config(decoder_options={"dropout": 0.5})
    state = of_step.run(config, steps=1)
    model, train_step = of_step.make(config, axis_name=None)
    before, batch = of_step.run(config, steps=0), of_step.make_batch(0)
    outputs = jax.jit(lambda v, x: model.apply(v, x, train=False))(before.evaluated, batch["image"])
    loss = train_step._objective(outputs, batch["label"])["segmentation"]
    np.testing.assert_allclose(
        state.window.losses["segmentation"], loss.sum / loss.count, rtol=1e-6
    )


def test_a_part_of_a_part_may_be_frozen():
    config = make_config(("encoder/conv[01]", "decoder/*/norm"))
    before, after = (of_step.run(config, steps=n) for n in (0, 2))
    still = flat(before.params).keys() - changed(before.params, after.params)
    assert {n.rpartition("/")[0] for n in still} == {
        *(f"encoder/conv{i}/{part}" for i in (0, 1) for part in ("conv", "norm")),
        "decoder/conv/norm",
    }
    statistics = changed(before.batch_stats, after.batch_stats)
    assert statistics == {
        n for n in flat(before.batch_stats) if n.startswith(("encoder/conv2", "aff"))
    }


def test_a_single_image_trains_a_head_on_a_frozen_pooling_branch():
    """Which BatchNorm in training would refuse: one value a channel has no variance."""
    config = make_config(decoder="deeplabv3", decoder_options={"rates": (1,), "width": 8})
    config.model.affinity.sources = ("decoder",)
    config.batch_size = 1
    batch = {k: v[5:6] for k, v in of_step.make_batch().items()}
    state = of_step.run(config, steps=1, batches=[batch])
    assert np.isfinite(state.window.losses["affinity"])


def compiled_step(frozen):
    config = make_config(frozen)
    config.model.encoder = "tests.test_frozen:WideEncoder"
    config.optim.name = "adamw"
    _, train_step = of_step.make(config)
    devices = parallel.Devices("shard_map", 1)
    seed = seed_of(config)
    state = devices.abstract(jax.eval_shape(lambda: train_step.init((1, 32, 32, 3), seed)))
    batch = {
        "image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((2, 32, 32), jnp.uint8),
    }
    program = devices.map(train_step, out="replicated", donate=True, shared=1)
    return state, program.lower(state, devices.abstract(batch, "sharded"), seed).compile()


class WideEncoder(of_step.tiny.TinyEncoder):
    """So many parameters that they outweigh all maps."""

    width: int = 512


def test_no_memory_is_spent_on_gradients_and_optimiser_of_what_is_frozen():
    whole, all_learn = compiled_step(())
    state, head_learns = compiled_step(BASE)
    size = {k: sum(x.size * 4 for x in jax.tree.leaves(whole.params[k])) for k in BASE}
    base = sum(size.values())
    before, after = (program.memory_analysis() for program in (all_learn, head_learns))
    # Adam's two moments.
    saved_state = before.argument_size_in_bytes - after.argument_size_in_bytes
    assert saved_state == pytest.approx(2 * base, rel=0.01)
    # The gradient, at least.
    assert before.temp_size_in_bytes - after.temp_size_in_bytes > 0.9 * base
    assert after.temp_size_in_bytes < 0.5 * base
    assert not any(n.startswith(("encoder", "decoder")) for n in names_of(state.opt_state))
    flops = [program.cost_analysis()["flops"] for program in (all_learn, head_learns)]
    assert flops[1] < 0.5 * flops[0]


def names_of(tree):
    return [name.split("/params/")[-1] for name in parameter_names.named(tree)]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("encodr",), "'encodr', which fits no parameter; the model has affinity_head, decoder"),
        (("encoder", "decoder", "affinity_head"), "which is all parameters of the model"),
        (("*",), "which is all parameters of the model"),
    ],
)
def test_patterns_that_cannot_be_are_refused_before_anything_is_written(
    patterns, message, data_dir, tmp_path
):
    config = run_config(data_dir)
    config.optim.frozen = patterns
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_part_put_together_again_is_the_whole():
    model, _ = of_step.make(make_config())
    variables = segmenter.abstract_variables(model)
    for patterns in (BASE, ("encoder/conv1/norm",), ()):
        parts = Frozen(variables["params"], patterns).split(variables)
        merged = {k: parameter_names.merge(parts[0][k], parts[1][k]) for k in variables}
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, merged, dict(variables)))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=10, validation=7)


def test_a_killed_run_resumes_bit_identical_and_its_base_is_that_of_the_run_it_came_from(
    data_dir, tmp_path, monkeypatch
):
    """With a moving average, which for frozen parameters is what they are."""
    base = run_config(data_dir)
    base.loss.affinity = 0.0
    train.train_and_evaluate(base, tmp_path / "base")
    config = run_config(data_dir)
    config.init.update({"workdir": str(tmp_path / "base"), "keep": ("affinity_head/*",)})
    config.optim.frozen = BASE
    unbroken = train.train_and_evaluate(config, tmp_path / "unbroken")

    with killed_after(monkeypatch, 3):
        train.train_and_evaluate(config, tmp_path / "killed")
    train.train_and_evaluate(config, tmp_path / "killed")
    assert_bit_identical(tmp_path / "unbroken", tmp_path / "killed")
    plain = {k: v for k, v in unbroken.scalars.items() if k.startswith("plain/")}
    best = max(
        (line["eval/plain/miou"], line["step"], line)
        for line in lines(tmp_path / "base")
        if "eval/images" in line
    )[2]
    for key, value in plain.items():
        np.testing.assert_equal(
            best[f"eval/{key}"] if best[f"eval/{key}"] is not None else np.nan, value
        )
    state = saved(tmp_path / "unbroken", config.num_steps)
    assert not [
        k for k in state if k.startswith(("['average']", "['opt_state']")) and "encoder" in k
    ]
    model = segmenter.build(ml_collections.ConfigDict(config.model), 8)
    like = segmenter.abstract_variables(model)
    _, variables = checkpoint.read_variables(tmp_path / "unbroken", like)
    assert jax.tree.structure(variables) == jax.tree.structure(dict(like))


def test_preflight_says_what_frozen_parameters_save(data_dir, tmp_path, capsys):
    config = run_config(data_dir)
    config.optim.frozen = BASE
    report = preflight(config, tmp_path, "auto", search=False)
    shown = capsys.readouterr().out
    assert "nothing frozen" in shown
    programs = report["programs"]
    assert programs["nothing frozen"]["arguments"] > programs["training step"]["arguments"]
    assert programs["nothing frozen"]["flops"] > programs["training step"]["flops"]
