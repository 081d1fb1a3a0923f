"""The Segmenter: what it returns, what its config allows, what the affinity head costs."""

import functools
import itertools
import textwrap

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dilaff_jax import affinity, resize, schema
from dilaff_jax.models import decoders, layers, segmenter
from dilaff_jax.models.encoders import resnet
from tests.test_encoders import SHORT, random_variables

# A ResNet-18 of two stages: seconds to compile, and every part a Segmenter has.
SMALL = {
    "encoder": "resnet18",
    "encoder_options": SHORT["resnet18"],
    "decoder": "fcn",
    "output_stride": 8,
    "aux": True,
    "affinity": {"width": 8, "rates": (1, 2)},
}


def photos(batch=2, height=33, width=47, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3)).astype(np.uint8)


def variables_of(model, x):
    class Positional:  # random_variables calls init as encoders and decoders have it
        def init(self, key, x, train):
            return model.init(key, x, train=train)

    return random_variables(Positional(), x)


def shapes(config, x, num_classes=5):
    model = segmenter.build(config, num_classes)
    out, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), x, train=False)
    )
    return out, variables


def count(variables):
    return sum(v.size for v in jax.tree.leaves(variables["params"]))


def test_outputs_are_float32_at_their_own_strides():
    out, _ = shapes(SMALL | {"dtype": "bfloat16"}, photos())
    assert {k: v.shape for k, v in out.items()} == {
        "logits": (2, 5, 6, 5),
        "affinity_logits": (2, 9, 12, 32),
        "aux_logits": (2, 9, 12, 5),
    }
    assert {v.dtype for v in out.values()} == {jnp.dtype("float32")}


def test_variables_are_float32_params_and_batch_stats_only():
    _, variables = shapes(SMALL | {"dtype": "bfloat16"}, photos())
    assert set(variables) == {"params", "batch_stats"}
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_without_aux_and_affinity_their_outputs_are_none():
    out, variables = shapes(SMALL | {"aux": False, "affinity": None}, photos())
    assert out["aux_logits"] is None
    assert out["affinity_logits"] is None
    assert set(variables["params"]) == {"encoder", "decoder"}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"encoder": "resnet50", "decoder": "deeplabv3"}, 42_004_074),
        ({"encoder": "resnet101", "decoder": "deeplabv3"}, 60_996_202),
        ({"encoder": "resnet50", "decoder": "fcn"}, 35_322_218),
        ({"encoder": "resnet101", "decoder": "fcn"}, 54_314_346),
    ],
)
def test_parameters_are_as_many_as_torchvisions(config, parameters):
    _, variables = shapes(config | {"aux": True}, photos(1), 21)
    assert count(variables) == parameters


def program(config, size=33, num_classes=5):
    model = segmenter.build(config, num_classes)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), train=False)
    )
    return jax.jit(lambda v, x: model.apply(v, x, train=False)).lower(variables, x)


def test_without_affinity_no_operation_of_the_head_is_left():
    """Encoder and decoder called by hand make the same program, operation for operation."""
    config = SMALL | {"affinity": None, "aux": False}
    model = segmenter.build(config, 5)
    x = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.uint8)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), train=False)
    )

    def by_hand(variables, x):
        part = {k: {c: v[k] for c, v in variables.items()} for k in ("encoder", "decoder")}
        y = segmenter.normalise(x, model.encoder)
        features = model.encoder.apply(part["encoder"], y, False)
        return model.decoder.apply(part["decoder"], features, False)[0]

    base = program(config).cost_analysis()["flops"]
    assert base == jax.jit(by_hand).lower(variables, x).cost_analysis()["flops"]
    assert base < program(SMALL | {"aux": False}).cost_analysis()["flops"]


def test_the_head_is_a_minor_expense_on_deeplabv3_resnet50_at_513():
    """At most 3 % parameters and, with three steps of 2(K+1)·C·H·W, 5 % FLOPs of the base."""
    base, head = ({"affinity": None}, {"affinity": {}})
    parameters, flops = (
        [count(shapes(c, photos(1), 21)[1]) for c in (base, head)],
        [program(c, 513, 21).cost_analysis()["flops"] for c in (base, head)],
    )
    steps = 3 * 2 * 33 * 21 * 129**2
    assert parameters[0] < parameters[1] <= 1.03 * parameters[0]
    assert flops[0] < flops[1] + steps <= 1.05 * flops[0]


