"""Weights whose BatchNorm was folded into convolution weight and bias, as deployed models come.

A folded convolution is `w*x + b`. Our convolutions have no bias, so b goes into the BatchNorm after
them, in one of two ways. *Exact*: scale 1, bias b, mean 0, variance 1 - ε: an identity that adds b.
Good for inference, and for training with `frozen_norm`. *Calibrated*: mean m and variance v are
those of `w*x` over some images, scale sqrt(v + ε), bias m + b: the same function, but one that
training with batch statistics starts from instead of destroying.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax.errors import UserError
from dilaff_jax.interop import torch_layout
from dilaff_jax.interop.files import State
from dilaff_jax.models import layers

Path = tuple[str, ...]


def unfold(
    model: nn.Module, variables: Mapping[str, Any], state: Mapping[str, np.ndarray]
) -> State:
    """Gives each folded convolution of `state` the BatchNorm (identity) that the model has.

    Args:
        model: the Segmenter or Classifier.
        variables: of `model.init`.
        state: torch names to arrays, with a `bias` beside the `weight` of each convolution.

    Returns:
        A state dict for `torch_layout.from_torch`.

    Raises:
        UserError: the model has no BatchNorm.
    """
    names = torch_layout.keys(model, variables)
    unfolded = dict(state)
    for path, norm in _norms(variables).items():
        bias = names["params", *path, "conv", "kernel"].removesuffix("weight") + "bias"
        if bias not in state:
            continue  # then its BatchNorm is missing, and from_torch says so
        value = np.asarray(unfolded.pop(bias), np.float32)
        unfolded[names["params", *norm, "scale"]] = np.ones_like(value)
        unfolded[names["params", *norm, "bias"]] = value
        unfolded[names["batch_stats", *norm, "mean"]] = np.zeros_like(value)
        unfolded[names["batch_stats", *norm, "var"]] = np.ones_like(value) - _epsilon(model, path)
    return unfolded


def calibrate(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, parts: tuple[str, ...]
) -> dict[str, Any]:
    """Gives every BatchNorm the statistics of `images`, changing scale and bias to undo it.

    With m, v the mean and variance of its input: mean m, variance v, scale γ·sqrt((v+ε)/(σ²+ε)),
    bias β + γ·(m-μ)/sqrt(σ²+ε). At inference the network computes what it did; with batch
    statistics of similar images, nearly so.

    Args:
        model: the Segmenter or Classifier.
        variables: with loaded weights.
        images: `[N, H, W, 3]`, RGB in [0, 255]; some dozens of the data to be trained on.
        parts: whose BatchNorms, such as ("encoder",).
    """
    statistics = jax.jit(lambda v, x: _input_statistics(model, v, x))(variables, images)
    flat = flax.traverse_util.flatten_dict(dict(variables))
    for norm, (mean, var) in statistics.items():
        if norm[0] not in parts:
            continue
        epsilon = _epsilon(model, norm)
        gain = flat["params", *norm, "scale"] / jnp.sqrt(
            flat["batch_stats", *norm, "var"] + epsilon
        )
        flat["params", *norm, "scale"] = gain * jnp.sqrt(var + epsilon)
        flat["params", *norm, "bias"] += gain * (mean - flat["batch_stats", *norm, "mean"])
        flat["batch_stats", *norm, "mean"] = mean
        flat["batch_stats", *norm, "var"] = var
    return flax.traverse_util.unflatten_dict(flat)


def mobile_deeplab_keys(state: Mapping[str, np.ndarray]) -> State:
    """Renames TensorFlow's mobile DeepLabv3 (folded) to the names of `deeplabv3` here.

    Its ASPP has two branches, joined as [image_pooling, aspp0]; ours come the other way round, so
    the input channels of the projection change places.
    """
    projection = state["concat_projection.weight"]
    half = projection.shape[1] // 2
    renamed = {
        "aspp0": "classifier.0.convs.0.0",
        "image_pooling": "classifier.0.convs.1.1",
        "concat_projection": "classifier.0.project.0",
        "logits": "classifier.4",
    }
    result = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        result[f"{renamed.get(module, f'backbone.{module}')}.{leaf}"] = value
    swapped = np.concatenate([projection[:, half:], projection[:, :half]], axis=1)
    return result | {"classifier.0.project.0.weight": swapped}


def _norms(variables: Mapping[str, Any]) -> dict[Path, Path]:
    """Path of each ConvNorm to that of its BatchNorm."""
    if "batch_stats" not in variables:
        raise UserError(
            "the model has no BatchNorm to unfold into; folded weights need norm='batch'"
        )
    flat = flax.traverse_util.flatten_dict(dict(variables["batch_stats"]))
    return {path[:-2]: path[:-1] for path in flat if path[-2:] == ("norm", "mean")}


def _epsilon(model: Any, path: Path) -> float:
    """The encoder states its own; a classifier's head shares it."""
    return model.encoder.epsilon if path[0] in ("encoder", "head") else layers.EPSILON


def _input_statistics(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> dict[Path, tuple[jax.Array, jax.Array]]:
    statistics: dict[Path, tuple[jax.Array, jax.Array]] = {}

    def record(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, layers.BATCH_NORMS):
            x = args[0].astype(jnp.float32)
            statistics[context.module.path] = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        return next_method(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, images, train=False)
    return statistics
