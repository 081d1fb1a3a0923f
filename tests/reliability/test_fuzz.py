"""Any input: properties hold for all shapes, types and offsets; mutated files are read or refused.

Arrays come from hypothesis, out of few shapes, since each costs a compilation. Files are mutated by
a loop of our own (`readers.py`) with NumPy's seeded generator: a fuzzer led by coverage (atheris)
has no wheels for the Pythons that this project supports, and the parsers are not Python anyway.
"""

import io
import itertools
import json
import pathlib
import struct
import subprocess
import sys
import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

import dilaff_jax
from dilaff_jax import affinity, losses, metrics, propagate, resize
from dilaff_jax.data import mat

ROOT = pathlib.Path(__file__).resolve().parents[2]
IGNORED, CLASSES = 255, 3
# With an empty batch, a single pixel, and images smaller than most offsets.
SHAPES = [(2, 5, 6), (0, 5, 6), (1, 1, 1)]
OFFSETS = affinity.offsets((1, 3))  # at 3 or more, outside of the smallest images altogether
FLOATS = ["float16", "bfloat16", "float32", "float64"]
LABEL_TYPES = ["uint8", "int32", "int64", "uint16"]

seeds = st.integers(0, 2**32 - 1)
few = hypothesis.settings(max_examples=5)


def cast(array, name):
    return array.astype(jnp.bfloat16 if name == "bfloat16" else name)


@st.composite
def labelled(draw, shapes=SHAPES):
    """Labels with ignored pixels, among them all and none, and a generator for the rest."""
    rng = np.random.default_rng(draw(seeds))
    shape = draw(st.sampled_from(shapes))
    labels = rng.integers(0, CLASSES, shape)
    labels[rng.random(shape) < draw(st.sampled_from([0, 0.3, 1]))] = IGNORED
    return labels.astype(draw(st.sampled_from(LABEL_TYPES))), rng


def permuted(labels, order):
    """Labels with class c called order[c]."""
    table = np.arange(256)
    table[:CLASSES] = order
    return table[labels].astype(labels.dtype)


def neighbours(shape, offset):
    """Pairs of indices (i, i + offset) inside an image of this shape."""
    for i in itertools.product(*map(range, shape)):
        j = tuple(a + b for a, b in zip(i, offset, strict=True))
        if all(0 <= b < n for b, n in zip(j, shape, strict=True)):
            yield i, j


def close(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), a, b)


# affinity


@few
@hypothesis.given(
    seeds,
    st.sampled_from([(3, 4, 2), (1, 1, 1), (0, 4, 2)]),
    st.tuples(st.sampled_from([-9, -2, 0, 1, 3]), st.sampled_from([-4, -1, 0, 1, 40])),
    st.sampled_from(["bool", "int8", "uint8", *FLOATS]),
)
def test_a_shift_is_indexing_for_every_type_and_any_offset(seed, shape, offset, dtype):
    x = cast(np.random.default_rng(seed).integers(0, 2, shape), dtype)
    found = np.asarray(affinity.shift(x, offset, 1))
    wanted = np.ones(shape, found.dtype)
    for i, j in neighbours(shape[:2], offset):
        wanted[i] = x[j]
    np.testing.assert_array_equal(found, wanted)


@hypothesis.given(labelled())
def test_targets_are_symmetric_and_know_no_names_and_no_types(case):
    labels, rng = case
    target, valid = map(np.asarray, affinity.targets(labels, OFFSETS))
    for k, offset in enumerate(OFFSETS):
        opposite = int((-offset == OFFSETS).all(axis=1).argmax())
        inside = np.zeros(labels.shape[1:], bool)
        for i, j in neighbours(labels.shape[1:], offset):
            at, there = (slice(None), *i), (slice(None), *j)
            np.testing.assert_array_equal(target[(*at, k)], target[(*there, opposite)])
            np.testing.assert_array_equal(valid[(*at, k)], valid[(*there, opposite)])
            inside[i] = True
        assert not valid[:, ~inside, k].any()
    assert not valid[labels == IGNORED].any()
    assert not (target & ~valid).any()
    renamed = permuted(labels, rng.permutation(CLASSES))
    close(affinity.targets(renamed, OFFSETS), (target, valid))