@pytest.mark.parametrize("stride", [1, 2, 4, 16])
@pytest.mark.parametrize(
    "sources",
    [("decoder",), ("stride4",), ("stride2", "image"), ("decoder", "stride4", "stride2", "image")],
)
def test_the_head_stands_at_its_stride_whatever_it_reads(stride, sources):
    head = {"width": 8, "stride": stride, "sources": sources, "dilations": (1, 3)}
    out, variables = shapes(SMALL | {"affinity": head}, photos(1, 33, 47))
    assert out["affinity_logits"].shape == (1, -(-33 // stride), -(-47 // stride), 16)
    names = {name.split("_")[0] for name in variables["params"]["affinity_head"]}
    assert set(sources) <= names


def test_without_rates_the_head_is_one_convolution_of_one_source():
    """A 1×1 convolution, then enlarged: the same as a product, written out."""
    head = {"rates": (), "sources": ("stride4",), "stride": 2, "dilations": (1, 2)}
    model = segmenter.build(SMALL | {"affinity": head}, 3)
    image = photos(1, 32, 48)
    variables = model.init(jax.random.key(0), image, train=False)
    parameters = variables["params"]["affinity_head"]
    assert list(parameters) == ["logits"]
    found = model.apply(variables, image, train=False)["affinity_logits"]
    features = encoder_features(model, variables, image)[1]
    kernel, bias = parameters["logits"]["kernel"][0, 0], parameters["logits"]["bias"]
    expected = resize.bilinear(features @ kernel + bias, (16, 24))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def encoder_features(model, variables, image):
    """What the encoder of a model gives, by itself."""
    own = {kind: tree["encoder"] for kind, tree in variables.items() if "encoder" in tree}
    return model.encoder.apply(own, segmenter.normalise(image, model.encoder), False)


def test_logits_of_an_embedding_are_cosines_of_neighbours():
    """Against a loop over pixels and offsets."""
    head = {"rates": (), "sources": ("stride4",), "dilations": (1, 3), "embedding": 5}
    model = segmenter.build(SMALL | {"affinity": head}, 3)
    image = photos(1, 24, 20)
    variables = model.init(jax.random.key(1), image, train=False)
    parameters = variables["params"]["affinity_head"]
    parameters["sharpness"] = jnp.array([3.0, 5.0])
    parameters["threshold"] = jnp.array([0.25, -0.5])
    found = np.asarray(model.apply(variables, image, train=False)["affinity_logits"])
    kernel, bias = parameters["logits"]["kernel"][0, 0], parameters["logits"]["bias"]
    e = np.asarray(encoder_features(model, variables, image)[1] @ kernel + bias)[0]
    inside = 0
    for (y, x), (k, o) in itertools.product(np.ndindex(6, 5), enumerate(model.offsets)):
        there = np.array([y, x]) + o
        if (there < 0).any() or (there >= (6, 5)).any():
            continue
        a, b = e[y, x], e[tuple(there)]
        cosine = a @ b / np.sqrt(((a @ a) + 1e-6) * ((b @ b) + 1e-6))
        d = k // 8
        assert found[0, y, x, k] == pytest.approx((3, 5)[d] * (cosine - (0.25, -0.5)[d]), abs=1e-3)
        inside += 1
    assert inside > 200
    assert found.shape == (1, 6, 5, 16)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"sources": ("decoder", "stride4")}, "one convolution of one source.*'stride4'"),
        ({"sources": ("stride2",), "stride": 4}, "'stride2' is finer than the grid"),
        ({"sources": ("decoder",), "embedding": 0}, "embedding is 0; expected a positive"),
    ],
)
def test_heads_without_rates_that_cannot_be_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        shapes(SMALL | {"affinity": {"rates": ()} | head}, photos(1, 32, 32))


UNET = {
    "encoder": "unet",
    "encoder_options": {"widths": (4, 6, 8)},
    "decoder": "unet",
    "decoder_options": {"widths": (6,)},
}


