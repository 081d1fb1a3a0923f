"""Depthwise and dense convolution: the same numbers and gradients as XLA's, in either form."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax.models import dense, depthwise
from tests.test_encoders import noise


def native(x, kernel, strides, padding, rates):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=rates,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


FORMS = [(depthwise.conv, (1, 4)), (dense.conv, (4, 3))]


@pytest.mark.parametrize(("conv", "channels"), FORMS)
@pytest.mark.parametrize(
    ("size", "padding"),
    [((9, 12), "SAME"), ((9, 12), "torch"), ((9, 12), ((2, 1), (0, 3))), ((8, 1), "torch")],
)
@pytest.mark.parametrize(
    ("kernel", "stride", "rate"),
    # At rate 11 only the middle of the filter sees the image.
    [(3, 1, 1), (5, 2, 1), (5, 1, 2), (3, 2, 3), (1, 2, 1), (3, 1, 11)],
)
def test_values_and_gradients_are_xlas_own(conv, channels, size, padding, kernel, stride, rate):
    if padding == "torch":
        reach = rate * (kernel - 1) // 2
        padding = ((reach, reach), (reach, reach))
    x, w = noise(2, *size, 4), noise(kernel, kernel, *channels, seed=1)
    strides, rates = (stride, stride), (rate, rate)
    if not isinstance(padding, str) and any(
        n + sum(p) < rate * (kernel - 1) + 1 for n, p in zip(size, padding, strict=True)
    ):
        pytest.skip("the filter does not fit into the padded image")

    def both(function):
        def loss(x, w):
            y = function(x, w)
            return jnp.sum(jnp.sin(0.1 * y)), y

        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, y), gradients = jax.jit(both)(x, w)
        return y, *gradients

    ours = both(lambda x, w: conv(x, w, strides, padding, rhs_dilation=rates))
    theirs = both(lambda x, w: native(x, w, strides, padding, rates))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(10, float(jnp.abs(b).max())))


@pytest.mark.parametrize(("conv", "channels"), FORMS)
def test_bfloat16_in_gives_bfloat16_out_summed_in_float32(conv, channels):
    images, kernels = noise(2, 9, 9, 4), noise(5, 5, *channels, seed=1)
    x, w = (jnp.asarray(v, jnp.bfloat16) for v in (images, kernels))

    def loss(x, w):
        return jnp.sum(conv(x, w, (1, 1), "SAME", rhs_dilation=(1, 1)) ** 2)

    y = conv(x, w, (1, 1), "SAME", rhs_dilation=(1, 1))
    wide = native(x.astype(jnp.float32), w.astype(jnp.float32), (1, 1), "SAME", (1, 1))
    assert {v.dtype for v in (y, *jax.grad(loss, argnums=(0, 1))(x, w))} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("platform", "calls_conv"), [("cpu", False), ("cuda", True), ("tpu", True)]
)
@pytest.mark.parametrize(("conv", "channels"), FORMS)
def test_each_platform_gets_the_form_that_it_is_fast_at(platform, calls_conv, conv, channels):
    def loss(x, w):
        return jnp.sum(conv(x, w, (1, 1), "SAME", rhs_dilation=(2, 2)) ** 2)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(
        noise(1, 8, 8, 4), noise(3, 3, *channels)
    )
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in program) == calls_conv


@pytest.mark.parametrize(("conv", "channels"), FORMS)
@pytest.mark.parametrize(("stride", "rate"), [(1, 1), (2, 1), (1, 5)])
def test_it_is_exported_for_any_size(conv, channels, stride, rate):
    kernel = noise(3, 3, *channels, seed=1)

    def function(x):
        return conv(x, kernel, (stride,) * 2, ((rate, rate),) * 2, rhs_dilation=(rate,) * 2)

    height, width = jax.export.symbolic_shape("h, w", constraints=["h >= 16", "w >= 16"])
    shape = jax.ShapeDtypeStruct((2, height, width, 4), jnp.float32)
    exported = jax.export.export(jax.jit(function))(shape)
    for size in ((16, 19), (23, 17)):
        x = noise(2, *size, 4)
        np.testing.assert_allclose(exported.call(x), function(x), atol=1e-5)
