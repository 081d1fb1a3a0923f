"""Losses of regions and of their borders: logits `[B, *spatial, C]`, labels `[B, *spatial]`.

Each is of an image as a whole, the mean over the classes that its labels hold, and counts as one;
images without a labelled pixel count nothing. So their sums add over devices, and the count is
known from the labels alone. They are blind to how sure a wrong pixel is: put them beside the
cross-entropy, as "cross_entropy + dice".
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Integer, Real

from dilaff_jax.errors import UserError
from dilaff_jax.labels import IGNORE_LABEL
from dilaff_jax.losses.loss_sum import LossSum, check_segmentation
from dilaff_jax.numerics import TINY

# Of a product of two sums over pixels: far below that of the faintest border.
_LITTLE = 1e-6


def tversky(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Tversky loss: 1 - (TP + s) / (TP + α·FP + β·FN + s), of each class of each image.

    TP = Σ p·y, FP = Σ p·(1-y), FN = Σ (1-p)·y over labelled pixels, p = softmax(logits), y the
    labels as one-hot. β above α counts what is missed for more than what is added: for small
    objects. Salehi et al. 2017 (https://arxiv.org/abs/1706.05721), whose best α, β are the
    defaults.

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        alpha: α ≥ 0.
        beta: β ≥ 0.
        smooth: s ≥ 0, in pixels: regions much smaller than it count for little.
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`: the images' losses and their number.

    Raises:
        UserError: shapes that do not match, NaN, labels that are neither class nor ignored; an
            option below 0.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("smooth", smooth)):
        if not value >= 0:
            raise UserError(f"{name} is {value}; expected 0 or more")
    probs, truth, _ = _prepared(logits, labels, ignore_label)
    space = tuple(range(1, probs.ndim - 1))
    hit, predicted, true = (jnp.sum(x, space) for x in (probs * truth, probs, truth))
    weighed = hit + alpha * (predicted - hit) + beta * (true - hit)
    # At s = 0 a class that an image lacks would be 0 / 0; it does not count anyhow.
    index = (hit + smooth) / jnp.maximum(weighed + smooth, TINY)
    return _over_images(1 - index, true > 0)


def dice(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    smooth: float = 1.0,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Dice loss: 1 - (2·TP + 2·s) / (2·TP + FP + FN + 2·s); Tversky's at α = β = ½.

    Milletari et al. 2016 (https://arxiv.org/abs/1606.04797), with sums in the place of their
    squares (Sudre et al. 2017, https://arxiv.org/abs/1707.03237). Arguments, result and errors as
    `tversky`.
    """
    return tversky(logits, labels, alpha=0.5, beta=0.5, smooth=smooth, ignore_label=ignore_label)


