"""Losses against torch, loops in NumPy, and numerical optimisation."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from dilaff_jax import affinity, losses, resize
from dilaff_jax.losses import mining
from tests import oracles

CLASSES = 4
DILATIONS = (1, 2)
OFFSETS = affinity.offsets(DILATIONS)


def approx(expected, **tolerance):
    """`pytest.approx` of a scalar of any library."""
    return pytest.approx(float(expected), **tolerance)


SEGMENTATION = {
    "cross_entropy": losses.cross_entropy,
    "weighted": functools.partial(
        losses.cross_entropy, class_weights=[0.5, 1.0, 2.0, 0.0], label_smoothing=0.1
    ),
    "focal": losses.focal,
    "ohem": losses.ohem,
    "loss_max_pooling": losses.loss_max_pooling,
    "dice": losses.dice,
    "tversky": losses.tversky,
    "lovasz_softmax": losses.lovasz_softmax,
    "boundary": losses.boundary,
    "rmi": functools.partial(losses.region_mutual_information, radius=2, pool=1),
    "aaf": functools.partial(losses.adaptive_affinity_fields, sizes=(1,)),
}
AFFINITY = {
    "balanced": losses.affinity_balanced,
    "bce": losses.affinity_bce,
    "focal": losses.affinity_focal,
    "ohem": losses.affinity_ohem,
    "max_pooling": losses.affinity_max_pooling,
}


def scene(seed=0, shape=(2, 6, 7), ignored=0.2):
    """Random logits and labels, some ignored."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(*shape, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = 255
    return logits, labels


targets = jax.jit(lambda labels: affinity.targets(labels, OFFSETS))


def edges(seed=0, shape=(2, 6, 7), ignored=0.2):
    """Random affinity logits with the targets of random labels."""
    rng = np.random.default_rng(seed)
    _, labels = scene(seed, shape, ignored)
    labels = np.where((labels != 255) & (rng.random(shape) < 0.6), 0, labels)
    target, valid = targets(labels)
    return rng.normal(scale=2, size=target.shape).astype(np.float32), target, valid


def on_edges(name):
    return lambda logits, target, valid: AFFINITY[name](logits, target, valid, len(DILATIONS))


EAGER = {**SEGMENTATION, **{f"affinity_{name}": on_edges(name) for name in AFFINITY}}
JITTED = {name: jax.jit(loss) for name, loss in EAGER.items()}
every_loss = pytest.mark.parametrize("name", EAGER)


def sample(name, **options):
    return (edges if name.startswith("affinity") else scene)(**options)


@functools.cache
def value_and_grad(name):
    return jax.jit(
        jax.value_and_grad(lambda logits, *rest: losses.finish(EAGER[name](logits, *rest)))
    )


# What every loss promises.


@every_loss
def test_parts_of_the_halves_of_a_batch_add_to_the_parts_of_the_whole(name):
    loss, batch = JITTED[name], sample(name, shape=(4, 6, 7))
    halves = loss(*(x[:2] for x in batch)) + loss(*(x[2:] for x in batch))
    whole = loss(*batch)
    np.testing.assert_allclose(halves.sum, whole.sum, rtol=1e-5)
    np.testing.assert_allclose(halves.count, whole.count)
    assert whole.sum.dtype == whole.count.dtype == jnp.float32
    assert whole.sum.shape == whole.count.shape


@every_loss
def test_four_devices_give_the_loss_of_one(name):
    batch = sample(name, shape=(4, 6, 7))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    spec = jax.sharding.PartitionSpec("batch")

    def total(*shard):
        return losses.finish(jax.lax.psum(EAGER[name](*shard), "batch"))

    # check_vma (the default) also proves that no constant stands in for per-device data.
    mapped = jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=jax.sharding.PartitionSpec())
    expected = losses.finish(JITTED[name](*batch))
    np.testing.assert_allclose(jax.jit(mapped)(*batch), expected, rtol=1e-5)


@every_loss
def test_an_ignored_batch_has_loss_zero_and_gradient_zero(name):
    found, gradient = value_and_grad(name)(*sample(name, ignored=1.1))
    assert found == 0
    assert (np.asarray(gradient) == 0).all()


