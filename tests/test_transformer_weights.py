"""Weights of transformers: Hugging Face's files and their authors' in, and back out, bit for bit."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", reason="needs the extra [huggingface]")

import torch

from dilaff_jax import resize
from dilaff_jax.interop import files, layouts, pretrained, torch_layout, transformers_models
from dilaff_jax.models import segmenter

TOKENS = {"width": 16, "depth": 3, "heads": 2, "hidden": 32, "grid": 3}
MIT = {"widths": (4, 8, 20, 16), "depths": (2, 1, 1, 1), "epsilon": 1e-5}
CONVNEXT = {"widths": (4, 8, 12, 16), "depths": (1, 2, 1, 1)}
SIZE = (112, 224)  # of patches of 14 as well as 16


def library():
    return transformers_models.library()


def randomised(network):
    torch.manual_seed(0)
    transformers_models.randomise(network)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def dinov2(**options):
    return library().Dinov2Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=42,
        patch_size=14,
        **options,
    )


def make_hugging_face(kind):
    """A small network of the package's with random weights."""
    t = library()
    tokens = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    segformer = t.SegformerConfig(
        hidden_sizes=list(MIT["widths"]),
        depths=list(MIT["depths"]),
        decoder_hidden_size=8,
        num_labels=5,
    )
    convnext = t.ConvNextConfig(
        hidden_sizes=list(CONVNEXT["widths"]),
        depths=list(CONVNEXT["depths"]),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    makers = {
        "segformer": lambda: t.SegformerForSemanticSegmentation(segformer),
        "mit": lambda: t.SegformerForImageClassification(segformer),
        "convnext": lambda: t.ConvNextForImageClassification(convnext),
        "upernet": lambda: t.UperNetForSemanticSegmentation(
            t.UperNetConfig(
                backbone_config=convnext, hidden_size=8, num_labels=5, auxiliary_channels=3
            )
        ),
        "dinov2": lambda: t.Dinov2Model(dinov2()),
        "dinov2_gated": lambda: t.Dinov2Model(dinov2(use_swiglu_ffn=True)),
        "dinov2_reg": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**tokens, mlp_ratio=2, image_size=42, patch_size=14)
        ),
        "dinov3": lambda: t.DINOv3ViTModel(
            t.DINOv3ViTConfig(**tokens, intermediate_size=32, num_register_tokens=4)
        ),
        "dinov3_gated": lambda: t.DINOv3ViTModel(
            t.DINOv3ViTConfig(
                **tokens,
                intermediate_size=32,
                num_register_tokens=4,
                use_gated_mlp=True,
                hidden_act="silu",
            )
        ),
    }
    return randomised(makers[kind]())


# Our encoder, its options, and our decoder with its options.
OURS = {
    "segformer": ("mit_b0", MIT, "segformer", {"width": 8}),
    "mit": ("mit_b0", MIT, "segformer", {"width": 8}),
    "convnext": ("convnext_tiny", CONVNEXT, "upernet", {"width": 8}),
    "upernet": ("convnext_tiny", CONVNEXT, "upernet", {"width": 8}),
    "dinov2": ("dinov2_vits14", TOKENS, "linear", {}),
    # SwiGLU has two thirds of the width, in eights.
    "dinov2_gated": ("dinov2_vits14", TOKENS | {"hidden": 24, "gated": True}, "linear", {}),
    "dinov2_reg": ("dinov2_vits14_reg", TOKENS, "linear", {}),
    "dinov3": ("dinov3_vits16", TOKENS, "linear", {}),
    "dinov3_gated": ("dinov3_vits16", TOKENS | {"gated": True}, "linear", {}),
}
WHOLE = ("segformer", "upernet")


def ours(kind):
    encoder, options, decoder, decoder_options = OURS[kind]
    config = {
        "encoder": encoder,
        "encoder_options": options,
        "output_stride": 16 if encoder.startswith("dino") else 32,
        "decoder": decoder,
        "decoder_options": decoder_options,
    }
    if kind == "upernet":
        config |= {"aux": True, "aux_options": {"width": 3}}
    model = segmenter.build(config, 5)
    image = jnp.zeros((1, *SIZE, 3))
    return model, jax.jit(lambda: model.init(jax.random.key(1), image, train=False))()


def images():
    return np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.uint8)


def pixels(model):
    x = (images() - np.array(model.encoder.mean)) / np.array(model.encoder.std)
    return torch.tensor(x).float().permute(0, 3, 1, 2)


