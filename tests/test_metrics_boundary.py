"""Boundary measures and transitions against OpenCV, scikit-image and cases done by hand."""

import json

import cv2
import hypothesis
import jax
import numpy as np
import pytest
import skimage.morphology
import skimage.segmentation
from hypothesis import strategies as st

from dilaff_jax import metrics

CLASSES = 4


def blobs(seed=0, shape=(40, 53), ignored=0.0):
    """Smooth label maps and a prediction that is wrong along their boundaries."""
    rng = np.random.default_rng(seed)

    def field():
        return cv2.GaussianBlur(rng.normal(size=(*shape, CLASSES)), (0, 0), 4)

    truth, noise = field(), field()
    labels = truth.argmax(-1).astype(np.uint8)
    pred = (truth + 0.4 * noise).argmax(-1).astype(np.int64)
    if ignored:
        void = cv2.GaussianBlur(rng.normal(size=shape), (0, 0), 3)
        labels[void > np.quantile(void, 1 - ignored)] = 255
    return pred, labels


# The distance.


@hypothesis.given(st.integers(0, 1000))
def test_boundary_pixels_are_those_of_scikit_image(seed):
    _, labels = blobs(seed)
    expected = skimage.segmentation.find_boundaries(labels, connectivity=1, mode="thick")
    np.testing.assert_array_equal(metrics.boundary_distance(labels) == 0, expected)


def test_distance_is_counted_from_the_boundary_pixels():
    labels = np.repeat([[0, 0, 0, 1, 1, 1, 1]], 2, axis=0)
    np.testing.assert_array_equal(metrics.boundary_distance(labels), [[2, 1, 0, 0, 1, 2, 3]] * 2)


def test_the_border_of_a_void_region_is_no_boundary():
    labels = np.zeros((9, 9), np.uint8)
    labels[3:6, 3:6] = 255
    assert np.isinf(metrics.boundary_distance(labels)).all()
    assert np.isinf(metrics.boundary_distance(np.full((3, 3), 255, np.uint8))).all()


def test_a_void_strip_between_two_classes_has_its_boundary_in_the_middle():
    labels = np.array([[0, 0, 255, 255, 255, 255, 1, 1]], np.uint8)
    np.testing.assert_array_equal(metrics.boundary_distance(labels), [[3, 2, 1, 0, 0, 1, 2, 3]])


def test_volumes_have_boundaries_too():
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[2:] = 1
    distance = metrics.boundary_distance(labels)
    np.testing.assert_array_equal(distance[:, 0, 0], [1, 0, 0, 1])


# Trimaps.


def test_trimap_bands_grow_to_the_whole_confusion():
    pred, labels = blobs(ignored=0.1)
    counts = metrics.trimap(pred, labels, CLASSES, (1, 3, 1000))
    labelled = labels != 255
    distance = metrics.boundary_distance(labels)
    for width, band in zip((1, 3, 1000), counts, strict=True):
        assert band.sum() == (labelled & (distance < width)).sum()
    np.testing.assert_array_equal(counts[-1], metrics.confusion(pred, labels, CLASSES))


def test_trimap_by_hand():
    labels = np.array([[0, 0, 0, 1, 1, 1]])
    pred = np.array([[1, 0, 0, 0, 1, 1]])
    counts = metrics.trimap(pred, labels, 2, (1, 2))
    # One pixel on each side: of 0|1 one is right and one wrong. Two: 0 0|1 1.
    np.testing.assert_array_equal(counts, [[[1, 0], [1, 0]], [[2, 0], [1, 1]]])
    found = metrics.boundary_summary(trimaps=counts, widths=(1, 2))
    assert found == {
        "trimap_miou/1": pytest.approx((1 / 2 + 0) / 2),
        "trimap_miou/2": pytest.approx((2 / 3 + 1 / 2) / 2),
    }


# Boundary IoU.


def official_boundary(mask, dilation_ratio=0.02):
    """`mask_to_boundary` of the authors' API, in OpenCV."""
    height, width = mask.shape
    depth = max(1, round(dilation_ratio * np.sqrt(height**2 + width**2)))
    framed = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=depth)
    return mask.astype(bool) & ~eroded[1:-1, 1:-1].astype(bool)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5])
@hypothesis.given(st.integers(0, 1000))
def test_boundary_iou_equals_the_authors_erosion_class_by_class(ratio, seed):
    pred, labels = blobs(seed)
    found = metrics.boundary_iou(pred, labels, CLASSES, ratio)
    for c in range(CLASSES):
        a, b = official_boundary(pred == c, ratio), official_boundary(labels == c, ratio)
        assert found[c].tolist() == [np.sum(a & b), np.sum(a | b)]


