"""Convolutions that were trained on red, green and blue, for images of other bands."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import numpy as np
from absl import logging

from dilaff_jax.interop import torch_layout
from dilaff_jax.interop.files import State

_COLOURS = 3


def adapted(model: nn.Module, variables: Mapping[str, Any], state: State) -> State:
    """The weights of a file with its first convolution for as many bands as the model takes.

    A kernel of three input channels in the file, of C in the model, and else of one shape is made
    by timm's rule, which keeps the size of what comes out: for one band the sum over the colours;
    for others red, green, blue, red, ... in turn, times 3/C
    (https://github.com/huggingface/pytorch-image-models, `adapt_input_conv`). For three nothing
    changes: they take the places of red, green and blue.

    Args:
        model: a Segmenter or Classifier.
        variables: of `model.init`; says which shapes are expected.
        state: torch names to arrays.
    """
    encoder: Any = model.encoder
    bands = len(encoder.mean)
    if bands == _COLOURS:
        return state
    flat = flax.traverse_util.flatten_dict(dict(variables))
    changed = {}
    for path, name in torch_layout.keys(model, variables).items():
        found, shape = state.get(name), flat[path].shape
        if found is None or len(shape) != 4 or shape[2] != bands or found.ndim != 4:
            continue
        if found.shape == (shape[3], _COLOURS, *shape[:2]):
            changed[name] = for_bands(found, bands)
            logging.info("%s is adapted from red, green and blue to %d bands", name, bands)
    return {**state, **changed}


def for_bands(kernel: np.ndarray, bands: int) -> np.ndarray:
    """A kernel `[O, 3, h, w]` for C bands, `[O, C, h, w]`; see `adapted`."""
    kernel = np.asarray(kernel, np.float32)
    if bands == 1:
        return kernel.sum(axis=1, keepdims=True)
    repeated = np.tile(kernel, (1, math.ceil(bands / _COLOURS), 1, 1))[:, :bands]
    return repeated * np.float32(_COLOURS / bands)