def same(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def last_map(network, x):
    """What a backbone of the package's gives last, `[B, h, w, C]`."""
    with torch.no_grad():
        out = network(x, output_hidden_states=True)
    if hasattr(out, "logits"):
        return out.hidden_states[-1].permute(0, 2, 3, 1).numpy()
    patch = network.config.patch_size
    grid = [n // patch for n in x.shape[2:]]
    tokens = out.last_hidden_state
    return tokens[:, -grid[0] * grid[1] :].reshape(len(x), *grid, -1).numpy()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", OURS)
def test_a_file_of_hugging_faces_computes_what_it_computed_there(kind, suffix, tmp_path, caplog):
    network = make_hugging_face(kind)
    network.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if suffix == "bin":
        state = {k: torch.tensor(v) for k, v in files.read(path).items()}
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path)
    model, variables = ours(kind)
    load = pretrained.load_model if kind in WHOLE else pretrained.load_backbone
    loaded = load(model, variables, path)
    x = pixels(model)
    if kind in WHOLE:
        logits = model.apply(loaded, images(), train=False)["logits"]
        with torch.no_grad():
            expected = network(x).logits.permute(0, 2, 3, 1).numpy()
        # UPerNet's are enlarged already.
        same(logits if kind == "segformer" else resize.bilinear(logits, SIZE), expected)
        return
    features = model.encoder.apply({"params": loaded["params"]["encoder"]}, pixels_last(x), False)
    expected = last_map(network, x)
    if kind == "convnext":  # before the normalisation that a classifier has not
        norm = loaded["params"]["encoder"]["norm_3"]
        mean, var = expected.mean(-1, keepdims=True), expected.var(-1, keepdims=True)
        expected = (expected - mean) / np.sqrt(var + 1e-6) * norm["scale"] + norm["bias"]
    same(features[-1], expected)


def pixels_last(x):
    return jnp.asarray(x.permute(0, 2, 3, 1).numpy())


def to_authors(kind, state):
    """The state under the names of the authors' repositories, written by another hand.

    Names are made from scratch for each layer that there is; what is joined there is joined.
    """
    made, used = {}, set()

    def put(name, *sources):
        for leaf in ("weight", "bias"):
            if all(f"{s}.{leaf}" in state for s in sources):
                made[f"{name}.{leaf}"] = np.concatenate([state[f"{s}.{leaf}"] for s in sources])
                used.update(f"{s}.{leaf}" for s in sources)

    def one(name, source):
        made[name] = state[source]
        used.add(source)

    if kind.startswith("dinov2"):
        for name in ("cls_token", "mask_token", "register_tokens"):
            if f"embeddings.{name}" in state:
                one(name, f"embeddings.{name}")
        one("pos_embed", "embeddings.position_embeddings")
        put("patch_embed.proj", "embeddings.patch_embeddings.projection")
        put("norm", "layernorm")
        for i in range(3):
            a, b = f"blocks.{i}", f"encoder.layer.{i}"
            attention = f"{b}.attention.attention"
            put(f"{a}.attn.qkv", f"{attention}.query", f"{attention}.key", f"{attention}.value")
            put(f"{a}.attn.proj", f"{b}.attention.output.dense")
            for n in (1, 2):
                put(f"{a}.norm{n}", f"{b}.norm{n}")
                one(f"{a}.ls{n}.gamma", f"{b}.layer_scale{n}.lambda1")
                put(f"{a}.mlp.fc{n}", f"{b}.mlp.fc{n}")
            put(f"{a}.mlp.w12", f"{b}.mlp.weights_in")
            put(f"{a}.mlp.w3", f"{b}.mlp.weights_out")
    elif kind.startswith("dinov3"):
        one("cls_token", "embeddings.cls_token")
        one("mask_token", "embeddings.mask_token")
        one("storage_tokens", "embeddings.register_tokens")
        put("patch_embed.proj", "embeddings.patch_embeddings")
        put("norm", "norm")
        made["rope_embed.periods"] = np.ones(4, np.float32)
        for i in range(3):
            a, b = f"blocks.{i}", f"layer.{i}"
            projections = [f"{b}.attention.{n}_proj" for n in "qkv"]
            state = {**state, f"{projections[1]}.bias": np.full(16, 7, np.float32)}
            used.add(f"{projections[1]}.bias")
            put(f"{a}.attn.qkv", *projections)
            made[f"{a}.attn.qkv.bias_mask"] = np.ones(48, np.float32)
            put(f"{a}.attn.proj", f"{b}.attention.o_proj")
            gated = f"{b}.mlp.gate_proj.weight" in state
            put(f"{a}.mlp.w1", f"{b}.mlp.gate_proj")
            put(f"{a}.mlp." + ("w2" if gated else "fc1"), f"{b}.mlp.up_proj")
            put(f"{a}.mlp." + ("w3" if gated else "fc2"), f"{b}.mlp.down_proj")
            for n in (1, 2):
                put(f"{a}.norm{n}", f"{b}.norm{n}")
                one(f"{a}.ls{n}.gamma", f"{b}.layer_scale{n}.lambda1")
    elif kind in ("mit", "segformer"):
        before = "backbone." if kind == "segformer" else ""
        for i, depth in enumerate(MIT["depths"]):
            put(f"{before}patch_embed{i + 1}.proj", f"segformer.encoder.patch_embeddings.{i}.proj")
            put(
                f"{before}patch_embed{i + 1}.norm",
                f"segformer.encoder.patch_embeddings.{i}.layer_norm",
            )
            put(f"{before}norm{i + 1}", f"segformer.encoder.layer_norm.{i}")
            for j in range(depth):
                a, b = f"{before}block{i + 1}.{j}", f"segformer.encoder.block.{i}.{j}"
                attention = f"{b}.attention.self"
                put(f"{a}.attn.q", f"{attention}.query")
                put(f"{a}.attn.kv", f"{attention}.key", f"{attention}.value")
                put(f"{a}.attn.sr", f"{attention}.sr")
                put(f"{a}.attn.norm", f"{attention}.layer_norm")
                put(f"{a}.attn.proj", f"{b}.attention.output.dense")
                for n in (1, 2):
                    put(f"{a}.norm{n}", f"{b}.layer_norm_{n}")
                    put(f"{a}.mlp.fc{n}", f"{b}.mlp.dense{n}")
                put(f"{a}.mlp.dwconv.dwconv", f"{b}.mlp.dwconv.dwconv")
            put(f"decode_head.linear_c{i + 1}.proj", f"decode_head.linear_c.{i}.proj")
        put("decode_head.linear_pred", "decode_head.classifier")
        put("decode_head.linear_fuse.conv", "decode_head.linear_fuse")
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"decode_head.batch_norm.{leaf}" in state:
                one(f"decode_head.linear_fuse.bn.{leaf}", f"decode_head.batch_norm.{leaf}")
        put("head", "classifier")
    else:
        before, root = ("backbone.", "backbone.") if kind == "upernet" else ("", "convnext.")
        put(f"{before}downsample_layers.0.0", f"{root}embeddings.patch_embeddings")
        put(f"{before}downsample_layers.0.1", f"{root}embeddings.layernorm")
        put("norm", f"{root}layernorm")
        put("head", "classifier")
        for i, depth in enumerate(CONVNEXT["depths"]):
            for n in (0, 1):
                put(
                    f"{before}downsample_layers.{i}.{n}",
                    f"{root}encoder.stages.{i}.downsampling_layer.{n}",
                )
            put(f"{before}norm{i}", f"{root}hidden_states_norms.stage{i + 1}")
            for j in range(depth):
                a, b = f"{before}stages.{i}.{j}", f"{root}encoder.stages.{i}.layers.{j}"
                short = {
                    "depthwise_conv": "dwconv",
                    "pointwise_conv1": "pwconv1",
                    "pointwise_conv2": "pwconv2",
                }
                for name, source in short.items():  # mmsegmentation's names in a whole network
                    put(f"{a}.{name if kind == 'upernet' else source}", f"{b}.{source}")
                put(f"{a}.norm", f"{b}.layernorm")
                one(f"{a}.gamma", f"{b}.layer_scale_parameter")
        for name in set(state) - used:
            if name.startswith(("decode_head", "auxiliary_head")):
                one(re.sub(r"\.classifier\.", ".conv_seg.", name).replace("batch_norm", "bn"), name)
    assert used >= set(state), sorted(set(state) - used)
    return made


@pytest.mark.parametrize("kind", OURS)
def test_a_file_of_its_authors_is_the_same_as_hugging_faces(kind, tmp_path):
    make_hugging_face(kind).save_pretrained(tmp_path)
    state = files.read(tmp_path / "model.safetensors")
    theirs = to_authors(kind, state)
    assert not {k for k in theirs if k.endswith("weight")} & {k for k in state if "layer" in k}
    files.write(tmp_path / "authors.npz", theirs)
    model, variables = ours(kind)
    load = pretrained.load_model if kind in WHOLE else pretrained.load_backbone
    expected = load(model, variables, tmp_path / "model.safetensors")
    found = load(model, variables, tmp_path / "authors.npz")
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    if kind not in WHOLE:
        assert any(
            np.any(a != b)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True)
        )