@every_loss
def test_what_stands_at_ignored_places_has_no_effect_and_no_gradient(name):
    logits, *rest = sample(name)
    out = ~np.asarray(rest[-1]) if len(rest) == 2 else (rest[0] == 255)[..., None]
    clean_value, _ = value_and_grad(name)(logits, *rest)
    dirty_value, gradient = value_and_grad(name)(np.where(out, np.float32("nan"), logits), *rest)
    assert clean_value == dirty_value
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all()
    assert (gradient[np.broadcast_to(out, gradient.shape)] == 0).all()
    assert (gradient != 0).any()


@every_loss
def test_bfloat16_logits_are_summed_in_float32(name):
    logits, *rest = sample(name)
    half = logits.astype(ml_dtypes.bfloat16)
    found = JITTED[name](half, *rest)
    assert found.sum.dtype == jnp.float32
    np.testing.assert_allclose(
        found.sum, JITTED[name](half.astype(np.float32), *rest).sum, rtol=1e-6
    )


@every_loss
def test_extreme_logits_stay_finite(name):
    logits, *rest = sample(name)
    for scale in (0.0, 1e4):
        found, gradient = value_and_grad(name)(logits * np.float32(scale), *rest)
        assert np.isfinite(found)
        assert np.isfinite(gradient).all()


@every_loss
def test_nan_is_refused_outside_jit(name):
    logits, *rest = sample(name)
    logits[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        EAGER[name](logits, *rest)


# OHEM jumps where the choice changes, so it has no difference quotient.
@pytest.mark.parametrize("name", [name for name in EAGER if not name.endswith("ohem")])
def test_gradients_agree_with_finite_differences(name):
    logits, *rest = sample(name)
    direction = np.random.default_rng(9).normal(size=logits.shape).astype(np.float32)
    direction /= np.linalg.norm(direction)
    f = value_and_grad(name)
    slope = (f(logits + 0.02 * direction, *rest)[0] - f(logits - 0.02 * direction, *rest)[0]) / 0.04
    assert np.vdot(f(logits, *rest)[1], direction) == approx(slope, rel=0.02, abs=2e-4)


def test_plus_adds_arrays_and_not_tuples():
    one = losses.LossSum(jnp.ones(2), jnp.ones(2))
    total = one + one
    assert isinstance(total, losses.LossSum)
    np.testing.assert_array_equal(total.sum, [2, 2])


def test_finish_divides_each_entry_by_its_count_and_takes_the_mean():
    parts = losses.LossSum(jnp.array([6.0, 5.0, 0.0]), jnp.array([2.0, 10.0, 0.0]))
    assert losses.finish(parts) == approx((3 + 0.5 + 0) / 3)


# Segmentation.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 0.25]])
def test_cross_entropy_and_gradient_equal_torch(weights, smoothing):
    torch = pytest.importorskip("torch")
    logits, labels = scene()
    theirs = torch.tensor(logits.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        theirs,
        torch.tensor(labels.astype(np.int64)),
        weight=None if weights is None else torch.tensor(weights),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    expected.backward()
    f = functools.partial(losses.cross_entropy, class_weights=weights, label_smoothing=smoothing)
    ours, gradient = jax.jit(jax.value_and_grad(lambda z: losses.finish(f(z, labels))))(logits)
    assert ours == approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_dropping_the_ignore_mask_would_change_the_cross_entropy():
    logits = np.array([[[0.0, 0.0], [5.0, 0.0]]], np.float32)
    parts = losses.cross_entropy(logits, np.array([[0, 255]], np.uint8))
    # By hand: one labelled pixel at p = 1/2. With the ignored one the count would be 2.
    assert parts.sum == approx(np.log(2))
    assert parts.count == 1


def test_the_ignore_label_is_an_option():
    logits, labels = scene()
    moved = np.where(labels == 255, -1, labels.astype(np.int32))
    found = losses.cross_entropy(logits, moved, ignore_label=-1)
    assert found.sum == losses.cross_entropy(logits, labels).sum


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7), (2, 3, 4, 5)])
def test_one_pixel_rows_and_volumes_are_accepted(shape):
    logits, labels = scene(shape=shape, ignored=0)
    (expected,) = pixel_losses(logits.reshape(1, -1, CLASSES), labels.reshape(1, -1))
    assert JITTED["cross_entropy"](logits, labels).sum == approx(expected.sum(), rel=1e-5)


