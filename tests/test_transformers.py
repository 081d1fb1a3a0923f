"""Transformers and ConvNeXt: sizes, parameters, attention in parts, positions, stochastic depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import resize
from dilaff_jax.models import dispatch, layers, segmenter, transformer
from dilaff_jax.models.encoders import vit

# Parameters of the encoder. MiT's and ConvNeXt's papers state 3.7 to 81.4 and 28.6 to 198 million
# with a classifier of 1000 classes (513,000 in ConvNeXt-T is 768·1000 + 1000 less the norms here).
PARAMETERS = {
    "mit_b0": 3_319_392,
    "mit_b1": 13_151_424,
    "mit_b2": 24_196_288,
    "mit_b3": 44_072_128,
    "mit_b4": 60_842_688,
    "mit_b5": 81_443_008,
    "convnext_tiny": 27_821_472,
    "convnext_small": 49_456_032,
    "convnext_base": 87_568_256,
    "convnext_large": 196_233_024,
    "dinov2_vits14": 22_056_192,
    "dinov2_vitb14": 86_579_712,
    "dinov2_vitl14": 304_367_616,
    "dinov2_vitg14": 1_136_479_232,
    "dinov2_vits14_reg": 22_057_728,
    "dinov2_vitb14_reg": 86_582_784,
    "dinov2_vitl14_reg": 304_371_712,
    "dinov2_vitg14_reg": 1_136_485_376,
    "dinov3_vits16": 21_596_160,
    "dinov3_vits16plus": 28_692_480,
    "dinov3_vitb16": 85_659_648,
    "dinov3_vitl16": 303_128_576,
    "dinov3_vith16plus": 840_591_360,
}
CHANNELS = {
    "mit_b0": (32, 64, 160, 256),
    "convnext_tiny": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
    "convnext_large": (192, 384, 768, 1536),
}


def stride_of(name):
    return 16 if name.startswith("dinov") else 32


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def abstract(name, size):
    encoder = segmenter.build_encoder(name, output_stride=stride_of(name))
    x = jnp.zeros((2, *size, 3))
    return jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), x, False))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    _, variables = abstract(name, (32, 32))
    assert sum(v.size for v in jax.tree.leaves(variables)) == PARAMETERS[name]
    assert list(variables) == ["params"]


@pytest.mark.parametrize("size", [(65, 97), (50, 1), (1, 1), (224, 224)])
@pytest.mark.parametrize("name", ["mit_b0", "convnext_tiny", "dinov2_vits14", "dinov3_vitb16"])
def test_maps_have_the_strides_of_their_source_at_any_size(name, size):
    features, _ = abstract(name, size)

    def halved(n):  # torch leaves out what fills no window
        return max(n, 2) // 2

    if name.startswith("dinov"):
        patch = int(name[-2:])
        grid = tuple(-(-n // patch) for n in size)
        expected = [(2, *grid, 768 if "vitb" in name else 384)] * 4
    elif name.startswith("mit"):
        expected = [
            (2, *(-(-n // s) for n in size), c)
            for s, c in zip((4, 8, 16, 32), CHANNELS[name], strict=True)
        ]
    else:
        grid, expected = tuple(max(n, 4) // 4 for n in size), []
        for c in CHANNELS[name]:
            expected.append((2, *grid, c))
            grid = tuple(halved(n) for n in grid)
    assert [f.shape for f in features] == expected


@pytest.mark.parametrize(
    ("name", "stride"), [("mit_b0", 8), ("convnext_tiny", 16), ("dinov2_vits14", 8)]
)
def test_another_output_stride_is_refused_with_the_one_that_there_is(name, stride):
    encoder = segmenter.build_encoder(name, output_stride=stride)
    with pytest.raises(ValueError, match=f"output_stride is {stride}; allowed: {stride_of(name)}"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))


@pytest.mark.parametrize("blocks", [(3, 1), (1, 1), (1, 12)])
def test_blocks_that_there_are_not_are_refused(blocks):
    encoder = segmenter.build_encoder("dinov2_vits14", output_stride=16, blocks=blocks)
    with pytest.raises(ValueError, match=r"blocks are .*the last 11"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False))


SMALL = {
    "mit_b0": {"widths": (8, 16), "depths": (1, 1), "heads": (1, 2), "reductions": (2, 1)},
    "convnext_tiny": {"widths": (8, 16), "depths": (1, 1)},
    "dinov2_vits14": {"width": 16, "depth": 2, "heads": 2, "hidden": 24},
    "dinov3_vits16": {"width": 16, "depth": 2, "heads": 2, "hidden": 24},
}
DECODERS = ("segformer", "upernet", "linear", "fcn", "deeplabv3", "deeplabv3plus", "pspnet", "unet")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", SMALL)
def test_every_encoder_goes_with_every_decoder_and_the_head(encoder, decoder):
    config = {
        "encoder": encoder,
        "encoder_options": SMALL[encoder],
        "output_stride": stride_of(encoder),
        "decoder": decoder,
        "decoder_options": {"widths": (8,)} if decoder == "unet" else {},
        "affinity": {"width": 8, "sources": ("image", "decoder", "probabilities")},
    }
    model = segmenter.build(config, 5)
    x = jnp.zeros((1, 33, 50, 3))
    out, _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), x, train=False))
    assert out["logits"].shape[-1] == 5
    assert out["affinity_logits"].shape == (1, 9, 13, 32)


def test_the_head_reads_the_last_map_of_a_stride_that_several_have():
    encoder = {"encoder": "dinov2_vits14", "encoder_options": SMALL["dinov2_vits14"]}
    config = {
        **encoder,
        "output_stride": 16,
        "decoder": "linear",
        "affinity": {"sources": ("stride14",)},
    }
    model = segmenter.build(config, 5)
    x = noise(1, 28, 28, 3)
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    before = model.apply(variables, x, train=False)["affinity_logits"]
    last = variables["params"]["encoder"]["block_1"]["attention"]["dense"]["kernel"]
    variables["params"]["encoder"]["block_1"]["attention"]["dense"]["kernel"] = 50 * last
    assert not np.allclose(model.apply(variables, x, train=False)["affinity_logits"], before)


@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (65, 9), (1, 5)])
def test_attention_in_parts_is_attention(queries, keys, monkeypatch):
    q, k, v = (noise(2, n, 3, 8, seed=i) for i, n in enumerate((queries, keys, keys)))

    def reference(q, k, v):
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)

    def with_gradients(function):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2))(q, k, v)

    expected = with_gradients(reference)
    for kept, limit in ((2**22, 2**26), (0, 2**26), (0, 4 * 2 * 3 * keys * 13), (0, 1)):
        monkeypatch.setattr(transformer, "KEPT_BYTES", kept)
        monkeypatch.setattr(transformer, "SCORE_BYTES", limit)
        np.testing.assert_allclose(transformer.attend(q, k, v), reference(q, k, v), atol=2e-6)
        for a, b in zip(
            jax.tree.leaves(with_gradients(transformer.attend)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_memory_of_attention_grows_with_the_image_and_not_with_its_square():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 6, 64), jnp.float32)
        step = jax.jit(jax.grad(lambda x: jnp.sum(transformer.attend(x, x, x) ** 2)))
        return step.lower(x).compile().memory_analysis().temp_size_in_bytes

    # 1024×2048 pixels are 8192 patches of 16: all scores at once would take 1.6 GB, twice.
    small, large = temporaries(2048), temporaries(8192)
    assert large < 8 * transformer.SCORE_BYTES
    assert large < 4 * small


@pytest.mark.parametrize("size", [(16, 23), (37, 60), (80, 12), (1, 3), (37, 37)])
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_is_torchs(size, antialias):
    torch = pytest.importorskip("torch")
    x = noise(2, 37, 37, 5)
    expected = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
        size=size,
        mode="bicubic",
        antialias=antialias,
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resize.bicubic(x, size, antialias=antialias), expected, atol=2e-5)


def test_rotary_positions_leave_lengths_and_depend_on_distance_alone():
    cosine, sine = vit.rope(3, 5, 16)
    assert cosine.shape == (15, 16)
    x = jnp.broadcast_to(noise(1, 1, 2, 16), (1, 16, 2, 16))
    turned = vit.rotate(x, cosine, sine)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])  # the class token has no place
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    grid = turned[0, 1:].reshape(3, 5, 2, 16)
    products = jnp.sum(grid[:, 1:] * grid[:, :-1], axis=-1)
    np.testing.assert_allclose(
        products, jnp.broadcast_to(products[:1, :1], products.shape), rtol=1e-4
    )


def test_stochastic_depth_leaves_out_branches_by_image_however_the_batch_is_spread():
    x = noise(64, 3, 5, 4)

    def drop(x, axis_name):
        layer = transformer.DropPath(0.25, layers.Style(axis_name=axis_name))
        return layer.apply({}, x, True, rngs={"dropout": jax.random.key(3)})

    whole = drop(x, None)
    kept = np.asarray(jnp.any(whole != 0, axis=(1, 2, 3)))
    assert 0.6 < kept.mean() < 0.9
    np.testing.assert_allclose(whole[kept], x[kept] / 0.75, rtol=1e-6)
    np.testing.assert_array_equal(whole[~kept], 0)
    np.testing.assert_array_equal(transformer.DropPath(0.25).apply({}, x, False), x)
    if jax.local_device_count() < 4:
        pytest.skip("needs 4 devices")
    spread = jax.pmap(lambda x: drop(x, "batch"), axis_name="batch", devices=jax.devices()[:4])
    np.testing.assert_array_equal(spread(x.reshape(4, 16, 3, 5, 4)).reshape(x.shape), whole)


@pytest.mark.parametrize("name", SMALL)
def test_stochastic_depth_is_of_training_alone(name):
    encoder = segmenter.build_encoder(
        name, output_stride=stride_of(name), drop_path=0.5, **SMALL[name]
    )
    x = noise(8, 32, 32, 3)
    variables = encoder.init(jax.random.key(0), x, False)
    variables = jax.tree.map(lambda v: v + 0.3 * noise(*v.shape), variables)

    def run(train, seed):
        return encoder.apply(variables, x, train, rngs={"dropout": jax.random.key(seed)})[-1]

    np.testing.assert_array_equal(run(False, 0), run(False, 1))
    assert not np.allclose(run(True, 0), run(True, 3))


def test_on_a_gpu_attention_in_bfloat16_is_cudnns_where_scores_are_large(monkeypatch):
    plain, fused = jax.nn.dot_product_attention, []

    def stand_in(*x, implementation, **options):
        fused.append(
            (dispatch.target(), x[0].shape[1], x[0].dtype.name) * (implementation != "xla")
        )
        return plain(*x, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    for platform in ("gpu", "tpu", "cpu", "any"):
        for dtype in (jnp.bfloat16, jnp.float32):
            for length in (64, 2048):
                x = jax.ShapeDtypeStruct((1, length, 3, 8), dtype)
                with dispatch.made_for(platform):
                    jax.eval_shape(lambda x: transformer.attend(x, x, x), x)
    assert set(fused) == {(), ("gpu", 2048, "bfloat16")}


@pytest.mark.parametrize(("queries", "keys"), [(12, 6), (13, 6), (12, 7), (13, 7)])
def test_cudnn_gets_even_numbers_of_tokens_and_does_not_see_the_added_one(
    monkeypatch, queries, keys
):
    plain, seen = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, implementation, **options):
        seen.append((query.shape[1] % 2, key.shape[1] % 2, value.shape[1] % 2))
        return plain(query, key, value, implementation="xla", **options)

    q, k, v = noise(2, queries, 3, 8), noise(2, keys, 3, 8), noise(2, keys, 3, 8)

    def with_gradients(attend):
        return jax.value_and_grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2))(q, k, v)

    expected = with_gradients(transformer._attend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found = with_gradients(transformer._fused)
    assert set(seen) == {(0, 0, 0)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
