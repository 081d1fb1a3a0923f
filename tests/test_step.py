"""The training step: the same numbers however it is mapped, and a fault that stops everything."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dilaff_jax import affinity, losses, objective, optim, resize, step
from dilaff_jax.configs import default
from dilaff_jax.errors import UserError
from dilaff_jax.models import segmenter
from dilaff_jax.objective import Objective
from dilaff_jax.runtime import parallel, sharding
from tests import tiny

CLASSES = 4


def make_config(**model):
    config = tiny.model_config(default.get_config(), **model)
    config.batch_size = 8
    config.log_every = 3
    return config


def make_batch(seed=0, rows=8):
    """Random images; most labels of the first rows are ignored, so devices count unevenly."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, (rows, 32, 32)).astype(np.uint8)
    label[:5, :28] = 255
    label[0] = 255
    return {"image": rng.integers(0, 256, (rows, 32, 32, 3)).astype(np.uint8), "label": label}


def make(config, axis_name=parallel.AXIS, spread=1):
    model = segmenter.build(config.model, CLASSES, axis_name=axis_name)
    tx, _ = optim.optimiser(config.optim, 100)
    return model, step.TrainStep(config, model, CLASSES, tx, spread)


@functools.cache
def programs(config, mode, count, mesh=()):
    """Devices, initial state and step; `config` is frozen, so that tests share what is compiled."""
    devices = parallel.Devices(mode, count, mesh=dict(mesh), min_size=8)
    _, train_step = make(config, spread=devices.spread)
    seed = devices.replicate(step.seed_of(config))
    state = devices.place(jax.jit(train_step.init, static_argnums=0)((1, 32, 32, 3), seed))
    program = devices.map(train_step, out="state", shared=1)
    return devices, state, lambda state, batch: program(state, batch, seed)


def run(config, mode="pmap", count=1, steps=3, batches=None, mesh=()):
    """The state after some steps."""
    frozen = ml_collections.FrozenConfigDict(config)
    devices, state, program = programs(frozen, mode, count, mesh)
    for i in range(steps):
        state = program(state, devices.shard(batches[i] if batches else make_batch(i)))
    return jax.device_get(state)