@few
@hypothesis.given(labelled([(2, 4, 6), (0, 4, 6)]))
def test_soft_targets_are_shares_that_equal_the_hard_ones_on_whole_cells(case):
    labels, rng = case
    order = rng.permutation(CLASSES)
    for size in ((2, 3), (4, 6)):
        target, valid = map(np.asarray, affinity.soft_targets(labels, OFFSETS, size, CLASSES))
        assert ((target >= 0) & (target <= 1 + 1e-6)).all()
        renamed = affinity.soft_targets(permuted(labels, order), OFFSETS, size, CLASSES)
        close(renamed, (target, valid), atol=1e-6)
    hard, hard_valid = affinity.targets(labels, OFFSETS)
    np.testing.assert_array_equal(valid, hard_valid)
    np.testing.assert_allclose(np.where(valid, target, 0), hard, atol=1e-6)


@few
@hypothesis.given(seeds, st.sampled_from(SHAPES), st.sampled_from(FLOATS))
def test_a_mirrored_map_is_symmetric_in_every_type(seed, shape, dtype):
    forward = affinity.offsets((1, 3), symmetric=True)
    half = cast(np.random.default_rng(seed).random((*shape, len(forward))), dtype)
    whole = np.asarray(affinity.mirror(half, OFFSETS))
    assert whole.dtype == jnp.asarray(half).dtype
    for k, offset in enumerate(OFFSETS):
        opposite = int((-offset == OFFSETS).all(axis=1).argmax())
        for i, j in neighbours(shape[1:], offset):
            np.testing.assert_array_equal(whole[:, *i, k], whole[:, *j, opposite])


# losses

SEGMENTATION = ["cross_entropy", "focal", "ohem", "loss_max_pooling", "adaptive_affinity_fields"]
AFFINITY = ["balanced", "bce", "focal", "ohem", "max_pooling"]


@pytest.mark.parametrize("name", SEGMENTATION)
@few
@hypothesis.given(labelled(), st.sampled_from([*FLOATS, "int32"]))
def test_a_segmentation_loss_ignores_what_is_ignored_and_knows_no_names(name, case, dtype):
    labels, rng = case
    loss = getattr(losses, name)
    logits = cast(rng.normal(0, 3, (*labels.shape, CLASSES)), dtype)
    parts = loss(logits, labels)
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in parts)
    assert (np.asarray(parts.count) >= 0).all()
    assert np.isfinite(losses.finish(parts))
    if not (labels != IGNORED).any():
        assert float(losses.finish(parts)) == 0
    # Whatever the type, it is the loss of the numbers that the type holds.
    close(loss(logits.astype(np.float32), labels), parts, rtol=1e-6)
    other = logits.copy()
    other[labels == IGNORED] = cast(np.array(77.0), dtype)
    close(loss(other, labels), parts)
    order = rng.permutation(CLASSES)
    renamed = np.empty_like(logits)
    renamed[..., order] = logits
    close(loss(renamed, permuted(labels, order)), parts, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", AFFINITY)
@few
@hypothesis.given(labelled(), st.sampled_from([*FLOATS, "int32"]))
def test_an_affinity_loss_ignores_what_is_not_valid_and_adds_over_images(name, case, dtype):
    labels, rng = case
    loss = getattr(losses, f"affinity_{name}")
    target, valid = map(np.asarray, affinity.targets(labels, OFFSETS))
    logits = cast(rng.normal(0, 3, target.shape), dtype)
    parts = loss(logits, target, valid, 2)
    assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in parts)
    if not valid.any():
        assert float(losses.finish(parts)) == 0
    other, wrong = logits.copy(), target.copy()
    other[~valid], wrong[~valid] = cast(np.array(77.0), dtype), True
    close(loss(other, wrong, valid, 2), parts)
    one = [loss(*(x[i : i + 1] for x in (logits, target, valid)), 2) for i in range(len(labels))]
    close(sum(one, losses.LossSum(0, 0)), parts, rtol=1e-4, atol=1e-4)


# propagate, resize, dilaff_jax.refine


