"""The refinement operators: their mathematical properties, and three independent oracles."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from dilaff_jax import affinity as affinity_lib
from dilaff_jax import propagate
from tests import oracles

ORDERS = ["joint", "coarse_to_fine", "fine_to_coarse"]
SEEDS = st.integers(0, 2**32 - 1)


def problem(seed, spatial=(9, 7), classes=3, dilations=(1, 2), scale=3.0):
    """Random probabilities, affinity logits and offsets, batch of one."""
    rng = np.random.default_rng(seed)
    offsets = affinity_lib.offsets(dilations, len(spatial))
    probs = rng.dirichlet(np.ones(classes), (1, *spatial)).astype(np.float32)
    logits = (scale * rng.standard_normal((1, *spatial, len(offsets)))).astype(np.float32)
    return probs, logits, offsets


def sigmoid(x):
    return np.asarray(jax.nn.sigmoid(x))


# The walk's properties, from DESIGN's list of what must hold.


@pytest.mark.parametrize("order", ORDERS)
@hypothesis.given(seed=SEEDS, restart=st.floats(0, 1), self_weight=st.floats(0, 10))
def test_the_walk_keeps_the_simplex(order, seed, restart, self_weight):
    probs, logits, offsets = problem(seed)
    refined = propagate.random_walk(
        probs, sigmoid(logits), offsets, restart=restart, self_weight=self_weight, order=order
    )
    assert (np.asarray(refined) >= 0).all()
    np.testing.assert_allclose(np.sum(refined, axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@hypothesis.given(seed=SEEDS)
def test_a_constant_map_is_a_fixed_point_because_rows_sum_to_one(order, seed):
    _, logits, offsets = problem(seed)
    constant = np.full((1, 9, 7, 2), 0.37, np.float32)
    refined = propagate.random_walk(constant, sigmoid(logits), offsets, steps=5, order=order)
    np.testing.assert_allclose(refined, constant, rtol=2e-6)


@pytest.mark.parametrize("order", ORDERS)
@hypothesis.given(seed=SEEDS, self_weight=st.sampled_from([0.0, 0.3, 1.0, 7.0]))
def test_zero_affinity_is_the_identity_exactly(order, seed, self_weight):
    probs, logits, offsets = problem(seed)
    refined = propagate.random_walk(
        probs, np.zeros_like(logits), offsets, self_weight=self_weight, order=order
    )
    np.testing.assert_array_equal(refined, probs)


@hypothesis.given(seed=SEEDS, threshold=st.floats(0.1, 0.9))
def test_an_edge_not_above_the_threshold_is_closed(seed, threshold):
    probs, logits, offsets = problem(seed)
    at_most = np.minimum(sigmoid(logits), np.float32(threshold))
    refined = propagate.random_walk(probs, at_most, offsets, threshold=np.float32(threshold))
    np.testing.assert_array_equal(refined, probs)


@pytest.mark.parametrize("order", ORDERS)
@hypothesis.given(seed=SEEDS)
def test_the_maximum_principle_holds_per_channel(order, seed):
    _, logits, offsets = problem(seed)
    x = np.random.default_rng(seed).normal(size=(1, 9, 7, 4)).astype(np.float32)
    refined = np.asarray(propagate.random_walk(x, sigmoid(logits), offsets, steps=4, order=order))
    low, high = x.min(axis=(1, 2)), x.max(axis=(1, 2))
    assert (refined.min(axis=(1, 2)) >= low - 1e-5).all()
    assert (refined.max(axis=(1, 2)) <= high + 1e-5).all()


@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("name", ["random_walk", "signed"])
@hypothesis.given(seed=SEEDS)
def test_flips_are_equivariant_with_the_offset_channels_permuted(name, axes, seed):
    probs, logits, offsets = problem(seed)
    flipped = offsets * [-1 if axis + 1 in axes else 1 for axis in range(2)]
    order = [int((offsets == o).all(axis=1).argmax()) for o in flipped]
    assert order != list(range(len(offsets)))
    refine = propagate.operator(name)
    there = refine(np.flip(probs, axes), np.flip(logits, axes)[..., order], offsets)
    np.testing.assert_allclose(np.flip(there, axes), refine(probs, logits, offsets), atol=1e-6)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_open_edges_of_one_dilation_give_the_dilated_nine_tap_mean(dilation):
    probs, logits, offsets = problem(0, (8, 11), dilations=(dilation,))
    refined = propagate.random_walk(probs, np.ones_like(logits), offsets, steps=1)
    x = torch.from_numpy(probs).permute(0, 3, 1, 2)
    taps = functools.partial(
        torch.nn.functional.conv2d, padding=dilation, dilation=dilation, groups=3
    )
    kernel = torch.ones(3, 1, 3, 3)
    # Renormalised at borders: the sum of the taps that are inside, over their number.
    mean = taps(x, kernel) / taps(torch.ones_like(x), kernel)
    np.testing.assert_allclose(refined, mean.permute(0, 2, 3, 1), atol=1e-6)


def test_full_restart_is_the_identity_and_zero_steps_too():
    probs, logits, offsets = problem(0)
    for options in ({"restart": 1.0}, {"steps": 0}):
        refined = propagate.random_walk(probs, sigmoid(logits), offsets, **options)
        np.testing.assert_array_equal(refined, probs)


@hypothesis.given(seed=SEEDS)
def test_with_oracle_affinity_disturbing_one_component_never_changes_another(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (1, 12, 10))
    labels[:, 5:7] = 2  # a bar two pixels wide parts what dilation 1 could join
    offsets = affinity_lib.offsets((1,))
    target, _ = affinity_lib.targets(labels, offsets)
    probs = rng.dirichlet(np.ones(3), labels.shape).astype(np.float32)
    disturbed = probs.copy()
    disturbed[:, :5] = rng.dirichlet(np.ones(3), (1, 5, 10))
    walk = functools.partial(propagate.random_walk, affinity=target, offsets=offsets, steps=5)
    before, after = np.asarray(walk(probs)), np.asarray(walk(disturbed))
    np.testing.assert_array_equal(before[:, 5:], after[:, 5:])
    assert not np.array_equal(before[:, :5], after[:, :5])


def test_oracle_affinity_corrects_a_noisy_segmentation_in_the_aggregate():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 4, (16, 4, 4)), np.ones((8, 8), int))
    offsets = affinity_lib.offsets((1, 2, 4, 8))
    target, _ = affinity_lib.targets(labels, offsets)
    noisy = jax.nn.softmax(jax.nn.one_hot(labels, 4) + rng.normal(size=(*labels.shape, 4)))
    refined = propagate.random_walk(noisy, target, offsets)
    accuracy = [float(np.mean(np.argmax(p, -1) == labels)) for p in (noisy, refined)]
    assert accuracy[0] < 0.7
    assert accuracy[1] > 0.98


# The signed operator.


@hypothesis.given(seed=SEEDS, strength=st.floats(0, 5), bias=st.floats(-5, 5))
def test_signed_keeps_the_simplex(seed, strength, bias):
    probs, logits, offsets = problem(seed)
    refined = propagate.signed(probs, logits, offsets, strength=strength, bias=bias)
    assert (np.asarray(refined) >= 0).all()
    np.testing.assert_allclose(np.sum(refined, axis=-1), 1, atol=1e-5)


def test_without_repulsion_no_pixel_is_pushed_from_what_all_around_it_say():
    """Every pair is said to differ inside one object: repulsion breaks it, attraction cannot."""
    probs = np.broadcast_to(np.float32([0.5, 0.4, 0.1]), (1, 6, 6, 3))
    offsets = affinity_lib.offsets((1, 2))
    logits = np.full((1, 6, 6, len(offsets)), -3.0, np.float32)
    broken = propagate.signed(probs, logits, offsets, strength=0.2)
    kept = propagate.signed(probs, logits, offsets, strength=0.2, repulsion=0.0)
    assert (np.asarray(broken).argmax(-1) != 0).any()
    np.testing.assert_allclose(kept, probs, atol=1e-6)


def test_signed_without_strength_is_the_identity():
    probs, logits, offsets = problem(0)
    refined = propagate.signed(probs, logits, offsets, strength=0.0)
    np.testing.assert_allclose(refined, probs, atol=1e-6)


def test_negative_evidence_pushes_neighbours_apart():
    probs = np.array([[[[0.55, 0.45], [0.9, 0.1]]]], np.float32)
    offsets = affinity_lib.offsets((1,))
    logits = np.full((1, 1, 2, 8), -10, np.float32)
    signed = np.asarray(propagate.signed(probs, logits, offsets, strength=0.2))
    walked = np.asarray(propagate.random_walk(probs, sigmoid(logits), offsets))
    assert signed[0, 0].argmax(-1).tolist() == [1, 0]
    assert walked[0, 0].argmax(-1).tolist() == [0, 0]


def test_a_bias_per_dilation_reaches_all_its_offsets():
    probs, logits, offsets = problem(0)
    per_dilation = propagate.signed(probs, logits, offsets, bias=np.array([1.0, -2.0]))
    shifted = logits - np.repeat([1.0, -2.0], 8).astype(np.float32)
    np.testing.assert_allclose(per_dilation, propagate.signed(probs, shifted, offsets), atol=1e-6)


def test_a_probability_of_zero_stays_finite():
    _, logits, offsets = problem(0)
    probs = np.zeros((1, 9, 7, 3), np.float32)
    probs[..., 0] = 1
    assert np.isfinite(propagate.signed(probs, logits, offsets)).all()


# Oracles.

SIZES = [(1, 1), (1, 7), (7, 1), (13, 5), (6, 9)]


@pytest.mark.parametrize("spatial", SIZES)
@pytest.mark.parametrize(
    "options", [{}, {"sharpness": 3.0, "restart": 0.3}, {"threshold": 0.5, "self_weight": 0.0}]
)
def test_the_walk_equals_plain_loops(spatial, options):
    # Dilation 8 exceeds every one of these images.
    probs, logits, offsets = problem(3, spatial, dilations=(1, 3, 8))
    found = propagate.random_walk(probs, sigmoid(logits), offsets, steps=3, **options)
    expected = oracles.loop_random_walk(probs[0], sigmoid(logits)[0], offsets, steps=3, **options)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize("spatial", SIZES)
@pytest.mark.parametrize("options", [{}, {"bias": -2.0}, {"bias": -1.0, "repulsion": 0.3}])
def test_signed_equals_plain_loops(spatial, options):
    probs, logits, offsets = problem(4, spatial, dilations=(1, 3, 8))
    options = {"steps": 4, "strength": 0.2, **options}
    found = propagate.signed(probs, logits, offsets, **options)
    expected = oracles.loop_signed(probs[0], logits[0], offsets, **options)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spatial", "classes"),
    [((513, 5), 1), ((5, 513), 21), ((33, 29), 150), ((1, 7), 2), ((1, 1), 1)],
)
def test_the_walk_equals_the_sparse_row_stochastic_product(spatial, classes):
    probs, logits, offsets = problem(5, spatial, classes, (1, 2, 4, 8))
    found = propagate.random_walk(probs, sigmoid(logits), offsets, steps=4)
    expected = oracles.csr_random_walk(probs[0], sigmoid(logits)[0], offsets, steps=4)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize(("spatial", "classes"), [((17, 23), 21), ((1, 7), 2), ((1, 1), 1)])
def test_the_walk_equals_torch_shift_and_add(spatial, classes):
    probs, logits, offsets = problem(5, spatial, classes, (1, 2, 4, 8))
    found = propagate.random_walk(probs, sigmoid(logits), offsets, steps=4, self_weight=0.5)
    channels_first = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (probs, sigmoid(logits)))
    expected = oracles.torch_random_walk(*channels_first, offsets, steps=4, self_weight=0.5)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_a_sweep_is_one_walk_per_dilation_in_turn():
    probs, logits, offsets = problem(6, (12, 11), dilations=(2, 1, 4))
    affinity = sigmoid(logits)
    for order, dilations in (("coarse_to_fine", (4, 2, 1)), ("fine_to_coarse", (1, 2, 4))):
        expected = probs[0]
        for _ in range(2):
            for d in dilations:
                channels = affinity_lib.dilation_of(offsets) == d
                expected = oracles.csr_random_walk(
                    expected, affinity[0][..., channels], offsets[channels], steps=1
                )
        found = propagate.random_walk(probs, affinity, offsets, steps=2, order=order)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_a_sweep_takes_the_neighbours_of_long_voxels():
    """A walk for each dilation, one after the other, as sparse products; 1 × 2 × 2 and 1 × 4 × 4."""
    offsets = affinity_lib.offsets((2, 4), 3, spacing=(9, 1, 1))
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), size=(1, 4, 7, 6)).astype(np.float32)
    weights = rng.random((1, 4, 7, 6, 52), dtype=np.float32)
    for order, blocks in (("fine_to_coarse", (0, 1)), ("coarse_to_fine", (1, 0))):
        expected = probs[0]
        for block in blocks:
            own = slice(26 * block, 26 * (block + 1))
            expected = oracles.csr_random_walk(
                expected, weights[0, ..., own], offsets[own], steps=1
            )
        found = propagate.random_walk(probs, weights, offsets, steps=1, order=order)
        np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_a_volume_walks_along_its_twenty_six_neighbours():
    probs, logits, offsets = problem(7, (5, 6, 4), dilations=(1, 2))
    assert offsets.shape == (52, 3)
    affinity = sigmoid(logits)
    found = propagate.random_walk(probs, affinity, offsets, steps=3)
    expected = oracles.csr_random_walk(probs[0], affinity[0], offsets, steps=3)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    signed = propagate.signed(probs, logits, offsets, steps=2, strength=0.05)
    looped = oracles.loop_signed(probs[0], logits[0], offsets, steps=2, strength=0.05)
    np.testing.assert_allclose(signed[0], looped, atol=1e-5)


def test_a_sequence_walks_along_its_two_neighbours():
    probs, logits, offsets = problem(8, (30,), dilations=(1, 5))
    found = propagate.random_walk(probs, sigmoid(logits), offsets, steps=3, order="fine_to_coarse")
    expected = probs[0]
    for _ in range(3):
        for channels in (slice(0, 2), slice(2, 4)):
            expected = oracles.csr_random_walk(
                expected, sigmoid(logits)[0][..., channels], offsets[channels], steps=1
            )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_a_clip_carries_a_segmentation_from_frame_to_frame():
    """Time x height x width: one sure frame labels a bar that moves through five unsure ones."""
    labels = np.zeros((5, 12, 12), int)
    for t in range(5):
        labels[t, :, 2 + t : 5 + t] = 1
    offsets = affinity_lib.offsets((1,), ndim=3)
    target, _ = affinity_lib.targets(labels, offsets)
    probs = np.full((1, 5, 12, 12, 2), 0.5, np.float32)
    probs[0, 2] = np.eye(2)[labels[2]]
    refined = propagate.random_walk(probs, target[None], offsets, steps=4)
    np.testing.assert_array_equal(np.argmax(refined[0], -1), labels)


def test_a_batch_is_refined_image_by_image():
    first, second = problem(1), problem(2)
    offsets = first[2]
    both = [np.concatenate(pair) for pair in zip(first[:2], second[:2], strict=True)]
    for name in ("random_walk", "signed"):
        refine = propagate.operator(name)
        together = refine(*both, offsets)
        np.testing.assert_allclose(together[0], refine(*first)[0], atol=1e-6)
        np.testing.assert_allclose(together[1], refine(*second)[0], atol=1e-6)


def test_lower_precision_is_refined_in_float32():
    probs, logits, offsets = problem(0)
    for name in ("random_walk", "signed", "identity"):
        refined = propagate.operator(name)(
            jnp.asarray(probs, jnp.bfloat16), jnp.asarray(logits, jnp.bfloat16), offsets
        )
        assert refined.dtype == jnp.float32


# Gradients and memory.


@pytest.mark.parametrize("order", ORDERS)
def test_finite_differences_agree_with_the_gradient_of_the_walk(order):
    probs, logits, offsets = problem(9, (6, 5), dilations=(1, 2), scale=1.0)

    def walk(probs, affinity, sharpness, self_weight, restart):
        return propagate.random_walk(
            probs, affinity, offsets, steps=3, sharpness=sharpness,
            self_weight=self_weight, restart=restart, order=order,
        )  # fmt: skip

    arguments = (probs, sigmoid(logits), 1.5, 0.7, 0.2)
    jax.test_util.check_grads(walk, arguments, order=1, modes=["rev"], rtol=2e-2, eps=1e-2)


def test_finite_differences_agree_with_the_gradient_of_signed():
    probs, logits, offsets = problem(9, (6, 5), dilations=(1, 2), scale=1.0)

    def refine(probs, logits, strength, bias):
        return propagate.signed(probs, logits, offsets, steps=3, strength=strength, bias=bias)

    jax.test_util.check_grads(
        refine, (probs, logits, 0.1, 0.5), order=1, modes=["rev"], rtol=2e-2, eps=1e-3
    )


@pytest.mark.parametrize("name", ["random_walk", "signed"])
def test_pairs_that_leave_the_image_get_exactly_zero_gradient(name):
    probs, logits, offsets = problem(10, (6, 5), dilations=(1, 4))
    refine = propagate.operator(name)
    weights = np.random.default_rng(0).normal(size=probs.shape)
    gradient = jax.grad(lambda x: jnp.sum(refine(probs, x, offsets) * weights))(logits)
    inside = np.asarray(affinity_lib.inside((6, 5), offsets))
    assert (np.asarray(gradient[0])[~inside] == 0).all()
    assert (np.asarray(gradient[0])[inside] != 0).mean() > 0.9


def test_closed_edges_give_finite_gradients():
    probs, logits, offsets = problem(11)
    affinity = np.where(logits > 0, 1.0, 0.0).astype(np.float32)
    gradient = jax.grad(lambda a: propagate.random_walk(probs, a, offsets, sharpness=0.5).sum())
    assert np.isfinite(gradient(affinity)).all()


def memory(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["random_walk", "signed"])
def test_inference_memory_does_not_grow_with_the_steps(name):
    probs, logits, offsets = problem(0, (64, 64), 21, (1, 2, 4, 8))
    few, many = (
        memory(
            lambda p, a, s=steps: propagate.operator(name, steps=s)(p, a, offsets), probs, logits
        )
        for steps in (2, 12)
    )
    assert many <= few


@pytest.mark.parametrize("name", ["random_walk", "signed"])
def test_training_memory_grows_by_one_map_a_step_not_by_one_an_offset(name):
    probs, logits, offsets = problem(0, (64, 64), 21, (1, 2, 4, 8))

    def loss(p, a, steps):
        return jnp.sum(propagate.operator(name, steps=steps)(p, a, offsets) ** 2)

    few, many = (
        memory(jax.grad(functools.partial(loss, steps=steps), (0, 1)), probs, logits)
        for steps in (2, 12)
    )
    assert many - few <= 1.5 * 10 * probs.nbytes


# Refinement of logits.


def test_refined_logits_are_labels_and_probabilities_at_full_resolution():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 9, 8, 4)).astype(np.float32)
    edges = rng.normal(size=(2, 17, 15, 16)).astype(np.float32)
    offsets = affinity_lib.offsets((1, 2))
    labels, probs = propagate.refine_logits(logits, edges, offsets, (65, 57))
    assert labels.shape == (2, 65, 57)
    assert labels.dtype == jnp.int32
    np.testing.assert_allclose(np.sum(probs, -1), 1, atol=1e-5)
    np.testing.assert_array_equal(labels, np.argmax(probs, -1))


@pytest.mark.parametrize(
    "refine", [propagate.operator("identity"), propagate.operator("random_walk", steps=0)]
)
def test_nothing_corrected_is_exactly_the_unrefined_result(refine):
    rng = np.random.default_rng(1)
    logits = 20 * rng.normal(size=(1, 9, 8, 4)).astype(np.float32)
    edges = rng.normal(size=(1, 5, 5, 8)).astype(np.float32)
    _, probs = propagate.refine_logits(logits, edges, affinity_lib.offsets((1,)), (31, 30), refine)
    enlarged = torch.nn.functional.interpolate(
        torch.from_numpy(logits).permute(0, 3, 1, 2), (31, 30), mode="bilinear"
    )
    np.testing.assert_allclose(probs, torch.softmax(enlarged, 1).permute(0, 2, 3, 1), atol=2e-5)


def test_on_one_grid_the_result_is_the_refined_probabilities():
    probs, edges, offsets = problem(12)
    _, refined = propagate.refine_logits(np.log(probs), edges, offsets, (9, 7))
    np.testing.assert_allclose(refined, propagate.signed(probs, edges, offsets), atol=1e-5)


def test_an_operator_of_ones_own_is_one_function_in_one_file(tmp_path, monkeypatch):
    (tmp_path / "sharpening.py").write_text(
        "def sharpen(probs, affinity_logits, offsets, *, power, bias=0.0):\n"
        "    powered = probs**power\n"
        "    return powered / powered.sum(axis=-1, keepdims=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    probs, logits, offsets = problem(13)
    refined = propagate.operator("sharpening:sharpen", power=2)(probs, logits, offsets)
    np.testing.assert_allclose(refined, probs**2 / (probs**2).sum(-1, keepdims=True), rtol=1e-6)


# Bad input.

PROBS, LOGITS, OFFSETS = problem(0)
AFFINITY = sigmoid(LOGITS)
NAN = PROBS * np.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propagate.random_walk(PROBS[0], AFFINITY, OFFSETS), r"probs has shape \(9, 7, 3\)"),
        (lambda: propagate.random_walk(PROBS, AFFINITY[..., :8], OFFSETS), r"affinity has shape \(1, 9, 7, 8\); expected \(1, 9, 7, 16\)"),
        (lambda: propagate.random_walk(PROBS, AFFINITY[:, :5], OFFSETS), r"affinity has shape \(1, 5, 7, 16\)"),
        (lambda: propagate.random_walk(PROBS, LOGITS, OFFSETS), r"expected \[0, 1\]: pass jax.nn.sigmoid"),
        (lambda: propagate.random_walk(NAN, AFFINITY, OFFSETS), "probs holds NaN or infinity"),
        (lambda: propagate.random_walk(PROBS, AFFINITY * np.nan, OFFSETS), "affinity holds NaN"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, steps=-1), "steps is -1"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, steps=1.5), "steps is 1.5"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, restart=1.5), r"restart has values in \[1.5, 1.5\]; expected \[0, 1\]"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, sharpness=0.0), "sharpness has values"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, threshold=-0.1), "threshold has values"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, self_weight=-1), "self_weight has values"),
        (lambda: propagate.random_walk(PROBS, AFFINITY, OFFSETS, order="random"), "order is 'random'"),
        (lambda: propagate.random_walk(PROBS, AFFINITY[..., :9], OFFSETS[:9], order="coarse_to_fine"), "same directions"),
        (lambda: propagate.signed(-PROBS, LOGITS, OFFSETS), r"probs has values in \[-.*\]; expected \[0, inf\]"),
        (lambda: propagate.signed(PROBS, LOGITS * np.inf, OFFSETS), "affinity_logits holds NaN or infinity"),
        (lambda: propagate.signed(PROBS, LOGITS, OFFSETS, strength=-1.0), "strength has values"),
        (lambda: propagate.signed(PROBS, LOGITS, OFFSETS, repulsion=-1.0), "repulsion has values"),
        (lambda: propagate.signed(PROBS, LOGITS, OFFSETS, bias=np.zeros(3)), r"bias has shape \(3,\); expected a scalar, \[2\] \(one a dilation\) or \[16\]"),
        (lambda: propagate.operator("walk"), "operator is 'walk'; expected 'identity'"),
        (lambda: propagate.refine_logits(PROBS, LOGITS, OFFSETS, (9,)), r"need \[B, \*spatial, C\]"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_are_checked_under_jit_too():
    walk = jax.jit(lambda p, a: propagate.random_walk(p, a, OFFSETS))
    with pytest.raises(ValueError, match="affinity has shape"):
        walk(PROBS, AFFINITY[..., :8])