def pixel_losses(logits, labels):
    """-log p of the true class per image, labelled pixels only, in float64."""
    shifted = logits.astype(np.float64)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return [
        np.array([-log_p[b][i][labels[b][i]] for i in np.ndindex(labels[b].shape) if labels[b][i] != 255])
        for b in range(len(labels))
    ]  # fmt: skip


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_a_loop(gamma):
    logits, labels = scene()
    weights = np.array([0.5, 1, 2, 0.25])
    expected = [np.sum((1 - np.exp(-nll)) ** gamma * nll) for nll in pixel_losses(logits, labels)]
    parts = losses.focal(logits, labels, gamma=gamma)
    assert parts.sum == approx(sum(expected), rel=1e-5)
    assert parts.count == (labels != 255).sum()
    weighted = losses.focal(logits, labels, gamma=gamma, class_weights=weights).sum
    by_class = [
        weights[c] * losses.focal(logits, np.where(labels == c, c, 255), gamma=gamma).sum
        for c in range(CLASSES)
    ]
    assert weighted == approx(sum(by_class), rel=1e-5)


def test_focal_without_focus_is_the_cross_entropy():
    logits, labels = scene()
    focal, plain = losses.focal(logits, labels, gamma=0), losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(focal, plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "min_kept"), [(0.7, 0.1), (0.05, 0.5), (1.0, 0.1), (0.01, 1.0)]
)
def test_ohem_keeps_the_unsure_and_at_least_the_hardest(threshold, min_kept):
    logits, labels = scene(shape=(3, 9, 8))
    kept = []
    for nll in pixel_losses(logits, labels):
        number = max((np.exp(-nll) < threshold).sum(), round(min_kept * nll.size))
        kept.extend(np.sort(nll)[::-1][:number])
    f = functools.partial(losses.ohem, threshold=threshold, min_kept=min_kept)
    parts = jax.jit(f)(logits, labels)
    assert parts.count == len(kept)
    assert parts.sum == approx(sum(kept), rel=1e-5)


def test_pixels_that_tie_share_the_places_left():
    logits = np.zeros((1, 1, 10, 2), np.float32)
    labels = np.zeros((1, 1, 10), np.uint8)
    f = functools.partial(losses.ohem, threshold=0.4, min_kept=0.3)
    assert jax.jit(f)(logits, labels).count == approx(3)
    gradient = jax.jit(jax.grad(lambda z: f(z, labels).sum))(logits)
    np.testing.assert_allclose(gradient[..., 0], -0.5 * 0.3, rtol=1e-5)


hardest = jax.jit(functools.partial(mining.hardest, axes=(1,)))
pooling_weights = jax.jit(mining.pooling_weights, static_argnums=(2, 3, 4))


@hypothesis.given(
    st.lists(st.floats(0, 20, width=32), min_size=1, max_size=12),
    st.integers(0, 12),
)
def test_hardest_is_the_top_of_a_sort(values, number):
    loss = np.array([values + [7.5] * (12 - len(values))], np.float32)
    eligible = np.arange(12)[None] < len(values)
    weights = np.asarray(hardest(loss, eligible, np.full((1, 1), number, np.float32)))
    expected = np.sort(loss[eligible])[::-1][:number].sum()
    assert weights.sum() == approx(min(number, len(values)), abs=1e-5)
    assert (weights * loss).sum() == approx(expected, rel=1e-5, abs=1e-6)
    assert (weights[~eligible] == 0).all()