def probabilities(rng, shape):
    return rng.dirichlet(np.ones(CLASSES), shape).astype(np.float32)


def walk(probs, logits, offsets):
    return propagate.random_walk(probs, jax.nn.sigmoid(jnp.asarray(logits)), offsets)


@pytest.mark.parametrize("refine", [walk, propagate.signed], ids=["walk", "signed"])
@few
@hypothesis.given(seeds, st.sampled_from(SHAPES), st.sampled_from([*FLOATS, "int32"]))
def test_refinement_keeps_the_simplex_and_knows_no_names(refine, seed, shape, dtype):
    rng = np.random.default_rng(seed)
    probs = probabilities(rng, shape)
    logits = cast(rng.normal(0, 4, (*shape, len(OFFSETS))), dtype)
    found = np.asarray(refine(probs, logits, OFFSETS))
    assert found.dtype == np.float32
    assert found.shape == probs.shape
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    tolerance = 2e-2 if dtype in ("float16", "bfloat16") else 1e-5  # of the sigmoid in that type
    close(refine(probs, logits.astype(np.float32), OFFSETS), found, atol=tolerance)
    order = rng.permutation(CLASSES)
    close(refine(probs[..., order], logits, OFFSETS), found[..., order], atol=1e-5)
    if shape[1:] == (1, 1):  # nobody to ask
        np.testing.assert_allclose(found, probs, atol=1e-6)


@few
@hypothesis.given(seeds, st.sampled_from(SHAPES), st.sampled_from(["random_walk", "signed"]))
def test_offsets_longer_than_the_image_change_nothing(seed, shape, name):
    rng = np.random.default_rng(seed)
    offsets = affinity.offsets((8,))
    probs, logits = probabilities(rng, shape), rng.normal(0, 4, (*shape, 8)).astype(np.float32)
    found = propagate.operator(name)(probs, logits, offsets)
    np.testing.assert_allclose(found, probs, atol=1e-6)


@few
@hypothesis.given(
    seeds,
    st.sampled_from([((2, 3, 4), (5, 6)), ((0, 3, 4), (5, 6)), ((1, 1, 1), (1, 1))]),
    st.sampled_from(["float16", "float32", "float64"]),
    st.sampled_from(["identity", "random_walk", "signed"]),
)
def test_refine_gives_labels_of_probabilities_in_either_order_of_axes(seed, shapes, dtype, name):
    rng = np.random.default_rng(seed)
    coarse, size = shapes
    logits = cast(rng.normal(0, 3, (*coarse, CLASSES)), dtype)
    edges = cast(rng.normal(0, 3, (coarse[0], *size, len(OFFSETS))), dtype)
    options = {"size": size, "offsets": OFFSETS, "operator": name}
    labels, probs = dilaff_jax.refine(logits, edges, **options)
    assert labels.shape == (coarse[0], *size)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(labels, probs.argmax(axis=-1))
    turned = (np.moveaxis(x, -1, 1) for x in (logits, edges))
    other = dilaff_jax.refine(*turned, **options, channels_first=True)
    np.testing.assert_array_equal(other.labels, labels)
    np.testing.assert_allclose(np.moveaxis(other.probs, 1, -1), probs, atol=1e-6)
    if name == "identity":
        plain = resize.bilinear(jnp.asarray(logits), size)
        np.testing.assert_allclose(probs, jax.nn.softmax(plain), atol=1e-6)


@few
@hypothesis.given(
    seeds,
    st.sampled_from([(2, 3, 4), (0, 3, 4), (1, 1, 1)]),
    st.sampled_from([(1, 1), (3, 4), (7, 2)]),
    st.sampled_from([*FLOATS, "int32", "uint8"]),
    st.booleans(),
)
def test_resizing_stays_between_the_values_of_every_type(seed, shape, size, dtype, corners):
    x = jnp.asarray(cast(np.random.default_rng(seed).integers(0, 9, (*shape, 2)), dtype))
    found = np.asarray(resize.bilinear(x, size, align_corners=corners))
    assert found.shape == (shape[0], *size, 2)
    assert found.dtype == np.float32
    values = np.asarray(x, np.float32)
    if size == shape[1:]:
        np.testing.assert_array_equal(found, values)
    if values.size:
        assert found.min() >= values.min() - 1e-5
        assert found.max() <= values.max() + 1e-5
    if not corners:
        down, across = (resize.matrix(n, m) for n, m in zip(shape[1:], size, strict=True))
        wanted = np.einsum("rh,kw,bhwc->brkc", down, across, values)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# metrics