def assert_same(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def one_device():
    return run(make_config())


@pytest.mark.parametrize(
    ("mode", "count"), [("pmap", 2), ("pmap", 4), ("shard_map", 1), ("shard_map", 4)]
)
def test_all_mappings_and_numbers_of_devices_give_the_same_state(mode, count, one_device):
    """With uneven ignore masks, synchronised BatchNorm, dropout and both losses."""
    assert_same(run(make_config(), mode, count), one_device)


MESHES = [(), (("data", 2), ("fsdp", 2)), (("data", 4), ("fsdp", 1))]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("change", [{}, {"accumulate": 2, "ema": 0.9, "name": "adamw"}])
def test_a_state_in_pieces_takes_the_same_steps(change, mesh):
    """With dropout, uneven ignore masks and synchronised BatchNorm, as above."""
    config = make_config()
    config.optim.update(change)
    expected = run(config, "pmap", 4, steps=2)
    found = run(config, "fsdp", 4, steps=2, mesh=mesh)
    assert_same(found, expected, 2e-5)


def test_parameters_moments_and_averages_lie_in_pieces_and_stay_there():
    config = make_config()
    config.optim.update({"name": "adamw", "ema": 0.9})
    devices, state, program = programs(ml_collections.FrozenConfigDict(config), "fsdp", 4)
    after = program(state, devices.shard(make_batch()))
    for part in (state, after):
        for tree in (part.params, part.opt_state, part.average["params"]):
            cut = [x for x in jax.tree.leaves(tree) if x.size >= 8 and max(x.shape) % 4 == 0]
            assert len(cut) > 5
            for x in cut:
                assert x.addressable_shards[0].data.size == x.size // 4
        for x in jax.tree.leaves((part.batch_stats, part.window, part.step, part.fault)):
            assert x.is_fully_replicated


@pytest.mark.parametrize(
    ("shape", "pieces", "expected"),
    [
        ((3, 3, 64, 128), 4, (None, None, None, "fsdp")),
        ((1024, 512), 8, ("fsdp",)),
        ((512, 512), 8, (None, "fsdp")),  # the last of equals
        ((7, 7, 3, 64), 3, (None, None, "fsdp")),
        ((4099, 5), 4, ()),  # nothing divides it
        ((64,), 4, ()),  # too small
        ((1024, 512), 1, ()),
    ],
)
def test_an_array_is_cut_along_its_largest_axis_that_the_pieces_divide(shape, pieces, expected):
    assert tuple(sharding.spec(shape, pieces, 4096)) == expected


@pytest.mark.parametrize("mesh", [{"data": 3, "fsdp": 1}, {"fsdp": 0}, {"model": 4}, {"data": "2"}])
def test_a_mesh_of_another_number_of_devices_is_refused(mesh):
    with pytest.raises(ValueError, match=r"parallel\.mesh is .*expected .* = 4"):
        parallel.Devices("fsdp", 4, mesh=mesh)
    with pytest.raises(ValueError, match="which is of mode 'fsdp', not 'pmap'"):
        parallel.Devices("pmap", 4, mesh=mesh)


@pytest.mark.parametrize("loss", ["ohem", "focal", "loss_max_pooling"])
def test_the_parts_of_every_loss_add_over_devices(loss):
    config = make_config(aux=True)
    config.loss.segmentation = loss
    config.loss.affinity_loss = {"loss_max_pooling": "max_pooling"}.get(loss, loss)
    config.loss.aaf = 0.1
    config.loss.refined = 0.5
    objective = jax.jit(Objective(config, make(config)[0], CLASSES))
    rng = np.random.default_rng(0)
    sizes = {
        "logits": (4, 4, CLASSES),
        "affinity_logits": (8, 8, 16),
        "aux_logits": (4, 4, CLASSES),
    }
    outputs = {k: rng.normal(size=(8, *s)).astype(np.float32) for k, s in sizes.items()}
    labels = make_batch()["label"]
    whole = objective(outputs, labels)
    assert set(whole) == {"segmentation", "auxiliary", "affinity", "aaf", "refined"}
    each = [
        objective({k: v[i : i + 2] for k, v in outputs.items()}, labels[i : i + 2])
        for i in (0, 2, 4, 6)
    ]
    for name, parts in whole.items():
        added = functools.reduce(lambda a, b: a + b, [found[name] for found in each])
        np.testing.assert_allclose(added.sum, parts.sum, rtol=2e-5)
        np.testing.assert_allclose(added.count, parts.count, rtol=2e-5)


def test_a_loss_is_the_global_sum_over_the_global_count():
    """By hand: the mean over devices of their means is another number here."""
    config = make_config()
    batch = make_batch()
    model, _ = make(config, axis_name=None)
    devices, state, program = programs(ml_collections.FrozenConfigDict(config), "pmap", 4)
    # Decided logits, so that pixels differ in their loss.
    params = jax.tree.map(jnp.array, state.params)
    params["decoder"]["logits"]["kernel"] *= 300
    state = devices.replicate(state.replace(params=params))
    outputs, _ = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(
        {"params": state.params, "batch_stats": state.batch_stats},
        batch["image"],
        rngs={"dropout": jax.random.fold_in(jax.random.key(config.seed), 0)},
    )
    logits = resize.bilinear(outputs["logits"], (32, 32))
    valid = batch["label"] != 255
    log_p = np.asarray(jax.nn.log_softmax(logits))
    own = np.take_along_axis(log_p, np.where(valid, batch["label"], 0)[..., None], -1)[..., 0]
    expected = -(own * valid).sum() / valid.sum()
    found = program(state, devices.shard(batch)).window.losses
    np.testing.assert_allclose(found["segmentation"], expected, rtol=1e-4)
    per_device = [
        -(own * valid)[i : i + 2].sum() / max(1, valid[i : i + 2].sum()) for i in (0, 2, 4, 6)
    ]
    assert abs(np.mean(per_device) - expected) > 0.01 * expected
    coarse = affinity.downsample_labels(batch["label"], outputs["affinity_logits"].shape[1:3])
    target, edge_valid = affinity.targets(coarse, model.offsets)
    balanced = losses.affinity_balanced(outputs["affinity_logits"], target, edge_valid, 2)
    np.testing.assert_allclose(found["affinity"], losses.finish(balanced), rtol=1e-5)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    config = make_config(norm="group", decoder_options={"dropout": 0.0})
    whole = run(config, count=2)
    config.optim.accumulate = 4
    parts = run(config, count=2)
    assert_same(parts.params, whole.params, 1e-6)
    np.testing.assert_array_equal(parts.window.confusion, whole.window.confusion)


def test_pairs_weigh_by_class_where_the_config_says_so():
    config = make_config(norm="group", decoder_options={"dropout": 0.0})
    plain = run(config, count=1)
    config.loss.affinity_class_weights = (1.0,) * CLASSES
    same = run(config, count=1)
    assert same.window.losses["affinity"] == plain.window.losses["affinity"]
    config.loss.affinity_class_weights = tuple(float(1 + c) for c in range(CLASSES))
    weighted = run(config, count=1)
    assert weighted.window.losses["affinity"] != plain.window.losses["affinity"]
    config.optim.accumulate = 2
    parts = run(config, count=1)
    assert_same(parts.params, weighted.params, 1e-6)


def test_strips_of_void_are_closed_for_affinities_alone():
    config = make_config()
    model, _ = make(config)
    rng = np.random.default_rng(0)
    outputs = {
        "logits": rng.normal(size=(8, 4, 4, CLASSES)).astype(np.float32),
        "affinity_logits": rng.normal(size=(8, 8, 8, 16)).astype(np.float32),
    }
    labels = make_batch()["label"]
    labels[5:, 10:14] = 255
    found = {}
    for reach in (0, 2):
        config.loss.void_strip = reach
        found[reach] = jax.jit(Objective(config, model, CLASSES))(outputs, labels)
        if not reach:
            by_hand = jax.jit(Objective(config, model, CLASSES))(
                outputs, affinity.close_void(labels, 2)
            )
    np.testing.assert_allclose(found[2]["affinity"].sum, by_hand["affinity"].sum, rtol=1e-6)
    assert found[2]["affinity"].count.sum() > found[0]["affinity"].count.sum()
    np.testing.assert_array_equal(found[2]["segmentation"].sum, found[0]["segmentation"].sum)


def test_class_weights_of_pairs_have_to_fit():
    config = make_config()
    config.loss.affinity_class_weights = (1.0, 2.0)
    with pytest.raises(ValueError, match=r"has 2 numbers; expected one for each of \d+ classes"):
        run(config, count=1)
    config.loss.affinity_loss = "ohem"
    with pytest.raises(ValueError, match="'ohem' mines its edges and takes no"):
        make(config)


def test_accumulation_refuses_a_loss_that_mines():
    config = make_config()
    config.optim.accumulate = 2
    config.loss.segmentation = "ohem"
    with pytest.raises(ValueError, match=r"optim.accumulate is 2 .* mines by the predictions"):
        make(config)


def test_the_moving_average_follows_the_parameters():
    config = make_config()
    config.optim.ema = 0.9
    states = [run(config, steps=n) for n in (0, 1, 2)]
    average = states[0].params
    for state in states[1:]:
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state.params)
    assert_same(states[2].average["params"], average)
    evaluated, average = (
        jax.tree.leaves(x["params"]) for x in (states[2].evaluated, states[2].average)
    )
    assert all(a is b for a, b in zip(evaluated, average, strict=True))