@pytest.mark.parametrize(("p", "ratio"), [(1.7, 0.3), (1.2, 0.5), (4.0, 0.25)])
def test_loss_max_pooling_is_the_maximum_over_the_weightings(p, ratio):
    n = 9
    values = np.random.default_rng(3).exponential(size=n)
    values[0] = 0
    q = p / (p - 1)
    cap = n ** (-1 / q) * (ratio * n) ** (-1 / p)
    best = scipy.optimize.minimize(
        lambda w: -w @ values,
        np.full(n, 1 / n),
        jac=lambda w: -values,
        bounds=[(0, cap)] * n,
        constraints={"type": "ineq", "fun": lambda w: n ** (-p / q) - np.sum(np.maximum(w, 1e-300) ** p)},
        options={"maxiter": 500, "ftol": 1e-10},
    )  # fmt: skip
    weights = np.asarray(pooling_weights(jnp.array(values), jnp.ones(n, bool), p, ratio, (0,))) / n
    assert np.sum(weights**p) <= n ** (-p / q) * (1 + 1e-4)
    assert weights.max() <= cap * (1 + 1e-5)
    assert weights @ values == approx(-best.fun, rel=1e-4)


def test_loss_max_pooling_lies_between_the_mean_and_the_hardest():
    logits, labels = scene(shape=(1, 20, 20))
    (nll,) = pixel_losses(logits, labels)
    top = np.sort(nll)[::-1][: round(0.3 * nll.size)].mean()

    def pooled(**options):
        f = functools.partial(losses.loss_max_pooling, **options)
        return losses.finish(jax.jit(f)(logits, labels))

    assert pooled(p=1e6) == approx(nll.mean(), rel=1e-3)
    assert pooled(ratio=1.0) == approx(nll.mean(), rel=1e-4)
    assert pooled(p=1.001) == approx(top, rel=1e-2)
    assert nll.mean() < pooled() < top


def test_loss_max_pooling_weighs_few_positive_losses_by_the_cap():
    # Two of ten losses are positive, fewer than ratio·n = 3: the norm is not reached.
    values = jnp.array([1.0, 2.0] + [0.0] * 8)
    weights = pooling_weights(values, jnp.ones(10, bool), 2.0, 0.3, (0,))
    np.testing.assert_allclose(weights[:2], 0.3**-0.5, rtol=1e-6)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("label", [4, 254, 100])
@pytest.mark.parametrize("name", SEGMENTATION)
def test_an_impossible_label_is_named_outside_jit_and_poisons_within(name, label):
    logits, labels = scene()
    labels[0, :2, :2] = label
    with pytest.raises(
        ValueError, match=rf"labels hold {label} at 4 pixels; expected classes 0 to 3"
    ):
        SEGMENTATION[name](logits, labels)
    found, gradient = value_and_grad(name)(logits, labels)
    assert np.isnan(found)
    assert np.isnan(gradient).any()


def test_a_negative_label_is_impossible_too():
    logits, labels = scene()
    labels = labels.astype(np.int32)
    labels[1, 1, 1] = -3
    with pytest.raises(ValueError, match="labels hold -3 at 1 pixels"):
        losses.cross_entropy(logits, labels)
    assert np.isnan(jax.jit(losses.cross_entropy)(logits, labels).sum)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((2, 3, 3, CLASSES))}, r"logits have shape \(2, 3, 3, 4\) and labels \(2, 6, 7\)"),
        ({"logits": np.zeros(4)}, r"logits have shape \(4,\)"),
        ({"labels": np.zeros((2, 6, 7), np.float32)}, "labels have dtype float32; expected integer"),
        ({"class_weights": [1, 2]}, r"class_weights have shape \(2,\); expected \(4,\)"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
    ],
)  # fmt: skip
def test_bad_segmentation_input_is_refused(change, message):
    logits, labels = scene()
    with pytest.raises(ValueError, match=message):
        losses.cross_entropy(**{"logits": logits, "labels": labels, **change})


def test_bad_options_are_refused():
    logits, labels = scene()
    with pytest.raises(ValueError, match=r"min_kept is 100000; .* 512 by 1024 is 0.19"):
        losses.ohem(logits, labels, min_kept=100_000)
    with pytest.raises(ValueError, match="gamma is -1"):
        losses.focal(logits, labels, gamma=-1)
    with pytest.raises(ValueError, match="p is 1"):
        losses.loss_max_pooling(logits, labels, p=1)


# Affinity.