def test_void_is_no_boundary_of_a_band_and_is_not_counted():
    labels = np.zeros((30, 30), np.uint8)
    pred = np.zeros((30, 30), int)
    clean = metrics.boundary_iou(pred, labels, 2)
    labels[12:18, 12:18] = 255
    pred[14:16, 14:16] = 1  # within the void: unknown, so neither right nor wrong
    np.testing.assert_array_equal(metrics.boundary_iou(pred, labels, 2), clean)
    # The frame of one pixel that the edge of the image gives.
    np.testing.assert_array_equal(clean, [[4 * 29, 4 * 29], [0, 0]])


def test_a_perfect_prediction_has_boundary_iou_one():
    _, labels = blobs()
    found = metrics.boundary_summary(iou=metrics.boundary_iou(labels, labels, CLASSES + 1))
    assert found["boundary_iou"] == 1


# Boundary F.


def davis_matches(predicted, true, tolerance):
    """Matches by dilation with a disk, as the DAVIS benchmark computes them."""
    disk = skimage.morphology.disk(tolerance)
    near_true = skimage.morphology.dilation(true, disk)
    near_predicted = skimage.morphology.dilation(predicted, disk)
    return [
        predicted.sum(),
        (predicted & near_true).sum(),
        true.sum(),
        (true & near_predicted).sum(),
    ]


@pytest.mark.parametrize("tolerance", [0, 1, 2, 5])
def test_boundary_f_matches_as_dilation_by_a_disk_does(tolerance):
    pred, labels = blobs(1)
    found = metrics.boundary_f(pred, labels, CLASSES, tolerance)
    edges = [skimage.segmentation.find_boundaries(x, 1, "thick") for x in (pred, labels)]
    np.testing.assert_array_equal(found.pixels, davis_matches(*edges, tolerance))
    for c in range(CLASSES):
        # A class's boundary pixels: inside the mask, beside what is not.
        inner = [skimage.segmentation.find_boundaries(x == c, 1, "inner") for x in (pred, labels)]
        predicted, hit, true, recalled = davis_matches(*inner, tolerance)
        precision, recall = hit / predicted, recalled / true
        expected = 2 * precision * recall / (precision + recall) if hit else 0
        assert found.score_sum[c] == pytest.approx(expected)
    np.testing.assert_array_equal(found.images, 1)


def test_boundary_f_by_hand():
    # One boundary, predicted two pixels too far right: within 2 px, not within 1.
    labels = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 3)
    pred = np.roll(labels, 2, axis=1)
    pred[:, :2] = 0
    for tolerance, expected in ((2, 1.0), (1, 0.5), (0, 0.0)):
        counts = metrics.boundary_f(pred, labels, 3, tolerance)
        found = metrics.boundary_summary(f=counts)
        assert found["boundary_f"] == pytest.approx(expected)
        assert counts.images.tolist() == [1, 1, 0]
    assert (
        metrics.boundary_summary(f=metrics.boundary_f(labels, labels, 3))["boundary_f_class"] == 1
    )


def test_boundary_f_of_no_boundary_is_undefined_and_of_one_side_zero():
    flat, split = np.zeros((4, 6), int), np.repeat([[0, 0, 0, 1, 1, 1]], 4, axis=0)
    assert metrics.boundary_summary(f=metrics.boundary_f(flat, flat, 2)) == {}
    for pred, labels in ((flat, split), (split, flat)):
        found = metrics.boundary_summary(f=metrics.boundary_f(pred, labels, 2))
        assert found["boundary_f"] == 0
        assert found["boundary_f_class"] == 0


def test_boundary_pixels_in_void_do_not_count():
    labels = np.repeat([[0, 0, 0, 0, 1, 1, 1, 1]], 8, axis=0).astype(np.uint8)
    pred = labels.astype(int)
    labels[4:] = 255
    pred[6, 6] = 0  # an error in the void
    found = metrics.boundary_f(pred, labels, 2)
    assert found.pixels.tolist() == [8, 8, 8, 8]


def test_a_class_may_be_the_ignored_one():
    # Class 0 is void; predicting it is an error like another, and its border a boundary.
    labels = np.repeat([[0, 1, 1, 1, 2, 2, 2]], 4, axis=0)
    pred = np.repeat([[1, 1, 1, 1, 2, 2, 0]], 4, axis=0)
    found = metrics.boundary_f(pred, labels, 3, tolerance=0, ignore_label=0)
    assert found.pixels.tolist() == [16, 8, 8, 8]


# Transitions.