def lovasz_softmax(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Lovász-softmax: the convex extension of 1 - IoU, of each class of each image.

    With errors e = |y - p| in falling order, Σ_i e_i·(J_i - J_{i-1}), where J_i = 1 - IoU of the
    set in which the first i pixels are wrong. Berman et al. 2018
    (https://arxiv.org/abs/1705.08790), per image and over the classes present, as theirs
    (`per_image=True, classes='present'`).

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`: the images' losses and their number.

    Raises:
        UserError: as `tversky`.
    """
    probs, truth, valid = _prepared(logits, labels, ignore_label)
    images, classes = probs.shape[0], probs.shape[-1]
    probs, truth = (jnp.moveaxis(x.reshape(images, -1, classes), -1, 1) for x in (probs, truth))
    counts = valid.reshape(images, 1, -1)
    errors = jnp.where(counts, jnp.abs(truth - probs), 0)
    # Ignored pixels last: there they change neither intersection nor union of those before.
    order = jnp.argsort(-jax.lax.stop_gradient(jnp.where(counts, errors, -1)), axis=-1)
    errors, true = (jnp.take_along_axis(x, order, axis=-1) for x in (errors, truth))
    total = jnp.sum(true, axis=-1, keepdims=True)
    missed = jnp.cumsum(true, axis=-1)
    added = jnp.cumsum(1 - true, axis=-1)
    jaccard = 1 - (total - missed) / jnp.maximum(total + added, 1)
    steps = jnp.diff(jaccard, axis=-1, prepend=0)
    return _over_images(jnp.sum(errors * steps, axis=-1), total[..., 0] > 0)


def boundary(
    logits: Real[ArrayLike, " B *spatial C"],
    labels: Integer[ArrayLike, " B *spatial"],
    *,
    width: int = 3,
    tolerance: int = 5,
    ignore_label: int = IGNORE_LABEL,
) -> LossSum:
    """Boundary loss: 1 - F of the borders of each class of each image, from soft masks.

    The border of a mask m is max over `width`² pixels of (1 - m), less (1 - m). A border pixel is
    matched as far as the other border, spread by the maximum over `tolerance`² pixels, reaches it:
    precision Σ b_p·spread(b_y) / Σ b_p, recall Σ b_y·spread(b_p) / Σ b_y, F their harmonic mean.
    Bokhovkin and Burnaev 2019 (https://arxiv.org/abs/1905.07852) and its defaults. Pixels whose
    window holds an ignored one belong to no border (our choice). The gradient of a maximum jumps
    where two pixels tie, so that roundings, as of other numbers of devices, show more than in
    other losses.

    Args:
        logits: `[B, *spatial, C]`.
        labels: integers `[B, *spatial]`, classes 0..C-1 or `ignore_label`.
        width: odd, 3 or more; the border is (width - 1)/2 pixels wide.
        tolerance: odd, 1 or more; borders (tolerance - 1)/2 pixels apart still match.
        ignore_label: the label of pixels that do not count.

    Returns:
        LossSum of shape `[]`: the images' losses and the number of images that have a border.

    Raises:
        UserError: as `tversky`; an even or too small window.
    """
    for name, value, least in (("width", width, 3), ("tolerance", tolerance, 1)):
        if value < least or value % 2 == 0:
            raise UserError(f"{name} is {value}; expected an odd number of {least} or more")
    probs, truth, valid = _prepared(logits, labels, ignore_label)
    near_ignored = _spread(1.0 - valid[..., None], width) > 0
    space = tuple(range(1, probs.ndim - 1))

    def border(mask: jax.Array) -> jax.Array:
        inverse = 1 - mask
        return jnp.where(near_ignored, 0, _spread(inverse, width) - inverse)

    ours, theirs = border(probs), border(truth)
    hits, found = jnp.sum(ours * _spread(theirs, tolerance), space), jnp.sum(ours, space)
    reached, true = jnp.sum(theirs * _spread(ours, tolerance), space), jnp.sum(theirs, space)
    # 2·P·R / (P + R) of P = hits/found and R = reached/true, which may be 0/0: a flat mask.
    score = 2 * hits * reached / (hits * true + reached * found + _LITTLE)
    # An impossible label, NaN by now, spoils the loss also where no border is counted.
    score = score + 0 * jnp.sum(probs, space)
    return _over_images(1 - score, true > 0)


def _prepared(
    logits: ArrayLike, labels: ArrayLike, ignore_label: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities and one-hot labels `[B, *spatial, C]`, 0 where ignored, and the mask."""
    logits, labels, valid = check_segmentation(logits, labels, ignore_label)
    inside = valid[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    return jnp.where(inside, jax.nn.softmax(logits), 0), jnp.where(inside, truth, 0), valid


def _over_images(loss: jax.Array, present: jax.Array) -> LossSum:
    """The mean of `[B, C]` over the classes present, summed over the images that have any."""
    classes = jnp.sum(present, axis=-1)
    mean = jnp.sum(jnp.where(present, loss, 0), axis=-1) / jnp.maximum(classes, 1)
    return LossSum(jnp.sum(mean), jnp.sum(classes > 0, dtype=jnp.float32))


def _spread(x: jax.Array, window: int) -> jax.Array:
    """The maximum over `window` pixels along each axis of space, at the edge of those inside."""
    for axis in range(1, x.ndim - 1):
        x = _running_max(x, window // 2, axis)
    return x


def _running_max(x: jax.Array, reach: int, axis: int) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (reach, reach)
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    size = x.shape[axis]
    shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * reach + 1))
    return functools.reduce(jnp.maximum, shifted)
