"""What a compiled program writes down instead of computing it again."""

from typing import TypeVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint

T = TypeVar("T")


@jax.jit
def written(tree: T) -> T:
    """Returns `tree` as it is; on a CPU its arrays are in memory before anything reads them.

    XLA's CPU backend repeats elementwise operations in all that read their result: a chain of
    residual blocks, for example, in every window that a convolution takes. It does so through
    `lax.optimization_barrier`, too, but not through a layout that is asked for. Accelerators fuse
    by what it costs and are left alone. Differentiable. For training only: `jax.export` refuses to
    write such a program. Our choice.
    """
    return jax.lax.platform_dependent(
        tree, cpu=lambda tree: jax.tree.map(_laid_out, tree), default=lambda tree: tree
    )


def _laid_out(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