def test_transitions_by_hand():
    labels = np.array([[0, 0, 0, 0, 1, 1, 1, 255]], np.uint8)
    before = np.array([[0, 1, 2, 0, 1, 0, 2, 0]])
    after = np.array([[0, 1, 1, 1, 1, 1, 0, 1]])
    #      kind:       rr ww ≠w rw rr wr ≠w void; distance 3 2 1 0 0 1 2
    found = metrics.transitions(before, after, labels, 3, distances=(1, 2))
    np.testing.assert_array_equal(
        found.by_distance, [[1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [1, 1, 0, 0, 1]]
    )
    np.testing.assert_array_equal(found.by_class, [[1, 1, 0, 1, 1], [1, 0, 1, 0, 1], [0] * 5])
    shares = metrics.transition_summary(found, (1, 2), ["a", "b", "c"])
    assert shares["changed"] == pytest.approx(4 / 7)
    assert shares["gain"] == 0
    assert shares["distance/1-2/wrong_to_right"] == 0.5
    assert shares["class/a/right_to_wrong"] == 0.25
    assert not [key for key in shares if key.startswith("class/c")]


@hypothesis.given(st.integers(0, 1000))
def test_transitions_agree_with_the_confusion_matrices(seed):
    before, labels = blobs(seed, ignored=0.2)
    after, _ = blobs(seed + 1)
    found = metrics.transitions(before, after, labels, CLASSES)
    by_kind = found.by_distance.sum(axis=0)
    np.testing.assert_array_equal(found.by_class.sum(axis=0), by_kind)
    old, new = (np.asarray(metrics.confusion(x, labels, CLASSES)) for x in (before, after))
    assert by_kind.sum() == old.sum()
    assert by_kind[0] + by_kind[3] == np.trace(old)
    assert by_kind[0] + by_kind[2] == np.trace(new)
    shares = metrics.transition_summary(found)
    accuracy = [metrics.segmentation_summary(x)["pixel_accuracy"] for x in (old, new)]
    assert shares["gain"] == pytest.approx(accuracy[1] - accuracy[0])
    assert shares["changed"] == pytest.approx(np.mean((before != after)[labels != 255]))


def test_no_boundary_puts_all_pixels_into_the_last_row():
    labels = np.zeros((3, 4), np.uint8)
    found = metrics.transitions(labels, labels, labels, 1)
    np.testing.assert_array_equal(found.by_distance[-1], [12, 0, 0, 0, 0])


# All of them.


def test_counts_of_images_add():
    pairs = [blobs(seed, ignored=0.1) for seed in (0, 1)]
    for count in (metrics.boundary_iou, metrics.boundary_f, metrics.trimap):
        one, two = (count(*pair, CLASSES) for pair in pairs)
        total = metrics.add(one, two)
        for a, b, c in zip(*map(jax.tree.leaves, (one, two, total)), strict=True):
            np.testing.assert_array_equal(a + b, c)
    f = metrics.add(*(metrics.boundary_f(*pair, CLASSES) for pair in pairs))
    assert isinstance(f, metrics.BoundaryF)
    assert f.images.dtype == np.int64
    assert f.score_sum.dtype == np.float64


def test_summaries_are_ready_for_json():
    pred, labels = blobs(ignored=0.1)
    figures = metrics.boundary_summary(
        iou=metrics.boundary_iou(pred, labels, 9),
        f=metrics.boundary_f(pred, labels, 9),
        trimaps=metrics.trimap(pred, labels, 9),
    )
    figures |= metrics.transition_summary(metrics.transitions(pred, pred, labels, 9))
    figures |= metrics.segmentation_summary(metrics.confusion(pred, labels, 9))
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert all(0 <= figures[k] <= 1 for k in ("boundary_iou", "boundary_f", "boundary_f_class"))


@pytest.mark.parametrize(
    "count", [metrics.boundary_iou, metrics.boundary_f, metrics.trimap, lambda p, y, c: metrics.transitions(p, p, y, c)]
)  # fmt: skip
def test_bad_input_is_refused(count):
    pred, labels = blobs()
    with pytest.raises(ValueError, match=r"pred has shape \(40, 53\) and labels \(40, 52\)"):
        count(pred, labels[:, 1:], CLASSES)
    with pytest.raises(ValueError, match="labels hold 3 at"):
        count(np.minimum(pred, 2), labels, 3)
    with pytest.raises(ValueError, match=r"pred hold -1 at 2120 pixels; expected classes 0 to 3$"):
        count(np.full_like(pred, -1), labels, CLASSES)
    with pytest.raises(ValueError, match="pred have dtype float64"):
        count(pred / 1.0, labels, CLASSES)


def test_bad_options_are_refused():
    pred, labels = blobs()
    with pytest.raises(ValueError, match="tolerance is -1"):
        metrics.boundary_f(pred, labels, CLASSES, -1)
    with pytest.raises(ValueError, match=r"distances are \(4, 2\)"):
        metrics.transitions(pred, pred, labels, CLASSES, (4, 2))
    counts = metrics.transitions(pred, pred, labels, CLASSES)
    with pytest.raises(ValueError, match="2 class names and 6 distances; expected 4 and 6"):
        metrics.transition_summary(counts, class_names=["a", "b"])