def test_the_window_sums_since_the_last_report():
    losses_of = [run(make_config(), steps=n).window for n in (1, 2, 3, 4)]
    assert [int(w.steps) for w in losses_of] == [1, 2, 3, 1]
    valid = [(make_batch(i)["label"][:, 4::8, 4::8] != 255).sum() for i in range(4)]
    assert [int(w.confusion.sum()) for w in losses_of] == [*np.cumsum(valid[:3]), valid[3]]


def test_the_plain_baseline_has_no_affinity_term():
    config = make_config(affinity=None)
    config.loss.affinity = 0.0
    assert set(run(config, steps=1).window.losses) == {"total", "segmentation"}


def test_soft_targets_and_auxiliary_head_enter_the_total():
    config = make_config(aux=True)
    config.loss.soft_targets = True
    window = run(config, steps=1).window
    weights = {"segmentation": 1.0, "auxiliary": 0.4, "affinity": 1.0}
    assert set(window.losses) == {"total", *weights}
    total = sum(w * window.losses[k] for k, w in weights.items())
    np.testing.assert_allclose(window.losses["total"], total, rtol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "cross_entropy + 2*dice"])
def test_coarser_steps_of_the_decoder_count_half_and_a_quarter(loss):
    """Against the losses of each, one by one."""
    options = {"widths": (12, 8, 6), "deep_supervision": True, "dropout": 0.0}
    config = make_config(decoder="unet", decoder_options=options, affinity=None)
    config.loss.update({"affinity": 0.0, "segmentation": loss, "deep": 0.5})
    model, _ = make(config, axis_name=None)
    batch = make_batch()
    variables = model.init(jax.random.key(0), batch["image"], train=False)
    outputs = model.apply(variables, batch["image"], train=False)
    assert len(outputs["deep_logits"]) == 2
    objective = Objective(config, model, CLASSES)
    terms = objective(outputs, batch["label"])
    assert objective.weights["deep"] == 0.5
    expected = 0.0
    for step_, coarser in enumerate(outputs["deep_logits"], start=1):
        full = resize.bilinear(coarser, (32, 32))
        value = losses.finish(losses.cross_entropy(full, batch["label"]))
        if "dice" in loss:
            value += 2 * losses.finish(losses.dice(full, batch["label"]))
        expected += value / 2**step_
    assert losses.finish(terms["deep"]) == pytest.approx(float(expected), rel=1e-4)
    # Four devices, and parts of a batch, take the same steps.
    one = run(config, steps=2)
    assert set(one.window.losses) >= {"total", "deep"}
    assert_same(run(config, "shard_map", 4, steps=2), one, 2e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0, 2.0]),
        ("linear", [2.0, 1.5, 1.0, 0.5]),
        ("cosine", [2.0, 2 * (1 + math.cos(math.pi / 4)) / 2, 1.0, 1 + math.cos(0.75 * math.pi)]),
    ],
)
def test_the_weight_of_the_affinity_falls_by_its_schedule(schedule, expected):
    """What the total holds of it in each step of a run of four."""
    config = make_config()
    config.num_steps, config.log_every = 4, 1
    config.loss.update({"affinity": 2.0, "affinity_schedule": schedule})
    for steps, weight in enumerate(expected, start=1):
        found = run(config, steps=steps).window.losses
        assert found["total"] - found["segmentation"] == pytest.approx(
            weight * found["affinity"], rel=1e-4
        )


