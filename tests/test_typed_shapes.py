"""The shapes and dtypes that the method's signatures state are those that go in and come out."""

import functools
import types

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from dilaff_jax import affinity, losses, metrics, numerics, propagate, resize

CLASSES = 3


def checked(function):
    """The function, whose annotations are held to what it is given and returns."""
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)


def traced(test):
    """The test without what is computed: arrays are traced, which shapes and dtypes need alone."""

    @functools.wraps(test)
    def run(case):
        arrays = {k: v for k, v in vars(case).items() if k not in ("size", "offsets")}
        jax.eval_shape(lambda traced: test(types.SimpleNamespace(**vars(case) | traced)), arrays)

    return run


class Case:
    """Arguments of every public function, of `ndim` spatial dimensions."""

    def __init__(self, ndim):
        rng = np.random.default_rng(ndim)
        self.size = {1: (40,), 2: (5, 6), 3: (5, 6, 4)}[ndim]
        self.offsets = affinity.offsets((1, 2), ndim)
        k = len(self.offsets)
        self.labels = rng.integers(0, CLASSES, (2, *self.size)).astype(np.uint8)
        self.labels[0].flat[0] = 255
        self.logits = rng.normal(size=(2, *self.size, CLASSES)).astype(np.float32)
        self.affinity_logits = rng.normal(size=(2, *self.size, k)).astype(np.float32)
        self.probs = rng.dirichlet(np.ones(CLASSES), (2, *self.size)).astype(np.float32)
        self.target, self.valid = affinity.targets(self.labels, self.offsets)


@pytest.fixture(params=[1, 2, 3], ids="{}-D".format)
def case(request):
    return Case(request.param)


@traced
def test_affinity(case):
    offsets = checked(affinity.offsets)((1, 2), len(case.size))
    checked(affinity.dilation_of)(offsets)
    checked(affinity.distinct_dilations)(offsets)
    checked(affinity.shift)(case.logits, offsets[0])
    checked(affinity.inside)(case.size, offsets)
    checked(affinity.targets)(case.labels, offsets)
    checked(affinity.pair_weights)(case.labels, offsets, np.ones(CLASSES, np.float32))
    checked(affinity.soft_targets)(case.labels, offsets, case.size, CLASSES)
    small = tuple(-(-n // 2) for n in case.size)
    assert checked(affinity.downsample_labels)(case.labels, small).shape == (2, *small)
    half = affinity.offsets((1, 2), len(case.size), symmetric=True)
    checked(affinity.mirror)(case.affinity_logits[..., : len(half)], offsets)


@traced
def test_propagation(case):
    offsets, guide = case.offsets, case.affinity_logits
    checked(propagate.signed)(case.probs, guide, offsets)
    checked(propagate.random_walk)(case.probs, jax.nn.sigmoid(guide), offsets)
    checked(propagate.per_offset)(0.5, offsets)
    size = tuple(2 * n for n in case.size)
    checked(propagate.refine_logits)(case.logits, guide, offsets, size)
    checked(propagate.correction)(case.logits, guide, offsets)
    checked(resize.bilinear)(jnp.asarray(case.logits), size)
    checked(resize.matrix)(3, 7)
    checked(numerics.log_probs)(jnp.asarray(case.probs))


@traced
def test_losses(case):
    for name in ("cross_entropy", "focal", "ohem", "loss_max_pooling"):
        checked(losses.finish)(checked(getattr(losses, name))(case.logits, case.labels))
    for name in ("balanced", "bce", "focal", "ohem", "max_pooling"):
        loss = checked(getattr(losses, f"affinity_{name}"))
        checked(losses.finish)(loss(case.affinity_logits, case.target, case.valid, 2))
    checked(losses.adaptive_affinity_fields)(case.logits, case.labels, sizes=(1,))
    if len(case.size) == 2:
        logits, labels = jnp.asarray(case.logits), jnp.asarray(case.labels)
        checked(losses.upsampled_loss)(losses.cross_entropy, logits, labels)


def test_metrics(case):
    pred = case.logits.argmax(-1)
    confusion = checked(metrics.confusion)(pred, case.labels, CLASSES)
    checked(metrics.class_ious)(confusion)
    checked(metrics.class_accuracies)(confusion)
    checked(metrics.segmentation_summary)(confusion)
    checked(metrics.host_confusion)(pred, case.labels, CLASSES, case.labels != 255)
    one, truth = pred[0], case.labels[0]
    checked(metrics.boundary_distance)(truth)
    checked(metrics.boundary_pixels)(one)
    bands = checked(metrics.trimap)(one, truth, CLASSES)
    iou = checked(metrics.boundary_iou)(one, truth, CLASSES)
    f = checked(metrics.boundary_f)(one, truth, CLASSES)
    checked(metrics.f_score)(f.pixels)
    checked(metrics.boundary_summary)(iou=iou, f=f, trimaps=bands)
    checked(metrics.transitions)(one, one, truth, CLASSES)
    histogram = checked(metrics.affinity_histogram)(
        case.affinity_logits, case.target, case.valid, 2
    )
    for name in ("precision_recall_f1", "best_f1", "average_precision", "fit_bias"):
        checked(getattr(metrics, name))(histogram)
    checked(metrics.expected_calibration_error)(histogram)


def test_a_shape_that_does_not_fit_is_caught(case):
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(propagate.signed)(case.probs[:, :-1], case.affinity_logits, case.offsets)
