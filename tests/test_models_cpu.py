"""What has a form of its own on a CPU: the same numbers and gradients as in the other form."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dilaff_jax.models import dispatch, layers, segmenter
from dilaff_jax.models.cpu import conv, depthwise_conv, materialize
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


FORMS = [(depthwise_conv.conv, 4, (1, 4)), (conv.conv, 8, (8, 3))]


@pytest.mark.parametrize(
    ("conv", "channels", "filters"),
    # An image, and more features than channels: each has a filter gradient of its own.
    [*FORMS, (conv.conv, 3, (3, 4)), (conv.conv, 8, (8, 10))],
)
@pytest.mark.parametrize(
    ("size", "padding"),
    [((9, 12), "SAME"), ((9, 12), "torch"), ((9, 12), ((2, 1), (0, 3))), ((8, 1), "torch")],
)
@pytest.mark.parametrize(
    ("kernel", "stride", "rate"),
    # At rate 11 only the middle of the filter sees the image.
    [(3, 1, 1), (5, 2, 1), (5, 1, 2), (3, 2, 3), (1, 2, 1), (3, 1, 11)],
)
def test_values_and_gradients_are_xlas_own(
    conv, channels, filters, size, padding, kernel, stride, rate
):
    if padding == "torch":
        reach = rate * (kernel - 1) // 2
        padding = ((reach, reach), (reach, reach))
    x, w = noise(2, *size, channels), noise(kernel, kernel, *filters, seed=1)
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


@pytest.mark.parametrize(("conv", "channels", "filters"), FORMS)
def test_bfloat16_in_gives_bfloat16_out_summed_in_float32(conv, channels, filters):
    images, kernels = noise(2, 9, 9, channels), noise(5, 5, *filters, seed=1)
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
@pytest.mark.parametrize(("conv", "channels", "filters"), FORMS)
def test_each_platform_gets_the_form_that_it_is_fast_at(
    platform, calls_conv, conv, channels, filters
):
    def loss(x, w):
        return jnp.sum(conv(x, w, (1, 1), "SAME", rhs_dilation=(2, 2)) ** 2)

    # As a mesh of such devices would say.
    with dispatch.made_for({"cuda": "gpu"}.get(platform, platform)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(
            noise(1, 8, 8, channels), noise(3, 3, *filters)
        )
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in program) == calls_conv


@pytest.mark.parametrize(("conv", "channels", "filters"), FORMS)
@pytest.mark.parametrize(("stride", "rate"), [(1, 1), (2, 1), (1, 5)])
def test_it_is_exported_for_any_size(conv, channels, filters, stride, rate):
    kernel = noise(3, 3, *filters, seed=1)

    def function(x):
        return conv(x, kernel, (stride,) * 2, ((rate, rate),) * 2, rhs_dilation=(rate,) * 2)

    height, width = jax.export.symbolic_shape("h, w", constraints=["h >= 16", "w >= 16"])
    shape = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    with dispatch.made_for("any"):
        exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(shape)
    for size in ((16, 19), (23, 17)):
        x = noise(2, *size, channels)
        np.testing.assert_allclose(exported.call(x), function(x), atol=1e-5)


@pytest.mark.parametrize("size", [(7, 10), (8, 9), (1, 2)])
def test_the_maximum_and_its_gradient_are_torchs(size):
    # Integers: many pixels are equal, and the gradient of which is settled by their order alone.
    x = np.floor(noise(2, *size, 3) * 2)
    given = noise(2, *((n + 1) // 2 for n in size), 3, seed=1)
    ours, back = jax.vjp(jax.jit(layers.max_pool), x)
    theirs = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).requires_grad_()
    found = torch.nn.functional.max_pool2d(theirs, 3, stride=2, padding=1)
    found.backward(torch.from_numpy(np.array(given)).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(ours, found.detach().permute(0, 2, 3, 1))
    np.testing.assert_allclose(back(given)[0], theirs.grad.permute(0, 2, 3, 1), atol=1e-6)


def test_the_maximum_with_nan_is_nan_on_every_platforms_form():
    x = noise(1, 9, 9, 2)
    x[0, 3:5, 4, 0] = np.nan
    library = nn.max_pool(jnp.asarray(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
    assert np.isnan(library).sum() == 2
    np.testing.assert_array_equal(layers.max_pool(x), library)


def test_what_is_materialized_is_computed_once():
    def chain(x, held):
        y = jnp.maximum(2 * x + 1, 0)
        y = materialize.materialize({"y": y})["y"] if held else y
        return y[1:] @ x[:-1].T, y[:-1] @ x[1:].T

    x = noise(64, 64)

    def maxima(held):
        program = jax.jit(chain, static_argnums=1).lower(x, held).compile().as_text()
        return program.count(" maximum(")

    assert (maxima(False), maxima(True)) == (2, 1)
    np.testing.assert_allclose(chain(x, True), chain(x, False), atol=1e-4)
    np.testing.assert_allclose(
        jax.grad(lambda x: materialize.materialize(x).sum())(x), np.ones((64, 64))
    )


NETWORK = {
    "encoder": "resnet18",
    "encoder_options": {"stages": 1},
    "output_stride": 16,
    "decoder": "deeplabv3plus",
    "decoder_options": {"width": 8, "low_level": 8, "separable": True},
    "affinity": {"width": 8},
}


@pytest.fixture(scope="module")
def network():
    model = segmenter.build(NETWORK, 3)
    images = noise(2, 32, 40, 3) * 60 + 120
    variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(images)
    return model, variables, images


def outputs(model, variables, images):
    result, _ = model.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(1)},
    )
    return result


def test_a_network_for_an_accelerator_is_made_of_flaxs_own_layers(network):
    """No rule of our own for gradients, no choice between platforms: nothing of the CPU's room."""
    model, variables, images = network

    def primitives(platform):
        with dispatch.made_for(platform):
            return str(jax.make_jaxpr(functools.partial(outputs, model))(variables, images))

    for platform in ("gpu", "tpu"):
        program = primitives(platform)
        assert "custom_vjp" not in program
        assert "platform_index" not in program
        assert "layout_constraint" not in program
    assert "custom_vjp" in primitives("cpu")


