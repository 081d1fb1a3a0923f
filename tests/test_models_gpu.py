"""What has a form of its own on a GPU: the same numbers and gradients as in XLA's own form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dilaff_jax import losses
from dilaff_jax.losses import segmentation
from dilaff_jax.models import dispatch, geometry, layers
from dilaff_jax.models.gpu import conv
from tests.test_encoders import noise

# Channels and features, window, rate: taken as products where channels are 4 times the features.
CASES = [
    ((2, 9, 7, 3), 5, (3, 3), (2, 2)),  # odd sizes
    ((1, 13, 11, 16), 4, (3, 3), (3, 3)),  # products
    ((1, 5, 6, 8), 2, (3, 3), (9, 9)),  # a rate beyond the map: one tap of nine sees it
    ((2, 8, 9, 4), 4, (5, 5), (2, 2)),  # a larger window
    ((1, 7, 7, 32), 4, (3, 1), (2, 1)),  # one axis only
    ((1, 10, 9, 6), 6, (3, 3), (2, 3)),  # another rate on each axis
    ((1, 65, 65, 4), 4, (3, 3), (4, 4)),
]


def both(shape, features, window, rates, dtype=jnp.float32):
    """Our form and XLA's of one convolution, the map and the filters."""
    at = geometry.Geometry(
        (1, 1), tuple((r * (k // 2),) * 2 for r, k in zip(rates, window, strict=True)), rates
    )
    x = jnp.asarray(noise(*shape, seed=1), dtype)
    kernel = jnp.asarray(noise(*window, shape[-1], features, seed=2), dtype)
    assert conv.takes(x, kernel, at)
    ours = functools.partial(conv.conv, strides=(1, 1), padding=at.pads, rhs_dilation=rates)
    return ours, functools.partial(geometry.native, at=at, depthwise=False), x, kernel


def close(found, expected, rtol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dilated_convolution_and_all_its_derivatives_are_xlas(case):
    ours, xla, x, kernel = both(*case)

    def everything(f):
        y, back = jax.vjp(f, x, kernel)
        along = jax.jvp(f, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))[1]

        def slope(x, kernel):
            given = jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1))(x, kernel)
            return sum(jnp.vdot(g, g) for g in given)

        return y, back(jnp.sin(y)), along, jax.grad(slope, (0, 1))(x, kernel)

    close(jax.jit(lambda: everything(ours))(), jax.jit(lambda: everything(xla))(), 1e-5)


def test_it_is_torchs():
    ours, _, x, kernel = both((1, 13, 11, 16), 4, (3, 3), (3, 3))
    image = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).requires_grad_()
    filters = torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1).requires_grad_()
    expected = torch.nn.functional.conv2d(image, filters, padding=3, dilation=3)
    expected.square().sum().backward()
    y = ours(x, kernel)
    dx, dw = jax.grad(lambda x, w: jnp.sum(ours(x, w) ** 2), (0, 1))(x, kernel)
    close(y, expected.detach().permute(0, 2, 3, 1), 1e-5)
    close(dx, image.grad.permute(0, 2, 3, 1), 1e-5)
    close(dw, filters.grad.permute(2, 3, 1, 0), 1e-5)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_bfloat16_is_summed_in_float32(case):
    """As near to the sums in float32 as XLA's own form, in both gradients."""
    ours, xla, x, kernel = both(*case, dtype=jnp.bfloat16)

    def gradients(f, *arrays):
        return jax.grad(lambda x, w: jnp.sum(f(x, w).astype(jnp.float32)), (0, 1))(*arrays)

    exact = gradients(xla, x.astype(jnp.float32), kernel.astype(jnp.float32))
    close(gradients(ours, x, kernel), exact, 1e-2)
    assert ours(x, kernel).dtype == jnp.bfloat16
    close(ours(x, kernel), xla(x.astype(jnp.float32), kernel.astype(jnp.float32)), 1e-2)


def test_it_may_be_batched_computed_again_and_traced_with_other_arrays_closed_over():
    ours, xla, x, kernel = both(*CASES[1])
    xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    for axes, arrays in (((0, None), (xs, kernel)), ((None, 0), (x, kernels)), (0, (xs, kernels))):
        found, expected = (jax.vmap(f, axes)(*arrays) for f in (ours, xla))
        close(found, expected, 1e-5)
    again = jax.grad(lambda w: jnp.sum(jax.checkpoint(ours)(x, w) ** 2))(kernel)
    close(again, jax.grad(lambda w: jnp.sum(xla(x, w) ** 2))(kernel), 1e-5)


@pytest.mark.parametrize(
    ("strides", "padding", "rates"),
    [((1, 1), "SAME", (1, 1)), ((2, 2), ((2, 2), (2, 2)), (2, 2)), ((1, 1), "VALID", (2, 2))],
    ids=["not dilated", "strided", "not padded"],
)
def test_other_convolutions_are_xlas_own(strides, padding, rates):
    x, kernel = jnp.asarray(noise(1, 9, 8, 4)), jnp.asarray(noise(3, 3, 4, 4))

    def ours(x, kernel):
        return conv.conv(x, kernel, strides, padding, rhs_dilation=rates)

    assert "dilated_conv" not in str(jax.make_jaxpr(ours)(x, kernel))
    at = geometry.geometry(x, kernel, strides, padding, rates)
    close(ours(x, kernel), geometry.native(x, kernel, at, depthwise=False), 1e-6)


def test_an_option_leaves_all_convolutions_to_xla():
    def primitives(convolution, platform):
        style = layers.Style(convolution=convolution)
        layer = layers.ConvNorm(4, kernel=3, dilation=2, style=style)
        x = jnp.zeros((1, 9, 9, 4))
        with dispatch.made_for(platform):
            return str(jax.make_jaxpr(lambda: layer.init(jax.random.key(0), x, False))())

    for platform in ("cpu", "gpu"):
        own = {"cpu": "custom_vjp", "gpu": "dilated_conv"}[platform]
        assert own in primitives("auto", platform)
        assert own not in primitives("xla", platform)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.focal])
@pytest.mark.parametrize("most", [2**29, 20_000], ids=["at once", "in blocks"])
def test_the_loss_in_planes_is_the_loss_in_rows(monkeypatch, loss, most):
    monkeypatch.setattr(segmentation, "_PLANES", most)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 9, 11, 5)), jnp.float32)
    labels = jnp.asarray(rng.choice([0, 1, 2, 3, 4, 255], (2, 130, 83)), jnp.uint8)

    def mean(blocks):
        def of(logits):
            total = losses.upsampled_loss(loss, logits, labels, blocks)
            return total.sum / total.count

        return jax.value_and_grad(of)(logits)

    close(mean("planes"), mean("rows"), 1e-5)


def test_the_loss_in_planes_takes_logits_of_full_size():
    logits = jnp.asarray(noise(1, 12, 10, 3))
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 12, 10)), jnp.uint8)
    found = losses.upsampled_loss(losses.cross_entropy, logits, labels, "planes")
    close(found, losses.cross_entropy(logits, labels), 1e-6)