def edge_losses(logits, labels):
    """Yields (b, dilation number, is class edge, loss) of every valid pair, by a loop."""
    for b in range(len(labels)):
        target, valid = oracles.targets(labels[b], OFFSETS)
        for i, k, _ in oracles.pairs(labels[b].shape, OFFSETS):
            if valid[i][k]:
                z = float(logits[b][i][k])
                same = target[i][k]
                yield b, k // 8, not same, np.log1p(np.exp(-z if same else z))


def labelled_edges(seed=0, shape=(2, 6, 7)):
    _, labels = scene(seed, shape)
    labels = np.where((labels != 255) & (labels > 1), 0, labels)
    rng = np.random.default_rng(seed + 1)
    return rng.normal(scale=2, size=(*shape, len(OFFSETS))).astype(np.float32), labels


def test_balanced_is_the_mean_of_class_means_per_dilation():
    logits, labels = labelled_edges()
    groups = {(d, e): [] for d in (0, 1) for e in (False, True)}
    for _, d, class_edge, loss in edge_losses(logits, labels):
        groups[d, class_edge].append(loss)
    parts = losses.affinity_balanced(logits, *targets(labels), 2)
    assert parts.sum.shape == (2, 2)
    for (d, class_edge), values in groups.items():
        assert parts.count[d, int(class_edge)] == len(values)
        assert parts.sum[d, int(class_edge)] == approx(sum(values), rel=1e-5)
    expected = np.mean(
        [0.5 * np.mean(groups[d, False]) + 0.5 * np.mean(groups[d, True]) for d in (0, 1)]
    )
    assert losses.finish(parts) == approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["balanced", "bce", "focal"])
def test_pairs_weigh_the_mean_of_their_classes(name):
    """Whole weights: a pair of weight n counts as n pairs."""
    logits, labels = labelled_edges()
    by_class = np.array([1, 3, 7], np.float32)
    target, valid = targets(labels)
    weights = affinity.pair_weights(labels, OFFSETS, by_class)
    found = AFFINITY[name](logits, target, valid, 2, weights=weights)
    repeated = losses.LossSum(jnp.zeros(found.sum.shape), jnp.zeros(found.sum.shape))
    for times in range(1, 8):
        for b in range(len(labels)):
            chosen = np.zeros(valid[b].shape, bool)
            for i, k, j in oracles.pairs(labels[b].shape, OFFSETS):
                if valid[b][i][k]:
                    ends = by_class[labels[b][i]] + by_class[labels[b][j]]
                    chosen[i][k] = ends / 2 == times
            one = AFFINITY[name](logits[b : b + 1], target[b : b + 1], chosen[None], 2)
            repeated += losses.LossSum(times * one.sum, times * one.count)
    np.testing.assert_allclose(found.count, repeated.count, rtol=1e-6)
    np.testing.assert_allclose(found.sum, repeated.sum, rtol=1e-4)


def test_weights_that_cannot_be_are_refused():
    logits, labels = labelled_edges()
    target, valid = targets(labels)
    with pytest.raises(ValueError, match=r"weights have shape \(3,\); expected that of the logits"):
        losses.affinity_balanced(logits, target, valid, 2, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"weights go down to -1\.0; expected 0 or more"):
        losses.affinity_bce(logits, target, valid, 2, weights=np.full(logits.shape, -1.0))


def test_borders_and_ignored_pixels_are_no_class_edges():
    # One row 0 | 0 | ignore at dilation 1: by hand, the only valid edges are the two between the
    # zeros. An implementation that pads with zeros or forgets the mask counts 8·3 of them.
    labels = np.array([[[0, 0, 255]]], np.uint8)
    offsets = affinity.offsets((1,))
    logits = np.zeros((1, 1, 3, 8), np.float32)
    target, valid = affinity.targets(labels, offsets)
    parts = losses.affinity_balanced(logits, target, valid, 1)
    np.testing.assert_allclose(parts.count, [[2, 0]])
    np.testing.assert_allclose(parts.sum, [[2 * np.log(2), 0]], rtol=1e-6)
    gradient = jax.grad(lambda z: losses.finish(losses.affinity_balanced(z, target, valid, 1)))(
        jnp.asarray(logits)
    )
    assert (np.asarray(gradient) != 0).sum() == 2


