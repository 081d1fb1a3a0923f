"""A convolution in three dimensions: XLA's own against a sum over slices, forward and backward.

    pip install -e '.[dev]' && JAX_PLATFORMS=cpu python -m benchmarks.volume_conv

The shapes are those of a U-Net on patches of 32 x 40 x 32 voxels. Both are interleaved; the ratio
is of medians. Writes results/volume_conv_PLATFORM.json.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from benchmarks import timing
from dilaff_jax.models import geometry
from dilaff_jax.models.cpu import volume_conv

# (batch, spatial, channels in, channels out)
SHAPES = (
    (4, (32, 40, 32), 1, 16),
    (4, (32, 40, 32), 16, 16),
    (4, (16, 20, 16), 32, 32),
    (4, (8, 10, 8), 64, 64),
)
_OURS, _XLA = "slices", "xla"


def _contender(
    conv: Callable[..., jax.Array], x: np.ndarray, kernel: np.ndarray
) -> Callable[[], Any]:
    pads = ((1, 1),) * 3

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(conv(x, kernel, (1, 1, 1), pads, rhs_dilation=(1, 1, 1)) ** 2)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    on_device = jax.device_put(x), jax.device_put(kernel)
    return lambda: jax.block_until_ready(step(*on_device))


def main() -> None:
    """Measures, prints the table, writes the file."""
    rng, rows = np.random.default_rng(0), {}
    library = geometry.called_by_flax(functools.partial(geometry.native, depthwise=False))
    for batch, spatial, inner, outer in SHAPES:
        x = rng.normal(size=(batch, *spatial, inner)).astype(np.float32)
        kernel = rng.normal(size=(3, 3, 3, inner, outer)).astype(np.float32)
        contenders = {
            _OURS: _contender(volume_conv.conv, x, kernel),
            _XLA: _contender(library, x, kernel),
        }
        medians = timing.median(timing.interleaved(contenders))
        name = f"{batch}x{'x'.join(map(str, spatial))}, {inner} to {outer}"
        rows[name] = medians | {"ratio": medians[_XLA] / medians[_OURS]}
    table = rich.table.Table(title="forward and backward", title_justify="left")
    for column in ("", "slices, ms", "XLA, ms", "XLA / slices"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        numbers = (f"{1e3 * row[_OURS]:.1f}", f"{1e3 * row[_XLA]:.1f}", f"{row['ratio']:.1f}")
        table.add_row(name, *numbers)
    rich.console.Console().print(table)
    content = {"provenance": timing.provenance(), "seconds": rows}
    print(f"written: {timing.write(f'volume_conv_{jax.default_backend()}', content)}")


if __name__ == "__main__":
    main()