def test_semantic_boundaries_are_a_term_of_their_own_and_train_the_encoder():
    config = make_config(affinity=None, boundaries={"sides": ("stride2", "stride4")})
    config.loss.update({"affinity": 0.0, "boundaries": 0.5})
    with_them, without = run(config, steps=2), make_config(affinity=None)
    without.loss.affinity = 0.0
    losses_ = with_them.window.losses
    assert set(losses_) == {"total", "segmentation", "boundaries"}
    assert losses_["total"] == pytest.approx(
        losses_["segmentation"] + 0.5 * losses_["boundaries"], rel=1e-5
    )
    plain = run(without, steps=2)
    changed = [
        np.abs(a - b).max()
        for a, b in zip(
            jax.tree.leaves(with_them.params["encoder"]),
            jax.tree.leaves(plain.params["encoder"]),
            strict=True,
        )
    ]
    assert max(changed) > 1e-4
    assert_same(run(config, "shard_map", 4, steps=2), with_them)
    config.optim.accumulate = 2
    assert set(run(config, steps=1).window.losses) == {"total", "segmentation", "boundaries"}


def test_without_their_weight_there_is_no_head_of_boundaries():
    config = make_config(boundaries={})
    config.loss.boundaries = 0.0
    assert segmenter.config_of_run(config).boundaries is None


def poison(state, where):
    params = jax.tree.map(jnp.array, state.params)
    params["encoder"]["conv0"]["conv"]["kernel"] *= where
    return state.replace(params=params)


def test_a_step_that_is_not_finite_changes_nothing_and_is_named():
    config = make_config()
    config.optim.ema = 0.5
    devices, state, program = programs(ml_collections.FrozenConfigDict(config), "pmap", 2)
    state = program(state, devices.shard(make_batch()))
    broken = {**make_batch(1), "image": make_batch(1)["image"].astype(np.float32)}
    broken["image"][3, 5, 5, 0] = np.inf
    after = program(state, devices.shard(broken))
    later = program(after, devices.shard(make_batch(2)))
    for name in ("params", "batch_stats", "opt_state", "average", "window"):
        for found in (after, later):
            for x, y in zip(
                jax.tree.leaves(getattr(found, name)),
                jax.tree.leaves(getattr(state, name)),
                strict=True,
            ):
                np.testing.assert_array_equal(x, y)
    message = step.fault_message(jax.device_get(later.fault))
    assert message.startswith("step 2: NaN or infinity, first in: image")
    assert step.fault_message(jax.device_get(state.fault)) is None


