"""One step of propagation on a GPU, as the programs of a kernel make it.

A program is of 128 threads and makes all classes of its tile. The border of a tile, as wide as the
neighbours are far, is copied with it into shared memory by the copy engine.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Offsets: TypeAlias = tuple[tuple[int, ...], ...]

# Threads of a program, and columns of its tile: a row is what the 32 threads of a warp read.
_THREADS = 128
_COLUMNS = 32
# Pixels of a thread, and weights that it keeps in registers, of which it has 255. With three pixels
# three programs run on a processor at a time; with four there are fewer, and they wait longer.
_PIXELS = 3
_WEIGHTS = 160
# Classes that are brought and summed between two barriers, and such groups that are under way: the
# first that fits into what boxes may take of a processor's shared memory, 227 KB.
_UNDER_WAY = ((2, 3), (2, 2), (1, 2))
_BOXES = 160 * 1024
# Bytes of it that the logits of a tile may take; more are written to the result and read again.
_LOGITS = 48 * 1024
# The copy engine brings boxes of at most so many on a side.
_BOX = 256
# Less than any logit.
_NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class Rule:
    """What tells one operator from another.

    prepare: affinities or their logits to what the kernel reads, before the first step.
    added: p⁰ to what is added to every sum; None for nothing.
    weigh(read, *numbers): K maps of a tile to the K weights, and perhaps the pixel's own.
    is_softmax: whether the sums are logits.
    """

    prepare: Callable[[jax.Array], jax.Array]
    added: Callable[[jax.Array], jax.Array] | None
    weigh: Callable[..., list[jax.Array]]
    is_softmax: bool


@dataclasses.dataclass(frozen=True)
class Tile:
    """The pixels of a program and what it reads around them, all (rows, columns).

    size: what it makes. reach: how far its neighbours are, rounded up so that boxes lie as the copy
    engine wants them. border: tiles of zeros around the map. group: classes brought at a time.
    stages: groups that are under way.
    """

    size: tuple[int, int]
    reach: tuple[int, int]
    border: tuple[int, int]
    group: int
    stages: int

    @classmethod
    def of(cls, offsets: Offsets) -> "Tile | str":
        """The tile for these neighbours, or why there is none."""
        offsets = in_the_plane(offsets)
        pixels = min(_PIXELS, _WEIGHTS // (len(offsets) + 1))
        if not pixels:
            return f"{len(offsets)} weights a pixel are more than {_WEIGHTS - 1} registers hold"
        size = (pixels * _THREADS // _COLUMNS, _COLUMNS)
        farthest = [max(abs(o[axis]) for o in offsets) for axis in (0, 1)]
        reach = (-(-farthest[0] // 4) * 4, -(-farthest[1] // 4) * 4)
        border = (-(-reach[0] // size[0]), -(-reach[1] // size[1]))
        for group, stages in _UNDER_WAY:
            tile = cls(size, reach, border, group, stages)
            if max(tile.box) <= _BOX and 4 * group * stages * math.prod(tile.box) <= _BOXES:
                return tile
        return f"neighbours at distance {max(farthest)} are too far for a tile"

    @property
    def box(self) -> tuple[int, int]:
        """What it reads of a class."""
        (rows, columns), (down, across) = self.size, self.reach
        return rows + 2 * down, columns + 2 * across


def in_the_plane(offsets: Offsets) -> tuple[tuple[int, int], ...]:
    """Offsets of one or two dimensions as (rows, columns)."""
    return tuple((0 if len(o) == 1 else o[0], o[-1]) for o in offsets)


def scratch(tile: Tile, rule: Rule, classes: int) -> list[Any]:
    """The shared memory of a program: boxes, their barriers, and the logits where they fit."""
    group = min(tile.group, classes)
    is_kept = rule.is_softmax and 4 * classes * math.prod(tile.size) <= _LOGITS
    return [
        plgpu.SMEM((tile.stages, group, *tile.box), jnp.float32),
        plgpu.Barrier(num_barriers=tile.stages),
        *([plgpu.SMEM((classes, *tile.size), jnp.float32)] if is_kept else []),
    ]


class Program:
    """What one program does: the classes of its tile; or zeros, where the tile is of the border.

    Args:
        refs: the arrays, the result, and what is shared by the program's threads.
        given: how many of the arrays are numbers and how many are added.
        tile: its pixels.
        rule: the operator.
        offsets: K tuples.
        interpret: whether no GPU runs it.
    """

    def __init__(
        self,
        refs: Any,
        given: tuple[int, int],
        tile: Tile,
        rule: Rule,
        offsets: tuple[tuple[int, int], ...],
        interpret: bool,
    ) -> None:
        self._weights, self._maps, *refs = refs
        numbers, added = given
        self._numbers, self._added = refs[:numbers], refs[numbers : numbers + added]
        self._out, self._boxes, self._arrived, *self._logits = refs[numbers + added :]
        self._tile, self._rule, self._offsets, self._interpret = tile, rule, offsets, interpret
        self._classes, self._group = self._maps.shape[1], self._boxes.shape[1]
        self._layout = plgpu.Layout.WG_STRIDED(tile.size, vec_size=1)
        self._image = jax.lax.axis_index("image")
        self._place = jax.lax.axis_index("row"), jax.lax.axis_index("column")
        self._corner = [at * size for at, size in zip(self._place, tile.size, strict=True)]
        self._here = [pl.ds(at, size) for at, size in zip(self._corner, tile.size, strict=True)]
        # Weights and what is added have no border.
        self._there = [
            pl.ds(at - border * size, size)
            for at, border, size in zip(self._corner, tile.border, tile.size, strict=True)
        ]

    def run(self) -> None:
        """Makes the tile."""
        tiles = [self._out.shape[2 + axis] // self._tile.size[axis] for axis in (0, 1)]
        is_of_the_map = functools.reduce(
            jnp.logical_and,
            [
                (at >= border) & (at < count - border)
                for at, border, count in zip(self._place, self._tile.border, tiles, strict=True)
            ],
        )
        pl.when(is_of_the_map)(self._make)
        pl.when(jnp.logical_not(is_of_the_map))(self._clear)

    def _clear(self) -> None:
        zeros = self._full(0.0)
        self._for_each_class(lambda c: self._write(c, zeros))

    def _make(self) -> None:
        tile, rule = self._tile, self._rule
        groups = pl.cdiv(self._classes, self._group)
        for g in range(min(tile.stages, groups)):
            self._fetch(g, g)
        read = [self._load(self._weights, self._image, k, *self._there) for k in self._neighbours]
        weights = rule.weigh(read, *self._numbers)

        def make(g: Any, most: Any) -> Any:
            slot = jax.lax.rem(g, tile.stages)
            plgpu.barrier_wait(self._arrived.at[slot])
            sums = [self._sum(self._first(g) + i, slot, i, weights) for i in range(self._group)]
            for i, sum_ in enumerate(sums):
                self._keep(self._first(g) + i, sum_)
            plgpu.commit_smem()  # no thread reads these boxes any more
            pl.when(g + tile.stages < groups)(lambda: self._fetch(g + tile.stages, slot))
            return functools.reduce(jnp.maximum, sums, most) if rule.is_softmax else None

        most = self._full(_NOTHING) if rule.is_softmax else None
        most = jax.lax.fori_loop(0, groups, make, most)
        if rule.is_softmax:
            self._normalise(most)

    def _normalise(self, most: jax.Array) -> None:
        """The softmax of the logits that were kept. A thread reads only what it wrote itself."""

        def exponential(c: Any, sum_: jax.Array) -> jax.Array:
            value = jnp.exp(self._recall(c) - most)
            self._keep(c, value)
            return sum_ + value

        scale = 1 / jax.lax.fori_loop(0, self._classes, exponential, self._full(0.0))
        self._for_each_class(lambda c: self._write(c, self._recall(c) * scale))

    @property
    def _neighbours(self) -> range:
        return range(len(self._offsets))

    def _first(self, g: Any) -> Any:
        """The first class of a group. The last begins early where it would not be full."""
        return jnp.minimum(g * self._group, self._classes - self._group)

    def _fetch(self, g: Any, slot: Any) -> None:
        """Asks the copy engine for the boxes of a group."""
        box = [
            pl.ds(at - reach, size)
            for at, reach, size in zip(self._corner, self._tile.reach, self._tile.box, strict=True)
        ]
        source = self._maps.at[self._image, pl.ds(self._first(g), self._group), *box]
        plgpu.copy_gmem_to_smem(source, self._boxes.at[slot], self._arrived.at[slot])

    def _sum(self, c: Any, slot: Any, member: int, weights: list[jax.Array]) -> jax.Array:
        """What is added, and the neighbours by their weights."""
        result = self._full(0.0)
        if self._added:
            result = self._load(self._added[0], self._image, c, *self._there)
        for weight, offset in zip(weights, [*self._offsets, (0, 0)], strict=False):
            window = [
                pl.ds(reach + o, size)
                for reach, o, size in zip(self._tile.reach, offset, self._tile.size, strict=True)
            ]
            result += weight * self._load(self._boxes, slot, member, *window)
        return result

    def _keep(self, c: Any, value: jax.Array) -> None:
        if self._logits:
            self._logits[0][c] = value
        else:
            self._write(c, value)

    def _recall(self, c: Any) -> jax.Array:
        if self._logits:
            return self._load(self._logits[0], c)
        return self._load(self._out, self._image, c, *self._here)

    def _write(self, c: Any, value: jax.Array) -> None:
        self._out[self._image, c, *self._here] = value

    def _for_each_class(self, body: Callable[[Any], None]) -> None:
        jax.lax.fori_loop(0, self._classes, lambda c, _: body(c), None)

    def _load(self, ref: Any, *index: Any) -> jax.Array:
        """A tile of an array, as the threads hold it."""
        if self._interpret:
            return ref[index]
        load: Any = plgpu.load
        if jax.__version_info__ < (0, 11):
            return load(ref, index, layout=self._layout)
        return load(ref.at[index], layout=self._layout)

    def _full(self, value: float) -> jax.Array:
        x = jnp.full(self._tile.size, value, jnp.float32)
        return x if self._interpret else plgpu.layout_cast(x, self._layout)
