"""Results that a program for a CPU keeps in memory instead of computing them again."""

from typing import TypeVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint

T = TypeVar("T")


@jax.jit
def materialize(tree: T) -> T:
    """Returns `tree` as it is; its arrays are in memory before anything reads them.

    XLA's CPU backend repeats elementwise operations in all that read their result: a chain of
    residual blocks, for example, in every window that a convolution takes. It does so through
    `lax.optimization_barrier`, too, but not through a layout that is asked for. Differentiable. For
    training on a CPU only: `jax.export` refuses to write such a program. Our choice.
    """
    return jax.tree.map(_laid_out, tree)


def _laid_out(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