@hypothesis.given(labelled(), st.sampled_from(["uint8", "int32", "int64"]))
def test_confusion_is_counting_and_ignored_pixels_may_be_called_anything(case, dtype):
    labels, rng = case
    pred = rng.integers(0, CLASSES, labels.shape).astype(dtype)
    wanted = np.zeros((CLASSES, CLASSES), int)
    counted = labels != IGNORED
    np.add.at(wanted, (labels[counted], pred[counted]), 1)
    np.testing.assert_array_equal(metrics.confusion(pred, labels, CLASSES), wanted)
    pred[~counted] = 100
    np.testing.assert_array_equal(metrics.confusion(pred, labels, CLASSES), wanted)
    order = rng.permutation(CLASSES)
    renamed = metrics.confusion(permuted(pred, order), permuted(labels, order), CLASSES)
    np.testing.assert_array_equal(np.asarray(renamed)[np.ix_(order, order)], wanted)


@hypothesis.given(labelled([(9, 11), (1, 1), (1, 7)]))
def test_counts_at_boundaries_add_up_and_ignored_pixels_may_be_called_anything(case):
    labels, rng = case
    pred, after = (rng.integers(0, CLASSES, labels.shape).astype(np.uint8) for _ in range(2))
    counted = labels != IGNORED

    # Not of boundary_f: a predicted boundary lies between two pixels, one of which may be ignored.
    def counts(pred, after):
        return (
            metrics.boundary_iou(pred, labels, CLASSES),
            metrics.trimap(pred, labels, CLASSES),
            metrics.transitions(pred, after, labels, CLASSES),
        )

    found = counts(pred, after)
    iou, bands, moved = found
    assert (iou[:, 0] <= iou[:, 1]).all()
    assert (np.diff(bands.sum(axis=(1, 2))) >= 0).all()
    assert bands.sum(axis=(1, 2)).max(initial=0) <= counted.sum()
    assert moved.by_distance.sum() == moved.by_class.sum() == counted.sum()
    np.testing.assert_array_equal(moved.by_class.sum(axis=1), np.bincount(labels[counted], minlength=CLASSES))  # fmt: skip
    pred[~counted], after[~counted] = 0, 1
    close(counts(pred, after), found)


@few
@hypothesis.given(labelled(), st.sampled_from(FLOATS))
def test_the_histogram_of_edges_counts_each_valid_one_once(case, dtype):
    labels, rng = case
    target, valid = map(np.asarray, affinity.targets(labels, OFFSETS))
    logits = cast(rng.normal(0, 5, target.shape), dtype)
    logits[~valid] = np.nan
    found = np.asarray(metrics.affinity_histogram(logits, target, valid, 2))
    for d, part in enumerate((slice(0, 8), slice(8, 16))):
        same = (target & valid)[..., part].sum()
        assert found[d, 1].sum() == same
        assert found[d, 0].sum() == valid[..., part].sum() - same


# What is refused, in which words.