@pytest.mark.parametrize("name", AFFINITY)
def test_a_batch_without_class_edges_stays_finite(name):
    logits, *_ = edges()
    target, valid = targets(np.zeros((2, 6, 7), np.uint8))
    found, gradient = value_and_grad(f"affinity_{name}")(logits, target, valid)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


def test_bce_equals_torch():
    torch = pytest.importorskip("torch")
    logits, target, valid = (np.array(x) for x in edges())
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits[valid]), torch.tensor(target[valid].astype(np.float32))
    )
    found = losses.finish(losses.affinity_bce(logits, target, valid, 2))
    assert found == approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.0, 0.6), (0.0, 0.5)])
def test_affinity_focal_equals_the_formula_of_torchvision(gamma, alpha):
    torch = pytest.importorskip("torch")
    logits, target, valid = (np.array(x) for x in edges())
    z, y = torch.tensor(logits[valid]), torch.tensor(target[valid].astype(np.float32))
    p = torch.sigmoid(z)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    p_t = p * y + (1 - p) * (1 - y)
    expected = (alpha * y + (1 - alpha) * (1 - y)) * bce * (1 - p_t) ** gamma
    found = losses.affinity_focal(logits, target, valid, 2, gamma=gamma, alpha=alpha)
    assert losses.finish(found) == approx(expected.mean(), rel=1e-5)


def test_affinity_ohem_takes_all_class_edges_and_the_hardest_others():
    logits, labels = labelled_edges()
    sums, counts = np.zeros(2), np.zeros(2)
    found = list(edge_losses(logits, labels))
    for b in range(2):
        for d in range(2):
            negative = [x for i, e, c, x in found if (i, e, c) == (b, d, True)]
            positive = sorted(x for i, e, c, x in found if (i, e, c) == (b, d, False))[::-1]
            chosen = negative + positive[: int(0.5 * len(negative))]
            sums[d] += sum(chosen)
            counts[d] += len(chosen)
    parts = losses.affinity_ohem(logits, *targets(labels), 2, ratio=0.5)
    np.testing.assert_allclose(parts.count, counts)
    np.testing.assert_allclose(parts.sum, sums, rtol=1e-5)


def test_affinity_max_pooling_pools_each_image_and_dilation():
    logits, labels = labelled_edges()
    parts = losses.affinity_max_pooling(logits, *targets(labels), 2)
    expected = np.zeros(2)
    found = list(edge_losses(logits, labels))
    for b in range(2):
        for d in range(2):
            values = np.zeros(len(found))  # padded to one length, so that jit compiles once
            chosen = [x for i, e, _, x in found if (i, e) == (b, d)]
            values[: len(chosen)] = chosen
            weights = pooling_weights(values, np.arange(len(found)) < len(chosen), 1.7, 0.3, (0,))
            expected[d] += np.asarray(weights) @ values
    np.testing.assert_allclose(parts.sum, expected, rtol=1e-4)
    np.testing.assert_allclose(parts.count, [sum(x[1] == d for x in found) for d in range(2)])


@pytest.mark.parametrize("name", ["balanced", "bce"])
def test_a_soft_target_is_the_expectation_over_hard_ones(name):
    logits, target, valid = edges()
    share = 0.3
    soft = jnp.where(target, 1.0, share)
    loss = JITTED[f"affinity_{name}"]
    drawn, hard = loss(logits, jnp.ones_like(target), valid), loss(logits, target, valid)
    found = loss(logits, soft, valid)
    np.testing.assert_allclose(found.sum, share * drawn.sum + (1 - share) * hard.sum, rtol=1e-4)
    np.testing.assert_allclose(
        found.count, share * drawn.count + (1 - share) * hard.count, rtol=1e-4
    )


def test_losses_take_the_targets_of_area_pooled_labels():
    _, labels = scene(shape=(1, 8, 8))
    pool = functools.partial(
        affinity.soft_targets, offsets=OFFSETS, size=(4, 4), num_classes=CLASSES
    )
    target, valid = jax.jit(pool)(labels)
    parts = JITTED["affinity_balanced"](jnp.zeros(target.shape), target, valid)
    np.testing.assert_allclose(parts.count.sum(), valid.sum(), rtol=1e-5)
    np.testing.assert_allclose(parts.sum, parts.count * np.log(2), rtol=1e-5)