def test_names_of_another_layout_are_left_as_they_are():
    for names in (["conv1.weight"], ["pos_embed", "blocks.0.attn.in_proj.weight"], ["a.cls_token"]):
        state = {name: np.zeros(2) for name in names}
        assert list(layouts.hugging_face(state)) == names


def test_blocks_in_chunks_are_numbered_through():
    state = {"pos_embed": np.zeros(1)}
    for chunk, block in ((0, 0), (1, 11)):
        state[f"blocks.{chunk}.{block}.attn.qkv.weight"] = np.arange(9.0).reshape(9, 1)
    found = layouts.hugging_face(state)
    assert found["encoder.layer.11.attention.attention.key.weight"].ravel().tolist() == [3, 4, 5]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_network_goes_back_to_hugging_face_bit_for_bit(kind, tmp_path):
    network = make_hugging_face(kind)
    network.save_pretrained(tmp_path / "theirs")
    model, variables = ours(kind)
    loaded = pretrained.load_model(model, variables, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(
        (tmp_path / "theirs" / "config.json").read_text()
    )
    pretrained.save_model(model, loaded, tmp_path / "ours" / "model.safetensors")
    again = type(network).from_pretrained(tmp_path / "ours").eval()
    for (name, a), b in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_every_key_that_does_not_fit_is_named(tmp_path):
    make_hugging_face("segformer").save_pretrained(tmp_path)
    state = files.read(tmp_path / "model.safetensors")
    query = "segformer.encoder.block.0.0.attention.self.query"
    del state[f"{query}.weight"]
    state[f"{query}.scale"] = np.zeros(4)
    state["decode_head.classifier.bias"] = np.zeros(7, np.float32)
    files.write(tmp_path / "wrong.npz", state)
    model, variables = ours("segformer")
    with pytest.raises(torch_layout.KeyMismatchError) as error:
        pretrained.load_model(model, variables, tmp_path / "wrong.npz")
    said = str(error.value)
    assert f"1 missing:\n  {query}.weight" in said
    assert f"1 not in the model:\n  {query}.scale" in said
    assert "decode_head.classifier.bias (7,), expected (5,)" in said


def test_another_number_of_classes_is_loaded_when_said_so(tmp_path):
    make_hugging_face("segformer").save_pretrained(tmp_path)
    encoder, options, decoder, decoder_options = OURS["segformer"]
    config = {"encoder": encoder, "encoder_options": options, "output_stride": 32}
    model = segmenter.build(config | {"decoder": decoder, "decoder_options": decoder_options}, 9)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    head = ("decode_head.classifier.*",)
    loaded = pretrained.load_model(
        model, variables, tmp_path / "model.safetensors", drop=head, keep=head
    )
    assert loaded["params"]["decoder"]["logits"]["bias"].shape == (9,)


def test_norms_that_an_imagenet_file_has_not_stay_as_they_begin(tmp_path):
    make_hugging_face("convnext").save_pretrained(tmp_path)
    model, variables = ours("convnext")
    loaded = pretrained.load_backbone(model, variables, tmp_path / "model.safetensors")
    for i in range(4):
        np.testing.assert_array_equal(loaded["params"]["encoder"][f"norm_{i}"]["scale"], 1)
    # Those of a whole network are read.
    make_hugging_face("upernet").save_pretrained(tmp_path / "whole")
    loaded = pretrained.load_backbone(model, variables, tmp_path / "whole" / "model.safetensors")
    assert np.any(loaded["params"]["encoder"]["norm_0"]["scale"] != 1)


def test_weights_in_several_files_are_read_by_their_index(tmp_path, caplog):
    network = make_hugging_face("dinov2")
    network.save_pretrained(tmp_path / "one")
    network.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    parts = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(parts) > 1
    index = tmp_path / "several" / "model.safetensors.index.json"
    whole, joined = files.read(tmp_path / "one" / "model.safetensors"), files.read(index)
    assert sorted(whole) == sorted(joined)
    for name, value in whole.items():
        np.testing.assert_array_equal(joined[name], value)
    # An index chooses no file elsewhere, and says which part is missing.
    listed = json.loads(index.read_text())
    listed["weight_map"] = {"a": "../one/model.safetensors"}
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"several.model\.safetensors: no such file"):
        files.read(index)