FLOAT_LABELS = np.zeros((1, 4, 4))
LOGITS, EDGES = np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 4, 4, 16), np.float32)
LABELS = np.zeros((1, 4, 4), np.uint8)
NO_INTEGERS = "labels have dtype float64; expected integer class indices"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.cross_entropy(LOGITS, FLOAT_LABELS), NO_INTEGERS),
        (lambda: losses.adaptive_affinity_fields(LOGITS, FLOAT_LABELS), NO_INTEGERS),
        (lambda: losses.cross_entropy(LOGITS, LABELS + 3), "labels hold 3 at 16 pixels; expected classes 0 to 2 or the ignore label 255"),
        (lambda: losses.ohem(LOGITS * np.nan, LABELS), "logits hold NaN; expected numbers"),
        (lambda: losses.focal(LOGITS[:, :3], LABELS), "logits have shape (1, 3, 4, 3) and labels (1, 4, 4); expected [B, *spatial, C] and [B, *spatial]: resize one to the other first"),
        (lambda: losses.affinity_bce(EDGES, EDGES + 2, EDGES == 0, 2), "target has values in [2.0, 2.0]; expected [0, 1]"),
        (lambda: losses.affinity_bce(EDGES, EDGES, EDGES, 2), "valid has dtype float32; expected bool"),
        (lambda: losses.affinity_ohem(EDGES, EDGES, EDGES == 0, 3), "logits have K = 16 channels, not a multiple of num_dilations 3; expected as many channels for every dilation"),
        (lambda: metrics.confusion(LABELS, LABELS + 9, 3), "labels hold 9 at 16 pixels; expected classes 0 to 2 or the ignore label 255"),
        (lambda: metrics.confusion(LABELS + 9, LABELS, 3), "pred hold 9 at 16 pixels; expected classes 0 to 2"),
        (lambda: affinity.offsets((1.5,)), "dilations are (1.5,); give one or more positive integers"),
        (lambda: propagate.random_walk(LOGITS, EDGES + 2, OFFSETS), "affinity has values in [2, 2]; expected [0, 1]: pass jax.nn.sigmoid(affinity_logits)"),
        (lambda: propagate.signed(LOGITS, EDGES, OFFSETS, steps="many"), "steps is 'many'; expected a whole number, zero or more"),
        (lambda: propagate.signed(LOGITS, EDGES, OFFSETS, strength="much"), "strength is 'much'; expected a number, or an array of them"),
        (lambda: propagate.signed(LOGITS, EDGES[..., :8], OFFSETS), "affinity_logits has shape (1, 4, 4, 8); expected (1, 4, 4, 16): probs has shape (1, 4, 4, 3) and there are 16 offsets"),
        (lambda: propagate.operator("signed", strenght=1), "operator 'signed' has no option 'strenght'; allowed: bias, keep, steps, strength, repulsion, backend"),
        (lambda: dilaff_jax.refine(LOGITS, EDGES[0], offsets=OFFSETS), "affinity_logits has shape (4, 4, 16); expected [B, *spatial, K], 2 spatial axes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_full_sentences(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        call()
    assert str(caught.value) == message


# Files.


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float64"])
def test_a_label_map_in_a_matlab_file_is_what_scipy_reads(dtype, compressed):
    wanted = np.arange(12).reshape(3, 4).astype(dtype)
    content, file = np.zeros((1, 1), [("Other", object), ("Label", object)]), io.BytesIO()
    content["Other"][0, 0], content["Label"][0, 0] = np.array([["x", np.eye(2)]], object), wanted
    scipy.io.savemat(file, {"first": np.eye(3), "G": content}, do_compression=compressed)
    found = mat.read_field(file.getvalue(), "G", "Label")
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == scipy.io.loadmat(file)["G"][0, 0]["Label"].dtype


def test_a_matlab_file_that_unpacks_to_too_much_is_refused():
    packed = zlib.compress(bytes(mat.MOST + 1))
    data = bytes(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed
    with pytest.raises(ValueError, match=rf"^it unpacks to more than {mat.MOST} bytes$"):
        mat.read_field(data, "G", "Label")


MUTATIONS = 600
READERS = ("image", "label", "sbd", "record", "archive", "npz", "safetensors")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """What each reader did with its mutated files, in a process with limits; see `readers.py`."""
    folder = tmp_path_factory.mktemp("mutated")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.reliability.readers", str(folder), str(MUTATIONS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert ended.returncode == 0, (
        f"ended with {ended.returncode} at {list((folder / 'own').iterdir())}: {ended.stderr[-3000:]}"
    )
    return json.loads(ended.stdout)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_within_bounds(name, fuzzed, record_property):
    found = fuzzed[name]
    for outcome in ("read", "refused"):
        record_property(outcome, found[outcome])
    assert found["otherwise"] == []
    assert found["read"] > MUTATIONS / 100
    assert found["refused"] > MUTATIONS / 4