@pytest.mark.parametrize("name", AFFINITY)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_dilations": 3}, r"K = 16 channels, not a multiple of num_dilations 3"),
        ({"target": np.zeros((2, 6, 7, 8), bool)}, r"target \(2, 6, 7, 8\), .* expected one shape"),
        ({"valid": np.zeros((2, 6, 7), bool)}, r"valid \(2, 6, 7\): expected one shape"),
        ({"valid": np.ones((2, 6, 7, 16))}, "valid has dtype float32; expected bool"),
        ({"target": np.full((2, 6, 7, 16), 2.0)}, r"target has values in \[2.0, 2.0\]; expected \[0, 1\]"),
        ({"target": np.full((2, 6, 7, 16), np.nan)}, "target has values"),
    ],
)  # fmt: skip
def test_bad_affinity_input_is_refused(name, change, message):
    logits, target, valid = edges()
    given = {"logits": logits, "target": target, "valid": valid, "num_dilations": 2, **change}
    with pytest.raises(ValueError, match=message):
        AFFINITY[name](**given)


# Adaptive affinity fields.


def aaf_reference(logits, labels, size, margin=3.0, w_edge=None, w_not_edge=None):
    """One size of the loss as the authors' TensorFlow code computes it, in NumPy and float64.

    Their order: pad, cut eight windows, compare one-hot labels, gather. Returns the two means.
    """
    classes = logits.shape[-1]
    height, width = labels.shape[1:]
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    one_hot = (labels[..., None] == np.arange(classes)).astype(np.float64)

    def windows(x, fill):
        pad = [(0, 0), (size, size), (size, size)] + [(0, 0)] * (x.ndim - 3)
        x = np.pad(x, pad, constant_values=fill)
        starts = [(a, b) for a in (0, size, 2 * size) for b in (0, size, 2 * size)]
        starts.remove((size, size))
        return [x[:, a : a + height, b : b + width] for a, b in starts]

    def clip(x):
        return np.clip(x, 1e-4, 1)

    ignored = labels > classes - 1
    around = windows(ignored, True)
    edge_terms, not_edge_terms = [], []
    for k in range(8):
        out = ignored | around[k] | around[::-1][k]
        edge = windows(one_hot, 255)[k] != one_hot
        q = windows(probs, 0)[k]
        kl = clip(q) * np.log(clip(q) / clip(probs))
        kl += clip(1 - q) * np.log(clip(1 - q) / clip(1 - probs))
        apart, together = np.maximum(0, margin - kl), kl
        if w_edge is not None:
            apart = apart * (one_hot @ w_edge)[..., None]
            together = together * (one_hot @ w_not_edge)[..., None]
        keep = ~out[..., None] & np.ones(classes, bool)
        edge_terms.extend(apart[keep & edge])
        not_edge_terms.extend(together[keep & ~edge])
    return np.mean(edge_terms), np.mean(not_edge_terms)


@pytest.mark.parametrize("adaptive", [False, True])
def test_aaf_equals_the_authors_formula(adaptive):
    logits, labels = scene(shape=(2, 9, 10), ignored=0.1)
    raw = np.random.default_rng(5).normal(size=(2, CLASSES, 3))
    u, v = np.exp(raw) / np.exp(raw).sum(-1, keepdims=True)
    expected = np.array([
        aaf_reference(logits, labels, s, 3.0, *((u[:, s - 1], v[:, s - 1]) if adaptive else ()))
        for s in (1, 2, 3)
    ])  # fmt: skip
    weights = {"edge_weights": u, "not_edge_weights": v} if adaptive else {}
    parts = jax.jit(losses.adaptive_affinity_fields)(logits, labels, **weights)
    np.testing.assert_allclose(parts.sum / parts.count / 6, expected, rtol=1e-4)
    assert losses.finish(parts) == approx(expected.sum(), rel=1e-4)