def test_a_parameter_that_is_not_finite_is_named_as_the_source():
    frozen = ml_collections.FrozenConfigDict(make_config())
    devices, state, program = programs(frozen, "pmap", 1)
    state = program(devices.replicate(poison(state, np.nan)), devices.shard(make_batch()))
    assert "first in: parameters" in step.fault_message(jax.device_get(state.fault))


def weighted_config(weights):
    config = make_config()
    config.loss.segmentation_options = {"class_weights": weights}
    return config


def test_class_weights_by_median_frequency_follow_the_pixels_of_the_data():
    config = weighted_config("median_frequency")
    found = objective.with_class_weights(config, np.array([900, 100, 25, 0]))
    # Of the three classes that there are, the middle one has 100 pixels.
    expected = (1 / 3, 1.0, 2.0, 1.0)
    np.testing.assert_allclose(found.loss.segmentation_options.class_weights, expected)
    assert config.loss.segmentation_options.class_weights == "median_frequency"
    numbers = weighted_config((1.0, 2.0))
    assert objective.with_class_weights(numbers, None).to_json() == numbers.to_json()
    with pytest.raises(
        ValueError, match="is 'balanced'; give one number for each class, or 'median"
    ):
        objective.with_class_weights(weighted_config("balanced"), np.ones(4))
    with pytest.raises(ValueError, match="prepared without counts of its pixels"):
        objective.with_class_weights(config, None)


@pytest.mark.parametrize("name", objective.REGION_LOSSES)
def test_a_sum_of_losses_trains_the_same_on_all_devices_and_in_microbatches(name):
    config = make_config(norm="group", decoder_options={"dropout": 0.0})
    config.loss.segmentation = f"cross_entropy + 0.5*{name}"
    one = run(config, steps=2)
    assert {"cross_entropy", name} < one.window.losses.keys()
    assert int(one.fault[0]) == -1
    # Which of two pixels that nearly tie is the largest is for rounding to say.
    bound = 1e-4 if name == "boundary" else 1e-5
    assert_same(run(config, "pmap", 4, steps=2), one, bound)
    config.optim.accumulate = 2
    assert_same(run(config, count=2, steps=2).params, one.params, bound)


def test_which_of_several_losses_was_not_finite_is_named():
    names = ["cross_entropy", "dice"]
    bits = sum(1 << step.SOURCES.index(name) for name in names)
    assert "first in: cross_entropy (in all: cross_entropy, dice)" in step.fault_message((4, bits))


@pytest.mark.parametrize(
    "text",
    ["dice+", "dice + dice", "-1*dice", "0*dice", "inf*dice", "x*dice", "2 dice", "dice*2", ""],
)
def test_what_is_no_sum_of_losses_is_refused(text):
    config = make_config()
    config.loss.segmentation = text
    with pytest.raises(ValueError, match="or a sum of several such as 'cross_entropy"):
        make(config)


