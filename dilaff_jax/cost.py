"""Parameters, FLOPs and memory of a network, its affinity head and propagation, from XLA.

FLOPs are of the program as written, before a backend replaces parts of it by library calls that are
not counted; a multiply-add is two, taps that fall on padding are not counted. XLA counts the body
of a loop once, so propagation is counted as (no step) + steps · (one step - no step).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dilaff_jax.models import segmenter


def abstract_variables(model: segmenter.Segmenter) -> Any:
    """Shapes and dtypes of the variables."""
    small = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), small, train=False))


def parameters(variables: Any) -> int:
    """Number of trained parameters."""
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def gradient(model: segmenter.Segmenter) -> Callable[[Any, jax.Array], Any]:
    """The backward pass of a stand-in loss that reads all outputs."""

    def loss(params: Any, statistics: Any, images: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        dropout = {"dropout": jax.random.key(0)}
        out, state = model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=dropout
        )
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(out)), state

    return lambda variables, images: jax.grad(loss, has_aux=True)(
        variables["params"], variables["batch_stats"], images
    )


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Of the program before a backend changes it."""
    analysis: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return float(analysis["flops"])


def temporaries(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that the compiled program needs beside arguments and results."""
    analysis: Any = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes
