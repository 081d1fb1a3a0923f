"""Losses of regions and borders against loops over pixels, and against what they are made for."""

import itertools

import jax
import numpy as np
import pytest

from dilaff_jax import losses

CLASSES = 3


def scene(seed=0, shape=(2, 7, 9), ignored=0.15, blocks=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(*shape, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
    if blocks:  # with insides, so that there are borders
        labels[...] = 0
        labels[:, 2:6, 3:7] = 1
    labels[rng.random(shape) < ignored] = 255
    labels[1][labels[1] == 2] = 0  # the second image lacks a class
    return logits, labels


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def over_classes_and_images(logits, labels, of_mask):
    """Mean over the classes of each image's labels, then over images: of_mask(p, y, valid)."""
    found = []
    for p, label in zip(softmax(logits), labels, strict=True):
        valid = label != 255
        classes = sorted(set(label[valid]))
        values = [of_mask(p[..., c], label == c, valid) for c in classes]
        values = [v for v in values if v is not None]
        if values:
            found.append(np.mean(values))
    return np.mean(found)


def finished(loss, *arguments, **options):
    return float(losses.finish(loss(*arguments, **options)))


@pytest.mark.parametrize(("alpha", "beta", "smooth"), [(0.3, 0.7, 1.0), (0.5, 0.5, 0.0), (1, 1, 2)])
def test_tversky_equals_a_loop(alpha, beta, smooth):
    logits, labels = scene()

    def of_mask(p, y, valid):
        tp = fp = fn = 0.0
        for at in np.ndindex(*p.shape):
            if valid[at]:
                tp += p[at] * y[at]
                fp += p[at] * (1 - y[at])
                fn += (1 - p[at]) * y[at]
        return 1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth)

    expected = over_classes_and_images(logits, labels, of_mask)
    found = finished(losses.tversky, logits, labels, alpha=alpha, beta=beta, smooth=smooth)
    assert found == pytest.approx(expected, rel=1e-5)


def test_dice_is_one_minus_the_dice_coefficient():
    logits, labels = scene()

    def of_mask(p, y, valid):
        overlap = (p * y)[valid].sum()
        return 1 - (2 * overlap + 2) / (p[valid].sum() + y[valid].sum() + 2)

    expected = over_classes_and_images(logits, labels, of_mask)
    assert finished(losses.dice, logits, labels) == pytest.approx(expected, rel=1e-5)


def test_lovasz_equals_the_sum_over_thresholds_of_the_jaccard_loss():
    """∫ of 1 - IoU of {errors > t} over t in [0, 1]: the extension by definition, without sorting."""
    logits, labels = scene()

    def of_mask(p, y, valid):
        errors = np.where(y, 1 - p, p)
        limits = np.unique(np.concatenate([[0.0], errors[valid]]))
        total = 0.0
        for low, high in itertools.pairwise(limits):
            wrong = valid & (errors >= high)
            predicted = np.where(wrong, ~y, y) & valid
            true = y & valid
            union = (predicted | true).sum()
            total += (high - low) * (1 - (predicted & true).sum() / union)
        return total

    expected = over_classes_and_images(logits, labels, of_mask)
    assert finished(losses.lovasz_softmax, logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("width", "tolerance"), [(3, 5), (3, 1), (5, 3)])
def test_boundary_equals_a_loop(width, tolerance):
    logits, labels = scene(shape=(2, 12, 14), ignored=0.02, blocks=True)

    def spread(m, window):
        out, r = np.zeros_like(m), window // 2
        for y, x in np.ndindex(*m.shape):
            out[y, x] = m[max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1].max()
        return out

    def of_mask(p, y, valid):
        p, y = np.where(valid, p, 0), np.where(valid, y, 0).astype(float)
        out = spread((~valid).astype(float), width) > 0
        ours, theirs = (np.where(out, 0, spread(1 - m, width) - (1 - m)) for m in (p, y))
        if not theirs.sum():
            return None
        precision = (ours * spread(theirs, tolerance)).sum() / ours.sum()
        recall = (theirs * spread(ours, tolerance)).sum() / theirs.sum()
        return 1 - 2 * precision * recall / (precision + recall)

    expected = over_classes_and_images(logits, labels, of_mask)
    found = finished(losses.boundary, logits, labels, width=width, tolerance=tolerance)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["dice", "tversky", "lovasz_softmax", "boundary"])
def test_the_truth_has_no_loss_and_a_worse_mask_has_more(name):
    loss = getattr(losses, name)
    _, labels = scene(shape=(2, 24, 24), ignored=0, blocks=True)

    def sure_of(classes):
        return 40.0 * np.eye(CLASSES, dtype=np.float32)[classes]

    found = [finished(loss, sure_of(np.roll(labels, n, axis=2)), labels) for n in (0, 1, 4)]
    assert found[0] == pytest.approx(0, abs=1e-5)
    # Borders one pixel apart still match.
    assert found[0] <= found[1] < found[2]


@pytest.mark.parametrize("name", ["dice", "tversky", "lovasz_softmax", "boundary"])
def test_descending_along_the_gradient_finds_the_truth(name):
    _, labels = scene(shape=(2, 12, 12), ignored=0, blocks=True)
    logits = np.random.default_rng(0).normal(scale=0.1, size=(*labels.shape, CLASSES))
    step = jax.jit(jax.value_and_grad(lambda x: losses.finish(getattr(losses, name)(x, labels))))
    first, _ = step(logits)
    for _ in range(300):
        last, gradient = step(logits)
        logits = logits - 20 * np.asarray(gradient)
    assert last < 0.1 * first
    # Borders alone say nothing of what lies between them.
    assert name == "boundary" or (logits.argmax(-1) == labels).mean() > 0.99


def test_tversky_with_beta_above_alpha_counts_misses_for_more():
    labels = np.zeros((1, 10, 10), np.uint8)
    labels[0, 4:6, 4:6] = 1
    small, large = np.zeros_like(labels), np.zeros_like(labels)
    small[0, 4, 4:6] = 1
    large[0, 3:6, 4:6] = 1
    for alpha, beta, worse in ((0.1, 0.9, small), (0.9, 0.1, large)):
        found = [
            finished(
                losses.tversky,
                40.0 * np.eye(2, dtype=np.float32)[x],
                labels,
                alpha=alpha,
                beta=beta,
            )
            for x in (small, large)
        ]
        assert (found[0] > found[1]) == (worse is small)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tversky", {"alpha": -0.1}, "alpha is -0.1; expected 0 or more"),
        ("dice", {"smooth": -1}, "smooth is -1"),
        ("boundary", {"width": 4}, "width is 4; expected an odd number of 3 or more"),
        ("boundary", {"tolerance": 0}, "tolerance is 0; expected an odd number of 1 or more"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(losses, name)(*scene(), **options)


def test_volumes_are_accepted():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 5, 6, 7, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (1, 5, 6, 7))
    for name in ("dice", "tversky", "lovasz_softmax", "boundary"):
        assert 0 < finished(getattr(losses, name), logits, labels) < 1
