"""Weight files of transformers in their authors' layout, renamed to Hugging Face's.

DINOv2 and DINOv3 (github.com/facebookresearch), SegFormer (github.com/NVlabs/SegFormer), ConvNeXt
(github.com/facebookresearch/ConvNeXt), and whole networks of mmsegmentation on the last two. A
layout is known by its names; a file in another one is left as it is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from dilaff_jax.interop.files import State

# Patterns and what takes their place; the first that fits a name is used.
Rules: TypeAlias = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def _counted_from_0(template: str) -> Callable[[re.Match[str]], str]:
    """Fills in the groups of a match, the first of which is a number counted from 1."""
    return lambda match: template.format(int(match[1]) - 1, *match.groups()[1:])


def _counted_from_1(template: str) -> Callable[[re.Match[str]], str]:
    return lambda match: template.format(int(match[1]) + 1)


_BLOCK = r"^blocks\.(?:\d+\.(?=\d))?(\d+)\."  # large models number chunks of blocks, too
_DINOV2: Rules = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (_BLOCK + r"attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (_BLOCK + r"attn\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
    (_BLOCK + r"ls(\d)\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (_BLOCK + r"mlp\.w12\.", r"encoder.layer.\1.mlp.weights_in."),
    (_BLOCK + r"mlp\.w3\.", r"encoder.layer.\1.mlp.weights_out."),
    (_BLOCK, r"encoder.layer.\1."),
    (r"^norm\.", "layernorm."),
)
_DINOV3: Rules = (
    (r"^storage_tokens$", "embeddings.register_tokens"),
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (_BLOCK + r"attn\.proj\.", r"layer.\1.attention.o_proj."),
    (_BLOCK + r"attn\.(q|k|v)[a-z]*\.", r"layer.\1.attention.\2_proj."),
    (_BLOCK + r"ls(\d)\.gamma$", r"layer.\1.layer_scale\2.lambda1"),
    (_BLOCK + r"mlp\.(?:fc1|w2)\.", r"layer.\1.mlp.up_proj."),
    (_BLOCK + r"mlp\.(?:fc2|w3)\.", r"layer.\1.mlp.down_proj."),
    (_BLOCK + r"mlp\.w1\.", r"layer.\1.mlp.gate_proj."),
    (_BLOCK, r"layer.\1."),
)
_MIT: Rules = (
    (r"^patch_embed(\d)\.proj\.", _counted_from_0("encoder.patch_embeddings.{}.proj.")),
    (r"^patch_embed(\d)\.norm\.", _counted_from_0("encoder.patch_embeddings.{}.layer_norm.")),
    (r"^norm(\d)\.", _counted_from_0("encoder.layer_norm.{}.")),
    (r"^block(\d)\.(\d+)\.norm(\d)\.", _counted_from_0("encoder.block.{}.{}.layer_norm_{}.")),
    (
        r"^block(\d)\.(\d+)\.attn\.(query|key|value|sr)\.",
        _counted_from_0("encoder.block.{}.{}.attention.self.{}."),
    ),
    (
        r"^block(\d)\.(\d+)\.attn\.norm\.",
        _counted_from_0("encoder.block.{}.{}.attention.self.layer_norm."),
    ),
    (
        r"^block(\d)\.(\d+)\.attn\.proj\.",
        _counted_from_0("encoder.block.{}.{}.attention.output.dense."),
    ),
    (r"^block(\d)\.(\d+)\.mlp\.fc(\d)\.", _counted_from_0("encoder.block.{}.{}.mlp.dense{}.")),
    (r"^block(\d)\.(\d+)\.", _counted_from_0("encoder.block.{}.{}.")),
)
_SEGFORMER_HEAD: Rules = (
    (r"^decode_head\.linear_c(\d)\.", _counted_from_0("decode_head.linear_c.{}.")),
    (r"^decode_head\.linear_fuse\.conv\.", "decode_head.linear_fuse."),
    (r"^decode_head\.linear_fuse\.bn\.", "decode_head.batch_norm."),
    (r"^decode_head\.linear_pred\.", "decode_head.classifier."),
)
_STAGE = r"^stages\.(\d)\.(\d+)\."
_CONVNEXT: Rules = (
    (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
    (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
    (r"^downsample_layers\.(\d)\.(\d)\.", r"encoder.stages.\1.downsampling_layer.\2."),
    (_STAGE + "gamma$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
    (_STAGE + r"norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (_STAGE + r"(?:depthwise_conv|dwconv)\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (_STAGE + r"(?:pointwise_conv|pwconv)(\d)\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
    (r"^norm(\d)\.", _counted_from_1("hidden_states_norms.stage{}.")),
    (r"^norm\.", "layernorm."),
)
_UPERNET_HEAD: Rules = (
    (r"^((?:decode|auxiliary)_head\..*)\.bn\.", r"\1.batch_norm."),
    (r"^((?:decode|auxiliary)_head)\.conv_seg\.", r"\1.classifier."),
)


def hugging_face(state: Mapping[str, np.ndarray]) -> State:
    """Returns the weights under Hugging Face's names, if they are in a layout listed above.

    Joined layers are cut: query, key and value of DINOv2 and DINOv3, key and value of SegFormer. Of
    DINOv3 the bias of keys, which is masked there, and the rotary periods, which are constants, are
    left out.
    """
    for mark, rename in (
        ("storage_tokens", _dinov3),
        ("pos_embed", _dinov2),
        ("patch_embed1.proj.weight", _segformer),
        ("downsample_layers.0.0.weight", _convnext),
    ):
        found = [name for name in state if name == mark or name.endswith(f".{mark}")]
        if len(found) == 1:
            return rename(state, found[0].removesuffix(mark))
    return dict(state)


def _dinov2(state: Mapping[str, np.ndarray], prefix: str) -> State:
    if f"{prefix}blocks.0.attn.qkv.weight" not in state and not any(
        name.startswith(f"{prefix}blocks.0.0.attn.qkv") for name in state
    ):
        return dict(state)  # a transformer, but none of theirs
    return _renamed(_cut(state, "attn.qkv", ("query", "key", "value")), prefix, prefix, _DINOV2)


def _dinov3(state: Mapping[str, np.ndarray], prefix: str) -> State:
    constants = (".attn.qkv.bias_mask", "rope_embed.periods")
    state = {k: v for k, v in state.items() if not k.endswith(constants)}
    cut = _cut(state, "attn.qkv", ("query", "key", "value"))
    cut = {k: v for k, v in cut.items() if not k.endswith("attn.key.bias")}
    return _renamed(cut, prefix, prefix, _DINOV3)


def _segformer(state: Mapping[str, np.ndarray], prefix: str) -> State:
    cut = _cut(state, "attn.kv", ("key", "value"))
    cut = {re.sub(r"\.attn\.q\.", ".attn.query.", name): value for name, value in cut.items()}
    # A network has "backbone." before its encoder, an encoder by itself nothing.
    return _renamed(cut, prefix, "segformer." if prefix else "", _MIT, _SEGFORMER_HEAD)


def _convnext(state: Mapping[str, np.ndarray], prefix: str) -> State:
    return _renamed(state, prefix, prefix, _CONVNEXT, _UPERNET_HEAD)


def _renamed(
    state: Mapping[str, np.ndarray], prefix: str, new_prefix: str, rules: Rules, others: Rules = ()
) -> State:
    """By `rules` what stands below the prefix, by `others` all else."""
    below = rules if prefix else (*rules, *others)
    return {
        new_prefix + _first(name.removeprefix(prefix), below)
        if name.startswith(prefix)
        else _first(name, others): value
        for name, value in state.items()
    }


def _first(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name, count=1)
        if count:
            return renamed
    return name


def _cut(state: Mapping[str, np.ndarray], joined: str, parts: Sequence[str]) -> State:
    """Cuts weight and bias of each layer named `joined` into layers with the last name changed."""
    result: State = {}
    stem = joined.rpartition(".")[0]
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(f".{joined}") and leaf in ("weight", "bias"):
            before = layer.removesuffix(joined)
            pieces = np.split(np.asarray(value), len(parts))
            result |= {
                f"{before}{stem}.{part}.{leaf}": piece
                for part, piece in zip(parts, pieces, strict=True)
            }
        else:
            result[name] = value
    return result