@pytest.mark.parametrize("size", [(33, 47), (1, 9)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_head_reads_the_maps_of_a_unet_at_their_own_strides(stride, size):
    sources = ("decoder", "stride4", "stride2", "stride1", "image")
    head = {"width": 8, "stride": stride, "sources": sources, "dilations": (1, 3)}
    model = segmenter.build(UNET | {"affinity": head}, 5)
    variables = variables_of(model, photos(1, 33, 47))
    layers = variables["params"]["affinity_head"]
    halvings = {s: sum(f"{s}_down" in name for name in layers) for s in sources}
    per_source = {1: (0, 0, 0, 0, 0), 2: (0, 0, 0, 1, 0), 4: (0, 0, 1, 2, 1)}[stride]
    assert halvings == {"decoder": {4: 1}.get(stride, 0)} | dict(
        zip(sources[1:], per_source[1:], strict=True)
    )
    out = model.apply(variables, np.full((1, *size, 3), 99, np.uint8), train=False)
    assert out["affinity_logits"].shape == (1, *(-(-n // stride) for n in size), 16)
    assert out["logits"].shape == (1, *(-(-n // 2) for n in size), 5)


def test_a_map_that_the_encoder_does_not_give_is_refused_with_those_that_it_gives():
    for config, source, given in (
        (SMALL, "stride1", "stride2, stride4"),
        (UNET, "stride8", "stride1, stride2, stride4, decoder"),
    ):
        model = segmenter.build(config | {"affinity": {"sources": (source, "image")}}, 5)
        with pytest.raises(ValueError, match=f"'{source}', which this encoder.*gives {given}"):
            variables_of(model, photos())


def test_the_head_reads_only_what_it_is_told_to():
    x = jnp.asarray(photos(1), jnp.float32)

    def reads(source):
        config = {"encoder": "tests.tiny:TinyEncoder", "output_stride": 8, "decoder": "fcn"}
        model = segmenter.build(config | {"affinity": {"width": 8, "sources": (source,)}}, 5)
        variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), x)
        gradient = jax.jit(
            jax.grad(
                lambda p: jnp.sum(
                    model.apply({**variables, "params": p}, x, train=False)["affinity_logits"]
                )
            )
        )(variables["params"])
        return {
            part: any(np.any(v != 0) for v in jax.tree.leaves(tree))
            for part, tree in gradient.items()
        }

    assert reads("image") == {"encoder": False, "decoder": False, "affinity_head": True}
    assert reads("stride2") == {"encoder": True, "decoder": False, "affinity_head": True}
    assert reads("decoder") == {"encoder": True, "decoder": True, "affinity_head": True}


@pytest.mark.parametrize("sources", [("decoder", "stride4", "stride2"), ("image", "stride2")])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 1)])
def test_an_image_may_be_as_small_as_one_pixel(size, stride, sources):
    """Where no map is finer than the head's grid, the layers are those of larger images."""
    config = SMALL | {"affinity": {"width": 8, "sources": sources, "stride": stride}}
    model = segmenter.build(config, 5)
    variables = variables_of(model, photos())
    out = model.apply(variables, np.full((1, *size, 3), 99, np.uint8), train=False)
    grid = tuple(-(-n // stride) for n in size)
    assert out["affinity_logits"].shape[1:3] == grid
    assert np.isfinite(out["affinity_logits"]).all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_joined_maps_are_convolved_as_if_they_lay_in_one(kernel):
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, 9, 7, c)).astype(np.float32) for c in (3, 5, 4)]
    if kernel == 1:  # what is one value an image is so everywhere
        maps.append(rng.normal(size=(2, 1, 1, 6)).astype(np.float32))
    whole = np.concatenate([np.broadcast_to(x, (2, 9, 7, x.shape[-1])) for x in maps], axis=-1)
    layer = layers.ConvNorm(8, kernel, dilation=2)
    variables = layer.init(jax.random.key(0), whole, train=True)
    joined = layer.init(jax.random.key(0), maps, train=True)
    jax.tree.map(np.testing.assert_array_equal, joined, variables)

    def loss(params, x):
        found = layer.apply(variables | {"params": params}, x, train=True, mutable="batch_stats")
        return jnp.sum(jnp.sin(found[0])), found

    for a, b in zip(
        jax.tree.leaves(jax.value_and_grad(loss, has_aux=True)(variables["params"], maps)),
        jax.tree.leaves(jax.value_and_grad(loss, has_aux=True)(variables["params"], whole)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_symmetric_head_predicts_the_same_from_both_ends():
    config = SMALL | {"affinity": {"width": 8, "symmetric": True, "dilations": (1, 2)}}
    model = segmenter.build(config, 5)
    x = photos()
    variables = variables_of(model, x)
    a = model.apply(variables, x, train=False)["affinity_logits"]
    half = variables["params"]["affinity_head"]["logits"]["kernel"]
    assert (a.shape[-1], half.shape[-1]) == (16, 8)
    offsets = model.offsets.tolist()
    for k, o in enumerate(offsets):
        back = offsets.index([-v for v in o])
        there = affinity.shift(a[..., back : back + 1], o)[..., 0]
        inside = np.asarray(affinity.inside(a.shape[1:3], np.array([o])))[None, ..., 0]
        np.testing.assert_array_equal(a[..., k] * inside, there * inside)


def test_offsets_are_those_of_the_channels():
    model = segmenter.build(SMALL | {"affinity": {"dilations": (1, 4)}}, 5)
    np.testing.assert_array_equal(model.offsets, affinity.offsets((1, 4)))
    assert segmenter.build(SMALL | {"affinity": None}, 5).offsets is None


def test_gradient_reaches_every_parameter():
    model = segmenter.build(SMALL, 5)
    x = photos()
    variables = variables_of(model, x)

    @jax.jit
    def gradient(params):
        def loss(params):
            out, _ = model.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return sum(jnp.sum(jnp.sin(v)) for v in out.values())

        return jax.grad(loss)(params)

    for path, value in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert np.isfinite(value).all(), path
        assert np.any(value != 0), path


def test_training_on_four_devices_equals_one_device_with_the_whole_batch():
    if jax.local_device_count() < 4:
        pytest.skip("needs 4 devices")
    x = photos(8)
    variables = variables_of(segmenter.build(SMALL, 5), x)

    def run(axis_name):
        model = segmenter.build(SMALL, 5, axis_name=axis_name)
        return lambda x: model.apply(
            variables,
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )

    expected, expected_state = jax.jit(run(None))(x)
    mapped = jax.pmap(run("batch"), axis_name="batch", devices=jax.devices()[:4])
    ours, state = mapped(x.reshape(4, 2, *x.shape[1:]))
    for key, value in expected.items():
        a = np.asarray(ours[key]).reshape(value.shape)
        np.testing.assert_allclose(a, value, atol=1e-4 * np.abs(value).max(), err_msg=key)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-4)


def test_uint8_and_float_images_give_the_same():
    model = segmenter.build(SMALL, 5)
    x = photos()
    variables = variables_of(model, x)
    a, b = (model.apply(variables, v, train=False)["logits"] for v in (x, x.astype(np.float32)))
    np.testing.assert_array_equal(a, b)


def test_images_are_normalised_by_the_encoders_mean_and_std():
    options = SHORT["resnet18"] | {"mean": (1.0, 2.0, 3.0), "std": (2.0, 4.0, 8.0)}
    model = segmenter.build(SMALL | {"encoder_options": options}, 5)
    image = jnp.array([5.0, 10.0, 19.0]).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(segmenter.normalise(image, model.encoder).ravel(), [2, 2, 2])


@pytest.mark.parametrize("shape", [(33, 47, 3), (1, 33, 47, 4), (1, 3, 33, 47)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected RGB \[B, H, W, 3\]"):
        segmenter.build(SMALL, 5).init(jax.random.key(0), jnp.zeros(shape), train=False)


def test_default_config_builds_and_is_complete():
    config = schema.defaults(segmenter.KEYS)
    model = segmenter.build(config, 21)
    assert model == segmenter.build({}, 21)
    assert isinstance(config, ml_collections.ConfigDict)


def test_lists_and_locked_configs_work_as_configs_write_them():
    config = schema.defaults(segmenter.KEYS)
    config.update(encoder="resnet50", multi_grid=[1, 2, 4])
    config.affinity = ml_collections.ConfigDict({"dilations": [1, 2], "sources": ["stride4"]})
    model = segmenter.build(config.lock(), 21)
    assert model.encoder.multi_grid == (1, 2, 4)
    assert model.affinity_head.sources == ("stride4",)
    hash(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encodr": "resnet50"}, "no key 'encodr' .did you mean 'encoder'.*allowed: encoder"),
        ({"decoder": "deeplab"}, "decoder is 'deeplab'; allowed: deeplabv3.*unet"),
        (
            {"decoder_options": {"bins": 8}},
            "decoder_options has no key 'bins'; allowed: dropout, w",
        ),
        (
            {"aux": False, "aux_options": {"width": 8}},
            "aux_options are given and model.aux is False",
        ),
        (
            {"decoder": "deeplabv3", "decoder_options": {"rate": (1,)}},
            "did you mean 'rates'.*allowed: output_stride",
        ),
        ({"output_stride": 4}, "output_stride is 4; expected one of 8, 16, 32"),
        ({"norm": "layer"}, "norm is 'layer'; expected one of 'batch', 'group'"),
        ({"norm": "group", "frozen_norm": True}, "frozen_norm is set and norm is 'group'"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of 'float32', 'bfloat16'"),
        ({"affinity": {"dilation": (1,)}}, "affinity has no key 'dilation'.*dilations"),
        ({"affinity": {"stride": 3}}, "affinity.stride is 3; allowed: 1, 2, 4, 8, 16"),
        (
            {"affinity": {"sources": ("stride3",)}},
            "'stride3', which this encoder does not give.*stride4",
        ),
        (
            {"affinity": {"sources": ("strid4",)}},
            "affinity.sources has 'strid4'; allowed: 'decoder'",
        ),
        ({"affinity": {"sources": ()}}, "give one or more, such as"),
        ({"affinity": {"dilations": (0, 1)}}, r"dilations is \(0, 1\); expected positive integers"),
        ({"affinity": {"dilations": (1, 1)}}, r"dilations are \(1, 1\); each may be given once"),
        ({"affinity": {"width": 0}}, "width is 0; expected a positive integer"),
        ({"affinity": {"rates": ()}}, r"rates are \(\), one convolution of one source"),
        ({"affinity": {"symmetric": 1}}, "symmetric is 1; expected True or False"),
        ({"affinity": True}, "affinity is True; expected a dict of options or None"),
        ({"decoder_options": None}, "decoder_options is None; expected a dict of options$"),
        ({"decoder_options": {"dropout": 1.5}}, r"dropout is 1.5; expected a number in \[0, 1\)"),
        ({"encoder": None}, "encoder is None; expected a name"),
        ({"multi_grid": 3}, "multi_grid is 3; expected positive integers"),
        ({"encoder_options": {"mean": 127}}, "mean is 127; expected one number for each channel"),
        (
            {"encoder_options": {"mean": (1.0, 2.0)}},
            r"mean has 2 numbers and std 3; give one each",
        ),
        ({"decoder": "upernet", "decoder_options": {"scales": (4, "2")}}, "expected numbers"),
    ],
)
def test_wrong_configs_are_refused_with_what_is_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        shapes(SMALL | change, photos(1))


def test_num_classes_must_be_positive():
    with pytest.raises(ValueError, match="num_classes is 0"):
        segmenter.build({}, 0)


def test_a_file_dropped_into_a_folder_is_found_by_its_name(tmp_path, monkeypatch):
    """No list to enter it in: one file, one name."""
    folder = tmp_path / "extra"
    folder.mkdir()
    (folder / "linear_probe.py").write_text(
        textwrap.dedent(
            """
            import flax.linen as nn
            from dilaff_jax.models import layers

            class LinearProbe(nn.Module):
                num_classes: int
                style: layers.Style = layers.Style()
                level: int = -1
                torch_keys = ()

                @nn.compact
                def __call__(self, features, train):
                    x = features[self.level]
                    return layers.classifier(self.num_classes, self.style)(x), x

            VARIANTS = {"linear_probe": LinearProbe}
            """
        )
    )
    monkeypatch.setattr(decoders, "__path__", [*decoders.__path__, str(folder)])
    config = SMALL | {"decoder": "linear_probe", "decoder_options": {"level": 1}}
    out, _ = shapes(config, photos())
    assert out["logits"].shape == (2, 9, 12, 5)
    with pytest.raises(ValueError, match="no key 'width'; allowed: level"):
        segmenter.build(config | {"decoder_options": {"width": 1}}, 5)
    with pytest.raises(ValueError, match=r"allowed: .*linear_probe"):
        segmenter.build(SMALL | {"decoder": "no_such"}, 5)


class Tiny(resnet.ResNet):
    block: type = resnet.BasicBlock
    depths: tuple = (1, 1)
    stages: int = 2


def test_a_module_outside_the_package_is_named_by_module_and_attribute():
    outside = {"encoder": "tests.test_models:Tiny", "encoder_options": {}}
    out, variables = shapes(SMALL | outside, photos())
    assert out["logits"].shape == (2, 5, 6, 5)
    assert "layer2_0" in variables["params"]["encoder"]
    with pytest.raises(ValueError, match="is no Flax module class"):
        segmenter.build(SMALL | {"encoder": "tests.test_models:photos"}, 5)
