"""Confusion matrices and affinity histograms against scikit-learn and cases done by hand."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import sklearn.calibration
import sklearn.metrics
from hypothesis import strategies as st

from dilaff_jax import affinity, losses, metrics, propagate
from dilaff_jax.metrics import edges, regions

CLASSES = 5
confusion = jax.jit(metrics.confusion, static_argnames=("num_classes", "ignore_label"))


def maps(seed=0, shape=(3, 8, 9), ignored=0.2, right=0.6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
    pred = np.where(rng.random(shape) < right, labels, rng.integers(0, CLASSES, shape)).astype(
        np.int32
    )
    labels[rng.random(shape) < ignored] = 255
    return pred, labels


# Regions.


@hypothesis.given(st.integers(0, 2**16), st.floats(0, 1), st.floats(0, 1))
def test_confusion_equals_scikit_learn(seed, ignored, right):
    pred, labels = maps(seed, ignored=ignored, right=right)
    keep = labels != 255
    expected = np.zeros((CLASSES, CLASSES), int)
    if keep.any():
        expected = sklearn.metrics.confusion_matrix(labels[keep], pred[keep], labels=range(CLASSES))
    found = confusion(pred, labels, CLASSES)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_summary_equals_scikit_learn():
    pred, labels = maps()
    keep = labels != 255
    truth, guess = labels[keep], pred[keep]
    found = metrics.segmentation_summary(confusion(pred, labels, CLASSES))
    ious = sklearn.metrics.jaccard_score(truth, guess, average=None)
    assert found["miou"] == pytest.approx(ious.mean())
    assert found["pixel_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess))
    assert found["mean_accuracy"] == pytest.approx(
        sklearn.metrics.balanced_accuracy_score(truth, guess)
    )
    weighted = sklearn.metrics.jaccard_score(truth, guess, average="weighted")
    assert found["frequency_weighted_iou"] == pytest.approx(weighted)
    assert [found[f"iou/{c}"] for c in range(CLASSES)] == pytest.approx(ious)


def test_figures_by_hand():
    # Class 0: 3 right of 4; class 1: 1 right of 2; class 2: only predicted, once; class 3: absent.
    counts = np.array([[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(metrics.class_ious(counts), [3 / 4, 1 / 3, 0, np.nan])
    np.testing.assert_allclose(metrics.class_accuracies(counts), [3 / 4, 1 / 2, np.nan, np.nan])
    found = metrics.segmentation_summary(counts, ["road", "car", "sky", "void"])
    assert found["miou"] == pytest.approx((3 / 4 + 1 / 3 + 0) / 3)
    assert found["classes"] == 3
    assert found["mean_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["frequency_weighted_iou"] == pytest.approx(4 / 6 * 3 / 4 + 2 / 6 / 3)
    assert found["iou/car"] == pytest.approx(1 / 3)
    assert "iou/void" not in found


def test_counts_of_parts_add_to_the_counts_of_the_whole_and_means_do_not():
    pred, labels = maps(shape=(4, 8, 9))
    labels[2:, 2:] = 255
    parts = [confusion(pred[i : i + 2], labels[i : i + 2], CLASSES) for i in (0, 2)]
    whole = confusion(pred, labels, CLASSES)
    np.testing.assert_array_equal(metrics.add(*parts), whole)
    mean_of_means = np.mean([metrics.segmentation_summary(p)["miou"] for p in parts])
    assert abs(mean_of_means - metrics.segmentation_summary(whole)["miou"]) > 1e-3


def test_counts_beyond_float32_and_int32_stay_exact():
    batch = jnp.full((2, 2), 2**31 - 1, jnp.int32)
    assert metrics.add(batch, batch, batch)[0, 0] == 3 * (2**31 - 1)
    assert metrics.add(np.array([2**24]), np.array([1]))[0] == 2**24 + 1


def test_the_mask_takes_out_rows_or_pixels():
    pred, labels = maps()
    rows = np.array([True, False, True])
    np.testing.assert_array_equal(
        metrics.confusion(pred, labels, CLASSES, mask=rows), confusion(pred[rows], labels[rows], CLASSES)
    )  # fmt: skip
    pixels = np.random.default_rng(1).random(labels.shape) < 0.5
    np.testing.assert_array_equal(
        metrics.confusion(pred, labels, CLASSES, mask=pixels),
        confusion(pred, np.where(pixels, labels, 255), CLASSES),
    )


def test_nothing_labelled_gives_no_number_and_no_error():
    found = metrics.segmentation_summary(confusion(*maps(ignored=1.1), CLASSES))
    assert np.isnan([found["miou"], found["pixel_accuracy"], found["frequency_weighted_iou"]]).all()


def test_devices_count_what_one_counts():
    pred, labels = maps(shape=(4, 8, 9))
    split = jax.pmap(
        lambda p, y: jax.lax.psum(metrics.confusion(p, y, CLASSES), "i"), axis_name="i"
    )
    found = split(pred[:, None], labels[:, None])
    np.testing.assert_array_equal(found[0], confusion(pred, labels, CLASSES))


@pytest.mark.parametrize("where", ["labels", "pred"])
def test_an_impossible_value_is_named_outside_jit_and_refused_after(where):
    pred, labels = maps()
    labels[0, 0, :2] = 0
    {"labels": labels, "pred": pred}[where][0, 0, :2] = 77
    with pytest.raises(ValueError, match=rf"{where} hold 77 at 2 pixels; expected classes 0 to 4"):
        metrics.confusion(pred, labels, CLASSES)
    poisoned = confusion(pred, labels, CLASSES)
    fine = confusion(*maps(1), CLASSES)
    for refuse in (
        lambda: metrics.segmentation_summary(poisoned),
        lambda: metrics.add(fine, poisoned),
        lambda: metrics.class_ious(poisoned + fine),
        lambda: metrics.class_ious(sum([poisoned] * 64)),
    ):
        with pytest.raises(ValueError, match="counts are negative"):
            refuse()


def test_a_prediction_at_an_ignored_pixel_may_be_anything():
    pred, labels = maps()
    wild = np.where(labels == 255, 255, pred)
    np.testing.assert_array_equal(
        metrics.confusion(wild, labels, CLASSES), metrics.confusion(pred, labels, CLASSES)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3), int), np.zeros((2, 4), int), 2), r"pred has shape \(2, 3\) and labels \(2, 4\)"),
        ((np.zeros((2, 3)), np.zeros((2, 3), int), 2), "pred have dtype float"),
        ((np.zeros((2, 3), int), np.zeros((2, 3)), 2), "labels have dtype float"),
        ((np.zeros((2, 3), int), np.zeros((2, 3), int), 2, 255, np.ones(3, bool)), r"mask has shape \(3,\)"),
        ((np.zeros((2, 3), int), np.zeros((2, 3), int), 2, 255, np.ones(2)), "expected bool"),
        ((np.full((2, 3), -1), np.zeros((2, 3), int), 2), "pred hold -1 at 6 pixels"),
    ],
)  # fmt: skip
def test_bad_input_to_confusion_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion(*arguments)


def test_bad_input_to_the_summary_is_refused():
    with pytest.raises(ValueError, match=r"confusion has shape \(2, 3\)"):
        metrics.segmentation_summary(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="1 class names for 2 classes"):
        metrics.segmentation_summary(np.eye(2), ["road"])


# Affinity.


histogram = jax.jit(metrics.affinity_histogram, static_argnames="num_dilations")


def pairs(seed=0, scale=3.0, shift=0.0, shape=(2, 24, 25)):
    """Logits that know something of the targets, some edges invalid; two dilations of 8."""
    rng = np.random.default_rng(seed)
    target = rng.random((*shape, 16)) < 0.85
    valid = rng.random(target.shape) < 0.9
    logits = (scale * (rng.normal(size=target.shape) + 1.2 * target - 0.5) + shift).astype(
        np.float32
    )
    return logits, target, valid


def of_dilation(d, logits, target, valid):
    """Logits and targets of the valid edges of one dilation."""
    part = np.s_[..., 8 * d : 8 * d + 8]
    return logits[part][valid[part]], target[part][valid[part]]


@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0, 400.0])
def test_average_precision_equals_scikit_learn_even_where_scores_saturate(scale):
    batch = pairs(scale=scale)
    found = metrics.average_precision(histogram(*batch, 2))
    for d in range(2):
        logits, target = of_dilation(d, *batch)
        expected = sklearn.metrics.average_precision_score(~target, -logits)
        assert found[d] == pytest.approx(expected, abs=1e-3)


def test_average_precision_with_ties_equals_scikit_learn_exactly():
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (1, 20, 20, 8)).astype(np.float32)
    target = rng.random(logits.shape) < 0.7
    found = metrics.average_precision(histogram(logits, target, np.ones_like(target), 1))
    expected = sklearn.metrics.average_precision_score(~target.ravel(), -logits.ravel())
    assert found[0] == pytest.approx(expected, abs=1e-12)


def test_precision_recall_and_f1_are_those_of_the_class_edges():
    batch = pairs()
    found = metrics.precision_recall_f1(histogram(*batch, 2))
    for d in range(2):
        logits, target = of_dilation(d, *batch)
        expected = sklearn.metrics.precision_recall_fscore_support(
            ~target, logits < 0, average="binary"
        )
        assert found[d] == pytest.approx(expected[:3])


def test_a_logit_of_zero_is_no_class_edge_and_the_smallest_below_is():
    logits = np.zeros((1, 1, 2, 8), np.float32)
    logits[0, 0, 1] = -1e-20
    target = logits == 0
    counts = metrics.affinity_histogram(logits, target, np.ones_like(target), 1)
    np.testing.assert_array_equal(metrics.precision_recall_f1(counts), [[1, 1, 1]])


def test_best_f1_is_the_best_of_all_thresholds():
    batch = pairs(shift=2.0)
    threshold, score = metrics.best_f1(histogram(*batch, 2))
    for d in range(2):
        logits, target = of_dilation(d, *batch)
        precision, recall, _ = sklearn.metrics.precision_recall_curve(~target, -logits)
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
        assert score[d] == pytest.approx(best, abs=2e-3)
        assert sklearn.metrics.f1_score(~target, logits < threshold[d]) == pytest.approx(score[d])


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_reliability_equals_scikit_learn(bias):
    batch = pairs()
    confidence, share, number = metrics.reliability(histogram(*batch, 2), bias=bias, bins=10)
    for d in range(2):
        logits, target = of_dilation(d, *batch)
        prob = 1 / (1 + np.exp(-(logits.astype(np.float64) - bias)))
        expected_share, expected_confidence = sklearn.calibration.calibration_curve(
            target, prob, n_bins=10
        )
        assert number[d].sum() == len(target)
        np.testing.assert_allclose(confidence[d], expected_confidence, atol=2e-3)
        np.testing.assert_allclose(share[d], expected_share, atol=2e-2)


def test_calibration_error_is_zero_for_true_probabilities_and_known_for_false_ones():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 100, 100, 8)).astype(np.float32)
    target = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    counts = histogram(logits, target, np.ones_like(target), 1)
    assert metrics.expected_calibration_error(counts)[0] < 5e-3
    sure = np.full((1, 1, 5, 8), 100.0, np.float32)
    half = np.arange(40).reshape(sure.shape) % 2 == 0
    counts = metrics.affinity_histogram(sure, half, np.ones_like(half), 1)
    assert metrics.expected_calibration_error(counts)[0] == pytest.approx(0.5)


def test_fit_bias_minimises_the_cross_entropy():
    batch = pairs(shift=1.0)
    found = metrics.fit_bias(histogram(*batch, 2))
    for d in range(2):
        logits, target = of_dilation(d, *batch)
        best = scipy.optimize.minimize_scalar(
            lambda b, z=logits, y=target: np.mean(
                np.logaddexp(0, np.where(y, -1, 1) * (z.astype(np.float64) - b))
            )
        )
        assert found[d] == pytest.approx(best.x, abs=0.01)


def test_fit_bias_undoes_a_shift_and_goes_into_the_operators():
    batch = pairs()
    moved = (batch[0] + np.repeat([1.0, -2.0], 8).astype(np.float32), *batch[1:])
    bias = metrics.fit_bias(histogram(*moved, 2))
    np.testing.assert_allclose(bias - metrics.fit_bias(histogram(*batch, 2)), [1, -2], atol=0.02)
    offsets = affinity.offsets((1, 2))
    probs = np.full((2, 24, 25, 2), 0.5, np.float32)
    by_bias = propagate.signed(probs, moved[0], offsets, bias=bias)
    by_hand = propagate.signed(probs, moved[0] - np.repeat(bias, 8).astype(np.float32), offsets)
    np.testing.assert_allclose(by_bias, by_hand, atol=1e-6)


def test_the_fitted_bias_has_the_smallest_plain_loss():
    logits, target, valid = pairs(shift=2.0)
    bias = metrics.fit_bias(histogram(logits, target, valid, 2))

    def plain(bias):
        moved = logits - np.repeat(bias, 8).astype(np.float32)
        return losses.finish(losses.affinity_bce(moved, target, valid, 2))

    for other in (0 * bias, bias + 0.2, bias - 0.2):
        assert plain(bias) < plain(other) - 1e-4


def test_histograms_add_and_skip_invalid_edges():
    logits, target, valid = pairs()
    whole = histogram(logits, target, valid, 2)
    parts = [histogram(*(x[i : i + 1] for x in (logits, target, valid)), 2) for i in (0, 1)]
    np.testing.assert_array_equal(metrics.add(*parts), whole)
    assert whole.sum() == valid.sum()
    np.testing.assert_array_equal(whole.sum(axis=2)[:, 0].sum(), (valid & ~target).sum())
    wild = np.where(valid, logits, np.nan).astype(np.float32)
    np.testing.assert_array_equal(histogram(wild, ~target ^ target ^ ~target, valid, 2), whole)


def test_infinite_logits_fall_into_the_outer_bins():
    logits = np.array([np.inf, -np.inf, 1e38, -1e38, 2e4, -2e4, 0.5, -0.5], np.float32)
    counts = np.asarray(metrics.affinity_histogram(logits.reshape(1, 1, 1, 8), np.ones((1, 1, 1, 8), bool), np.ones((1, 1, 1, 8), bool), 1))  # fmt: skip
    assert counts[0, 1, 0] == 3
    assert counts[0, 1, -1] == 3


def test_bins_part_at_zero_and_grow_with_the_logit():
    limits = edges.bin_limits()
    assert limits[edges.BINS // 2] == 0
    assert limits[-1] == pytest.approx(1e4)
    width, centre = np.diff(limits), np.abs(edges.bin_centres())
    assert width.min() < 1e-5
    assert (width / centre < 0.01)[centre > 0.002].all()


def test_affinity_summary_collects_the_figures():
    counts = histogram(*pairs(), 2)
    found = metrics.affinity_summary(counts, (1, 4))
    assert found["d4/average_precision"] == metrics.average_precision(counts)[1]
    assert found["d1/recall"] == metrics.precision_recall_f1(counts)[0, 1]
    assert found["mean/f1"] == pytest.approx(metrics.precision_recall_f1(counts)[:, 2].mean())
    assert found["d1/class_edges"] == pytest.approx(0.15, abs=0.02)
    biased = metrics.affinity_summary(counts, (1, 4), bias=[2.0, 0.0])
    assert biased["d1/recall"] > found["d1/recall"]
    assert biased["d4/recall"] == found["d4/recall"]
    assert all(type(value) is float for value in found.values())


def test_without_class_edges_their_figures_are_left_out():
    logits, target, valid = pairs()
    counts = histogram(logits, target | (np.arange(16) < 8), valid, 2)
    assert np.isnan(metrics.average_precision(counts)[0])
    assert np.isnan(metrics.best_f1(counts)[0][0])
    found = metrics.affinity_summary(counts, (1, 2))
    assert "d1/average_precision" not in found
    assert found["mean/average_precision"] == found["d2/average_precision"]
    with pytest.raises(ValueError, match=r"dilation number 0 has .* a bias needs both kinds"):
        metrics.fit_bias(counts)
    empty = metrics.affinity_summary(np.zeros((1, 2, edges.BINS), int), (1,))
    assert set(empty) <= {"d1/class_edges"}


def test_bad_input_to_the_histogram_is_refused():
    logits, target, valid = pairs()
    with pytest.raises(ValueError, match="target has dtype float32; expected bool"):
        metrics.affinity_histogram(logits, target.astype(np.float32), valid, 2)
    with pytest.raises(ValueError, match="K = 16 channels, not a multiple of num_dilations 3"):
        metrics.affinity_histogram(logits, target, valid, 3)
    with pytest.raises(ValueError, match=r"valid \(24, 25, 16\): expected one shape"):
        metrics.affinity_histogram(logits, target, valid[0], 2)
    with pytest.raises(ValueError, match=r"histogram has shape \(2, 2, 7\)"):
        metrics.average_precision(np.zeros((2, 2, 7)))
    with pytest.raises(ValueError, match="3 dilations for 2 rows"):
        metrics.affinity_summary(np.zeros((2, 2, edges.BINS), int), (1, 2, 4))
    broken = np.where(np.arange(16) == 3, np.nan, logits).astype(np.float32)
    with pytest.raises(ValueError, match="logits hold NaN at valid edges"):
        metrics.affinity_histogram(broken, target, valid, 2)
    with pytest.raises(ValueError, match="counts are negative"):
        metrics.average_precision(histogram(broken, target, valid, 2))


def test_poison_survives_the_sum_over_many_devices():
    assert np.iinfo(np.int32).min <= 127 * regions.POISON - 1