def test_aaf_masks_borders_and_ignored_pixels():
    # A row 0 1 0 ?: by hand, only the middle 0-1-0 has both neighbours inside and labelled; across
    # its two pairs each of two classes is an edge, and predictions agree everywhere (KL = 0).
    labels = np.array([[[0, 1, 0, 255]]], np.uint8)
    parts = losses.adaptive_affinity_fields(np.zeros((1, 1, 4, 2)), labels, sizes=(1,))
    np.testing.assert_allclose(parts.count, [[4, 0]])
    np.testing.assert_allclose(parts.sum / 2, [[4 * 3.0, 0]])


def test_aaf_weights_are_taken_by_the_centre_class_and_get_a_gradient():
    logits, labels = scene(shape=(1, 6, 6), ignored=0)
    labels[labels == 3] = 0

    def loss(u):
        return losses.finish(
            losses.adaptive_affinity_fields(logits, labels, edge_weights=u, not_edge_weights=jnp.ones((4, 3)))
        )  # fmt: skip

    gradient = jax.jit(jax.grad(loss))(jnp.ones((CLASSES, 3)))
    assert (gradient[:3, :2] > 0).all()
    assert (gradient[3] == 0).all()


def test_aaf_works_on_volumes():
    logits, labels = scene(shape=(1, 4, 4, 4), ignored=0.1)
    parts = JITTED["aaf"](logits, labels)
    assert parts.sum.shape == (1, 2)
    assert np.isfinite(losses.finish(parts))
    # 26 neighbours, of which those whose opposite is also inside: by axis 4, 2 and 2 of 4 starts.
    free = JITTED["aaf"](logits, np.zeros((1, 4, 4, 4), np.uint8))
    assert free.count.sum() == CLASSES * ((4 + 2 + 2) ** 3 - 4**3)


def test_aaf_weights_of_another_shape_are_refused():
    logits, labels = scene()
    with pytest.raises(ValueError, match=r"edge_weights have shape \(3, 4\); expected .* \(4, 3\)"):
        losses.adaptive_affinity_fields(logits, labels, edge_weights=np.ones((3, 4)))


@pytest.mark.parametrize("height", [64, 150])  # at once, and in blocks of rows that do not fill up
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (losses.cross_entropy, {"class_weights": (1.0, 0.5, 2.0), "label_smoothing": 0.1}),
        (losses.focal, {"gamma": 1.5}),
    ],
)
def test_enlarged_is_the_loss_of_enlarged_logits(loss, options, height):
    rng = np.random.default_rng(height)
    logits = jnp.asarray(rng.normal(size=(2, 19, 7, 3)), jnp.float32)
    labels = rng.integers(0, 3, (2, height, 53))
    labels[rng.random(labels.shape) < 0.2] = 255

    @jax.jit
    def by_blocks(logits, labels):
        parts = losses.upsampled_loss(loss, logits, labels, **options)
        return losses.finish(parts), parts

    @jax.jit
    def at_once(logits, labels):
        parts = loss(resize.bilinear(logits, labels.shape[1:]), labels, **options)
        return losses.finish(parts), parts

    (value, parts), gradient = jax.value_and_grad(by_blocks, has_aux=True)(logits, labels)
    (expected, whole), direction = jax.value_and_grad(at_once, has_aux=True)(logits, labels)
    assert parts.count == whole.count
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, direction, rtol=1e-5, atol=1e-8)


def test_enlarged_keeps_the_full_logits_out_of_memory():
    logits = jax.ShapeDtypeStruct((2, 33, 33, 21), jnp.float32)
    labels = jax.ShapeDtypeStruct((2, 257, 257), jnp.uint8)

    def needs(function):
        gradient = jax.jit(jax.grad(lambda x, y: losses.finish(function(x, y))))
        return gradient.lower(logits, labels).compile().memory_analysis().temp_size_in_bytes

    full = 2 * 257 * 257 * 21 * 4
    assert needs(lambda x, y: losses.cross_entropy(resize.bilinear(x, y.shape[1:]), y)) > full
    assert needs(lambda x, y: losses.upsampled_loss(losses.cross_entropy, x, y)) < full