def test_forward_mode_differentiation_works_off_a_cpu(network):
    """`jax.jvp` and a Hessian-vector product through a whole network, against reverse mode."""
    model, variables, images = network
    params = variables["params"]
    direction = jax.tree.map(lambda x: jnp.asarray(noise(*x.shape, seed=x.size % 97)), params)

    def loss(params):
        return jnp.mean(outputs(model, {**variables, "params": params}, images)["logits"] ** 2)

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    with dispatch.made_for("gpu"):
        _, slope = jax.jit(lambda: jax.jvp(loss, (params,), (direction,)))()
        gradient = jax.jit(jax.grad(loss))(params)
        _, product = jax.jit(lambda: jax.jvp(jax.grad(loss), (params,), (direction,)))()
        # Reverse over reverse: ∇(g·d).
        expected = jax.jit(jax.grad(lambda p: dot(jax.grad(loss)(p), direction)))(params)
    np.testing.assert_allclose(slope, dot(gradient, direction), rtol=1e-3)
    np.testing.assert_allclose(dot(product, product), dot(expected, expected), rtol=1e-2)


def test_both_make_the_same_numbers(network):
    model, variables, images = network

    def both(platform):
        def loss(params):
            given = outputs(model, {**variables, "params": params}, images)
            return sum(jnp.mean(given[k] ** 2) for k in ("logits", "affinity_logits"))

        with dispatch.made_for(platform):
            return jax.jit(jax.value_and_grad(loss))(variables["params"])

    (ours, by_ours), (theirs, by_theirs) = both("cpu"), both("gpu")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(by_theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 * scale), by_ours, by_theirs
    )