def test_a_sum_of_losses_is_the_weighted_sum_of_each_and_reports_each():
    config = make_config()
    config.loss.segmentation = "cross_entropy + 0.5*dice+2 * lovasz_softmax"
    weights = tuple(range(1, CLASSES + 1))
    with config.loss.ignore_type():
        config.loss.segmentation_options = {
            "cross_entropy": {"class_weights": weights},
            "dice": {"smooth": 3.0},
        }
    model, _ = make(config)
    found = Objective(config, model, CLASSES)
    assert found.weights == {
        "cross_entropy": 1.0,
        "dice": 0.5,
        "lovasz_softmax": 2.0,
        "affinity": 1.0,
    }
    batch = make_batch()
    logits = np.random.default_rng(1).normal(size=(8, 4, 4, CLASSES)).astype(np.float32)
    outputs = {"logits": logits, "affinity_logits": np.zeros((8, 8, 8, 16), np.float32)}
    terms = found(outputs, batch["label"])
    full = resize.bilinear(logits, (32, 32))
    expected = {
        "cross_entropy": losses.cross_entropy(full, batch["label"], class_weights=weights),
        "dice": losses.dice(full, batch["label"], smooth=3.0),
        "lovasz_softmax": losses.lovasz_softmax(full, batch["label"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(
            losses.finish(terms[name]), losses.finish(value), rtol=1e-5, err_msg=name
        )
    config.loss.segmentation_options.focal = {}
    with pytest.raises(ValueError, match=r"has 'focal'.*by its name: cross_entropy, dice, lovasz"):
        make(config)


@pytest.mark.parametrize(
    ("loss", "model", "message"),
    [
        (
            {"segmentation": "hinge"},
            {},
            "loss.segmentation is 'hinge'; expected one of 'cross_entropy', .*, or a sum of",
        ),
        (
            {"affinity_loss": "hinge"},
            {},
            "loss.affinity_loss is 'hinge'; expected one of 'balanced'",
        ),
        ({"affinity": -1.0}, {}, "loss.affinity is -1.0; expected 0 or more"),
        ({}, {"affinity": None}, r"need an affinity head: set model\.affinity"),
    ],
)
def test_bad_loss_options_are_refused(loss, model, message):
    config = make_config(**model)
    config.loss.update(loss)
    with pytest.raises(ValueError, match=message):
        make(config)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"parallel.devices is 9; this process has 4 devices"):
        parallel.Devices("pmap", 9)
    with pytest.raises(ValueError, match=r"parallel\.mode is 'jit'"):
        parallel.Devices("jit")
    with pytest.raises(ValueError, match="batch_size is 6; 4 devices need a multiple of 4"):
        parallel.Devices("pmap", 4).per_process(6)
    with pytest.raises(ValueError, match="image has 3 rows; 2 local devices need a multiple"):
        parallel.Devices("pmap", 2).shard({"image": np.zeros((3, 1))})


def test_local_rows_come_back_in_the_order_of_the_batch():
    rows = np.arange(8.0).reshape(8, 1)
    for mode in ("pmap", "shard_map"):
        devices = parallel.Devices(mode, 4)
        program = devices.map(lambda s, b: b["x"] + s, out="sharded")
        found = program(devices.replicate(jnp.ones(())), devices.shard({"x": rows}))
        np.testing.assert_array_equal(devices.local_rows(found), rows + 1)


def test_runs_that_differ_in_their_seed_share_a_program_and_differ():
    texts, losses = set(), set()
    for number in (0, 1, 2):
        config = make_config()
        config.seed = number
        _, train_step = make(config)
        seed = step.seed_of(config)
        start = jax.jit(train_step.init, static_argnums=0)
        devices = parallel.Devices("pmap", 1)
        state = devices.replicate(start((1, 32, 32, 3), seed))
        program = devices.map(train_step, out="replicated", shared=1)
        lowered = program.lower(state, devices.shard(make_batch()), seed)
        texts.add((start.lower((1, 32, 32, 3), seed).as_text(), lowered.as_text()))
        losses.add(float(program(state, devices.shard(make_batch()), seed).window.losses["total"]))
    assert len(texts) == 1
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("model", "rows", "accumulate", "count", "refused"),
    [
        ({"decoder": "deeplabv3"}, 1, 1, 1, True),
        ({"decoder": "deeplabv3"}, 2, 2, 1, True),
        ({"decoder": "deeplabv3"}, 2, 1, 1, False),
        ({"decoder": "deeplabv3"}, 2, 1, 2, False),
        ({"decoder": "deeplabv3", "norm": "group"}, 1, 1, 1, False),
        ({"decoder": "deeplabv3", "frozen_norm": True}, 1, 1, 1, False),
        ({"decoder": "fcn"}, 1, 1, 1, False),
    ],
)
def test_batch_norm_of_a_single_value_is_refused(model, rows, accumulate, count, refused):
    """One image in a step leaves the pooled branch one value a channel, whose variance is 0."""
    config = make_config(**model)
    config.optim.accumulate = accumulate
    _, train_step = make(config)
    devices = parallel.Devices("shard_map", count)
    seed = devices.replicate(step.seed_of(config))
    state = devices.replicate(jax.jit(train_step.init, static_argnums=0)((1, 32, 32, 3), seed))
    program = devices.map(train_step, out="replicated", shared=1)
    batch = devices.shard(make_batch(rows=rows))
    if refused:
        with pytest.raises(
            UserError, match=r"BatchNorm of .*sees one pixel of one image in a step"
        ):
            jax.eval_shape(program, state, batch, seed)
    else:
        jax.eval_shape(program, state, batch, seed)
