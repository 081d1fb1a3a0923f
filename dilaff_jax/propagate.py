"""Refinement of class probabilities by propagation along dilated affinities.

Every operator maps `probs` `[B, *spatial, C]` to the same shape, in float32, in one, two or three
spatial dimensions, and is differentiable in all its arrays. Pixel i owns its K weights, one for
each neighbour i + o. How the steps are summed was chosen by measurement
(benchmarks/propagation.py): on a CPU, static slices of an array padded once a step, channels
last, fuse into one loop; shifts written as pads of their own, or dynamic slices, do not. On a TPU a
kernel keeps the maps on the chip over all steps (kernels/propagation.py); elsewhere XLA is used.
"""

import functools
import importlib
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dilaff_jax import affinity as affinity_lib
from dilaff_jax import resize
from dilaff_jax.kernels import backends
from dilaff_jax.kernels.backends import Backend

Order: TypeAlias = Literal["joint", "coarse_to_fine", "fine_to_coarse"]
Offsets: TypeAlias = tuple[tuple[int, ...], ...]
Operator: TypeAlias = Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]

# Sharpness, threshold, self_weight, restart; None where it changes nothing.
WalkOptions: TypeAlias = tuple[ArrayLike | None, ArrayLike | None, ArrayLike, ArrayLike | None]

# Below this a probability is nothing but rounding; its logarithm must stay finite.
_TINY = 1e-30
# Numbers that one register of a CPU holds (AVX2; half of one with AVX-512).
_LANES = 8


def random_walk(
    probs: ArrayLike,
    affinity: ArrayLike,
    offsets: np.ndarray,
    *,
    steps: int = 3,
    sharpness: ArrayLike = 1.0,
    threshold: ArrayLike = 0.0,
    self_weight: ArrayLike = 1.0,
    restart: ArrayLike = 0.0,
    order: Order = "joint",
    backend: Backend = "auto",
) -> jax.Array:
    """Walks on the affinities: p ← (1-r)·P·p + r·p⁰, `steps` times.

    (P·p)[i] = (κ·p[i] + Σ_o w[i,o]·p[i+o]) / (κ + Σ_o w[i,o]), with
    w[i,o] = a^β·1[a > τ] where i+o is inside the image, else 0. P is row-stochastic, so the simplex
    is kept, a constant map is a fixed point, and a = 0 is the identity. (A pixel with κ = 0 and no
    open edge keeps its value.) The formula is our choice, after the random walk of AffinityNet
    (Ahn and Kwak 2018, https://arxiv.org/abs/1803.10464).

    Args:
        probs: `[B, *spatial, C]`, any finite values; class probabilities in use.
        affinity: a, `[B, *spatial, K]`, in [0, 1].
        offsets: `[K, ndim]`, from `affinity.offsets`.
        steps: T ≥ 0. More than about five over-smooth.
        sharpness: β > 0.
        threshold: τ in [0, 1); an edge not above it is closed.
        self_weight: κ ≥ 0.
        restart: r in [0, 1].
        order: "joint" sums all dilations in one step; "coarse_to_fine" and "fine_to_coarse" make a
            step a sweep over the dilations, each with a P of its own, largest or smallest first.
        backend: "xla"; "pallas", the TPU's kernel, which other platforms interpret (slowly, for
            tests); or "auto", the kernel on a TPU where the order is "joint" and
            `kernels.bands.plan` takes the case, else XLA. They agree to 1e-5, gradients too.

    Returns:
        float32 `[B, *spatial, C]`.

    Raises:
        ValueError: shapes that do not match, a case that backend "pallas" does not take, or
            (outside `jit`) a value out of range or not finite.
    """
    probs, affinity = jnp.asarray(probs), jnp.asarray(affinity)
    static = _check_shapes(probs, affinity, offsets, steps, "affinity")
    _check_values("probs", probs, -np.inf, np.inf)
    _check_values("affinity", affinity, 0, 1, "pass jax.nn.sigmoid(affinity_logits)")
    _check_values("sharpness", sharpness, float(np.finfo(np.float32).tiny), np.inf)
    _check_values("threshold", threshold, 0, 1)
    _check_values("self_weight", self_weight, 0, np.inf)
    _check_values("restart", restart, 0, 1)
    if order not in ("joint", "coarse_to_fine", "fine_to_coarse"):
        raise ValueError(
            f"order is {order!r}; expected 'joint', 'coarse_to_fine' or 'fine_to_coarse'"
        )
    backends.check(backend)
    options = (_or_none(sharpness, 1), _or_none(threshold, 0), self_weight, _or_none(restart, 0))
    return _random_walk(probs, affinity, options, static, steps, order, backend)


def signed(
    probs: ArrayLike,
    affinity_logits: ArrayLike,
    offsets: np.ndarray,
    *,
    steps: int = 5,
    strength: ArrayLike = 0.1,
    bias: ArrayLike = 0.0,
    repulsion: ArrayLike = 1.0,
    backend: Backend = "auto",
) -> jax.Array:
    """Lets neighbours vote for and against: q ← softmax(log p⁰ + λ·Σ_o s(ℓ[i,o] - b)·q[i+o]).

    The sum runs over the offsets with i+o inside the image; ℓ = logit(a); s(x) = x for x ≥ 0, else
    ρ·x. A pair that is likelier of two classes than of one (ℓ < b) pushes its ends apart, which a
    walk cannot express. Such a vote says which class a pixel has not, and the runner-up wins: where
    the head is unsure inside an object that it does not know, ρ < 1 keeps the object. Starts at
    q = p⁰. Mean-field inference with a Potts term whose weight may be negative; our choice, after
    Krähenbühl and Koltun 2011 (https://arxiv.org/abs/1210.5644).

    Args:
        probs: p⁰, `[B, *spatial, C]`, ≥ 0.
        affinity_logits: ℓ, `[B, *spatial, K]`, finite.
        offsets: `[K, ndim]`, from `affinity.offsets`.
        steps: T ≥ 0.
        strength: λ ≥ 0.
        bias: b, the logit at which an edge carries no evidence: a scalar, one a dilation `[D]` (in
            the order in which `offsets` has them), or one an offset `[K]`.
        repulsion: ρ ≥ 0, the weight of votes against; 0 for none.
        backend: see `random_walk`.

    Returns:
        float32 `[B, *spatial, C]`, on the simplex.

    Raises:
        ValueError: shapes that do not match, a case that backend "pallas" does not take, or
            (outside `jit`) a value out of range or not finite.
    """
    probs, affinity_logits = jnp.asarray(probs), jnp.asarray(affinity_logits)
    static = _check_shapes(probs, affinity_logits, offsets, steps, "affinity_logits")
    _check_values("probs", probs, 0, np.inf)
    _check_values("affinity_logits", affinity_logits, -np.inf, np.inf)
    _check_values("strength", strength, 0, np.inf)
    _check_values("bias", bias, -np.inf, np.inf)
    _check_values("repulsion", repulsion, 0, np.inf)
    backends.check(backend)
    biases = per_offset(bias, offsets)
    if _or_none(repulsion, 1) is not None:
        affinity_logits = _tempered(affinity_logits, biases, repulsion)
        biases = jnp.zeros_like(biases)
    return _signed(probs, affinity_logits, strength, biases, static, steps, backend)


def log_probs(probs: jax.Array) -> jax.Array:
    """Log max(p, 1e-30): the logarithm of probabilities, finite also where one is zero."""
    return jnp.log(jnp.maximum(probs, _TINY))


def per_offset(bias: ArrayLike, offsets: np.ndarray) -> jax.Array:
    """Spreads a scalar, one value a dilation `[D]`, or one an offset `[K]`, to `[K]`.

    Raises:
        ValueError: `bias` has another shape.
    """
    bias = jnp.asarray(bias, jnp.float32)
    dilation = affinity_lib.dilation_of(offsets)
    _, first = np.unique(dilation, return_index=True)
    present = list(dilation[np.sort(first)])
    if bias.shape in ((), dilation.shape):
        return jnp.broadcast_to(bias, dilation.shape)
    if bias.shape != (len(present),):
        raise ValueError(
            f"bias has shape {bias.shape}; expected a scalar, [{len(present)}] (one a dilation) or "
            f"[{len(dilation)}] (one an offset)"
        )
    return bias[np.array([present.index(d) for d in dilation])]


def operator(name: str, *, bias: ArrayLike = 0.0, **options: Any) -> Operator:
    """Returns the refinement `f(probs, affinity_logits, offsets) -> probs` that a config names.

    Args:
        name: "identity"; "random_walk", on a = sigmoid(ℓ - b); "signed"; or "module:function",
            an operator of one's own with the signature of `signed`.
        bias: b, see `signed`; undoes the shift that class-balanced training gives the logits.
        **options: the keyword arguments of the operator.

    Raises:
        ValueError: no operator has this name, or it has no such option.
    """
    if name == "identity":
        return lambda probs, affinity_logits, offsets: jnp.asarray(probs, jnp.float32)
    if name in ("random_walk", "signed"):
        _check_options(name, options)
    if name == "random_walk":
        return lambda probs, affinity_logits, offsets: random_walk(
            probs, jax.nn.sigmoid(affinity_logits - per_offset(bias, offsets)), offsets, **options
        )
    if name == "signed":
        return functools.partial(signed, bias=bias, **options)
    module, _, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not function:
        raise ValueError(
            f"operator is {name!r}; expected 'identity', 'random_walk', 'signed' or "
            "'module:function'"
        )
    return functools.partial(
        getattr(importlib.import_module(module), function), bias=bias, **options
    )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(signed if name == "signed" else random_walk).parameters.values()
    known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "bias"]
    for option in options:
        if option not in known:
            raise ValueError(
                f"operator {name!r} has no option {option!r}; allowed: "
                f"{', '.join(['bias', *known])}"
            )


def refine_logits(
    logits: ArrayLike,
    affinity_logits: ArrayLike,
    offsets: np.ndarray,
    size: Sequence[int],
    refine: Operator = signed,
) -> tuple[jax.Array, jax.Array]:
    """Refines at the affinity's stride; returns full-resolution labels and probabilities.

    With p the softmax of the logits on the affinity's grid and q = refine(p), the correction
    log q - log p is enlarged and added to the logits enlarged by themselves: detail that the logits
    have beyond the affinity's grid is kept, and where nothing is corrected the result is exactly
    the unrefined one. (If both share a grid this is softmax of the enlarged log q.) Our choice.

    Args:
        logits: `[B, *any, C]`, of any stride.
        affinity_logits: `[B, *grid, K]`.
        offsets: `[K, ndim]`, in pixels of the affinity's grid.
        size: of the result, ndim integers.
        refine: an operator, from `operator` or a function with the signature of `signed`.

    Returns:
        int32 labels `[B, *size]` and float32 probabilities `[B, *size, C]`.

    Raises:
        ValueError: shapes that do not match, and what `refine` raises.
    """
    logits = jnp.asarray(logits)
    change = correction(logits, affinity_logits, offsets, refine)
    if len(size) != change.ndim - 2:
        raise ValueError(
            f"size is {tuple(size)}, logits are {logits.shape}: offsets of {change.ndim - 2} "
            f"dimensions need [B, *spatial, C] and {change.ndim - 2} sizes"
        )
    full = resize.bilinear(logits, size) + resize.bilinear(change, size)
    return jnp.argmax(full, axis=-1).astype(jnp.int32), jax.nn.softmax(full)


def correction(
    logits: ArrayLike,
    affinity_logits: ArrayLike,
    offsets: np.ndarray,
    refine: Operator = signed,
    cells: Sequence[int] | None = None,
) -> jax.Array:
    """What propagation changes, log q - log p on the affinity's grid; see `refine_logits`.

    Args:
        logits: `[B, *any, C]`, of any stride.
        affinity_logits: `[B, *grid, K]`.
        offsets: `[K, ndim]`, in pixels of the affinity's grid.
        refine: an operator.
        cells: how many cells of the grid belong to the image, from its first corner; what lies
            beyond is padding, which then takes no part. None for all.

    Returns:
        float32 `[B, *cells, C]`.

    Raises:
        ValueError: shapes that do not match, and what `refine` raises.
    """
    logits, affinity_logits = jnp.asarray(logits), jnp.asarray(affinity_logits)
    ndim = affinity_lib.check_offsets(offsets).shape[1]
    if logits.ndim != ndim + 2 or affinity_logits.ndim != ndim + 2:
        raise ValueError(
            f"logits {logits.shape}, affinity_logits {affinity_logits.shape}: offsets of {ndim} "
            "dimensions need [B, *spatial, C] and [B, *spatial, K]"
        )
    scores = resize.bilinear(logits, affinity_logits.shape[1:-1])
    if cells is not None:
        part = (slice(None), *map(slice, cells))
        scores, affinity_logits = scores[part], affinity_logits[part]
    before = jax.nn.softmax(scores)
    return log_probs(refine(before, affinity_logits, offsets)) - log_probs(before)


@functools.partial(jax.jit, static_argnames=("offsets", "steps", "order", "backend"))
def _random_walk(
    probs: jax.Array,
    affinity: jax.Array,
    options: WalkOptions,
    offsets: Offsets,
    steps: int,
    order: Order,
    backend: Backend = "auto",
) -> jax.Array:
    def xla(probs: jax.Array, affinity: jax.Array, options: WalkOptions) -> jax.Array:
        walk = functools.partial(_xla_random_walk, offsets=offsets, steps=steps, order=order)
        cpu = functools.partial(walk, on_cpu=True)
        return jax.lax.platform_dependent(probs, affinity, options, cpu=cpu, default=walk)

    if order != "joint":
        if backend == "pallas":
            raise ValueError(f"backend 'pallas' takes order 'joint' only, not {order!r}")
        backend = "xla"
    arrays = (probs, affinity, options)
    return backends.run(backend, "random_walk", xla, arrays, (options,), offsets, steps)


@functools.partial(jax.jit, static_argnames=("offsets", "steps", "backend"))
def _signed(
    probs: jax.Array,
    affinity_logits: jax.Array,
    strength: ArrayLike,
    bias: jax.Array,
    offsets: Offsets,
    steps: int,
    backend: Backend = "auto",
) -> jax.Array:
    def xla(
        probs: jax.Array, affinity_logits: jax.Array, strength: ArrayLike, bias: jax.Array
    ) -> jax.Array:
        run = functools.partial(_xla_signed, offsets=offsets, steps=steps)
        cpu = functools.partial(run, on_cpu=True)
        given = (probs, affinity_logits, strength, bias)
        return jax.lax.platform_dependent(*given, cpu=cpu, default=run)

    arrays = (probs, affinity_logits, strength, bias)
    return backends.run(backend, "signed", xla, arrays, (strength,), offsets, steps)


def _xla_random_walk(
    probs: jax.Array,
    affinity: jax.Array,
    options: WalkOptions,
    offsets: Offsets,
    steps: int,
    order: Order,
    on_cpu: bool = False,
) -> jax.Array:
    """The walk in XLA, on every platform and in any number of dimensions."""
    sharpness, threshold, self_weight, restart = options
    start = _widen(probs.astype(jnp.float32), on_cpu)
    weights = affinity.astype(jnp.float32)
    if sharpness is not None or threshold is not None:
        weights = _gate(
            weights,
            1 if sharpness is None else sharpness,
            0 if threshold is None else threshold,
        )
    if order == "joint":
        advance = _joint(weights, self_weight, offsets, on_cpu)
    else:
        advance = _sweep(weights, self_weight, offsets, order)

    # A step's 2·K intermediate maps are computed again in the backward pass, not kept.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(p: jax.Array, _: None) -> tuple[jax.Array, None]:
        walked = advance(p)
        if restart is not None:
            walked = jnp.asarray((1 - restart) * walked + restart * start)
        return walked, None

    return jax.lax.scan(step, start, length=steps)[0][..., : probs.shape[-1]]


def _xla_signed(
    probs: jax.Array,
    affinity_logits: jax.Array,
    strength: ArrayLike,
    bias: jax.Array,
    offsets: Offsets,
    steps: int,
    on_cpu: bool = False,
) -> jax.Array:
    """The signed operator in XLA, on every platform and in any number of dimensions."""
    unary = _widen(log_probs(probs.astype(jnp.float32)), on_cpu, -jnp.inf)
    start = _widen(probs.astype(jnp.float32), on_cpu)
    # Neighbours outside read the zeros that pad q, so they need no mask of their own.
    votes = jnp.asarray(strength * (affinity_logits.astype(jnp.float32) - bias))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(q: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.softmax(unary + _weighted_sum(q, votes, offsets)), None

    return jax.lax.scan(step, start, length=steps)[0][..., : probs.shape[-1]]


@jax.jit
def _tempered(affinity_logits: jax.Array, bias: jax.Array, repulsion: ArrayLike) -> jax.Array:
    """The votes s(ℓ - b), see `signed`."""
    votes = affinity_logits.astype(jnp.float32) - bias
    return jnp.where(votes < 0, repulsion * votes, votes)


def _or_none(option: ArrayLike, neutral: float) -> ArrayLike | None:
    """None for a number that changes nothing, so that its pass over the maps is not compiled in."""
    return None if isinstance(option, int | float) and option == neutral else option


def _gate(affinity: jax.Array, sharpness: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """a^β·1[a > τ]. exp(β·log a), because XLA vectorises it where it calls a library for `pow`."""
    is_open = affinity > threshold
    # log 0 is kept out of the branch not taken too: its gradient would be 0·∞.
    return jnp.where(is_open, jnp.exp(sharpness * jnp.log(jnp.where(is_open, affinity, 1))), 0)


def _widen(x: jax.Array, on_cpu: bool, fill: float = 0.0) -> jax.Array:
    """Fills up the classes to a multiple of 8 on a CPU, whose registers hold so many.

    Of 21 classes the last five would be done one by one.
    """
    classes = x.shape[-1]
    if not on_cpu or classes < _LANES:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -classes % _LANES)], constant_values=fill)


def _inside_sum(weights: jax.Array, offsets: Offsets, on_cpu: bool) -> jax.Array:
    """Σ_o weights[i,o] over the neighbours inside the image, `[B, *spatial, 1]`."""
    spatial = weights.shape[1:-1]
    inside = affinity_lib.inside(spatial, np.array(offsets))
    if not on_cpu or not all(isinstance(n, int) for n in spatial):
        return jnp.sum(weights * inside, axis=-1, keepdims=True)
    # Where i+o is inside is asked along the border only: everywhere, XLA asks it number by number.
    total = weights.sum(axis=-1, keepdims=True)
    for axis, n in enumerate(spatial):
        reach = min(max(abs(o[axis]) for o in offsets), n)
        for first in (0, n - reach):
            border = (slice(None),) * axis + (slice(first, first + reach),)
            of_border = weights[:, *border] * inside[border]
            corner = [0] * total.ndim
            corner[1 + axis] = first
            total = jax.lax.dynamic_update_slice(
                total, of_border.sum(axis=-1, keepdims=True), corner
            )
    return total


def _normalise(total: jax.Array, self_weight: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """What to multiply the neighbours' weights by, given their sum, and the pixel's own share."""
    whole = jnp.asarray(self_weight + total)
    alone = whole == 0
    whole = jnp.where(alone, 1, whole)
    return 1 / whole, jnp.where(alone, 1, self_weight / whole)


def _weighted_sum(p: jax.Array, weights: jax.Array, offsets: Offsets) -> jax.Array:
    """Σ_o weights[i,o]·p[i+o], zero outside."""
    spatial = p.shape[1:-1]
    reach = [min(max(abs(o[a]) for o in offsets), n) for a, n in enumerate(spatial)]
    padded = jnp.pad(p, [(0, 0), *((r, r) for r in reach), (0, 0)])
    total = jnp.zeros_like(p)
    for k, offset in enumerate(offsets):
        if any(abs(o) >= n for o, n in zip(offset, spatial, strict=True)):
            continue  # longer than the image: no pixel has this neighbour
        window = tuple(
            slice(r + o, r + o + n) for r, o, n in zip(reach, offset, spatial, strict=True)
        )
        total = total + weights[..., k : k + 1] * padded[(slice(None), *window)]
    return total


def _joint(
    weights: jax.Array, self_weight: ArrayLike, offsets: Offsets, on_cpu: bool
) -> Callable[[jax.Array], jax.Array]:
    """One walk step over all offsets at once."""
    scale, own = _normalise(_inside_sum(weights, offsets, on_cpu), self_weight)
    # Neighbours outside read the zeros that pad p, so their weights need not be set to 0.
    return lambda p: own * p + scale * _weighted_sum(p, weights, offsets)


def _sweep(
    weights: jax.Array, self_weight: ArrayLike, offsets: Offsets, order: Order
) -> Callable[[jax.Array], jax.Array]:
    """One walk step for each dilation in turn, as a scan over the dilation-shifted maps."""
    weights = weights * affinity_lib.inside(weights.shape[1:-1], np.array(offsets))
    groups: dict[int, list[int]] = {}
    for k, offset in enumerate(offsets):
        groups.setdefault(max(map(abs, offset)), []).append(k)
    dilations = sorted(groups, reverse=order == "coarse_to_fine")
    directions = [[tuple(x // d for x in offsets[k]) for k in groups[d]] for d in dilations]
    if any(other != directions[0] for other in directions):
        raise ValueError(
            f"order {order!r} needs the same directions in the same order per dilation"
        )
    stacked = jnp.stack([weights[..., groups[d]] for d in dilations])
    scale, own = _normalise(stacked.sum(axis=-1, keepdims=True), self_weight)
    share = scale * stacked
    reach = max(dilations)

    def sub_step(
        p: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        dilation, share, own = xs
        padded = jnp.pad(p, [(0, 0), *[(reach, reach)] * (p.ndim - 2), (0, 0)])
        total = own * p
        for k, u in enumerate(directions[0]):
            corner: list[ArrayLike] = [0, *(reach + dilation * x for x in u), 0]
            total = total + share[..., k : k + 1] * jax.lax.dynamic_slice(padded, corner, p.shape)
        return total, None

    return lambda p: jax.lax.scan(sub_step, p, (jnp.array(dilations), share, own))[0]


def _check_shapes(
    probs: jax.Array, guide: jax.Array, offsets: np.ndarray, steps: int, name: str
) -> Offsets:
    """Returns the offsets as a hashable constant, or raises ValueError for what does not fit."""
    rows = affinity_lib.check_offsets(offsets)
    k, ndim = rows.shape
    if probs.ndim != ndim + 2:
        raise ValueError(
            f"probs has shape {probs.shape}; offsets of {ndim} dimensions need "
            f"{ndim + 2} axes [B, *spatial, C]"
        )
    if guide.shape != (*probs.shape[:-1], k):
        raise ValueError(
            f"{name} has shape {guide.shape}; expected {(*probs.shape[:-1], k)}: probs has shape "
            f"{probs.shape} and there are {k} offsets"
        )
    if not (isinstance(steps, numbers.Real) and steps >= 0 and steps % 1 == 0):
        raise ValueError(f"steps is {steps!r}; expected a whole number, zero or more")
    return tuple(tuple(int(x) for x in row) for row in rows)


def _check_values(name: str, x: ArrayLike, low: float, high: float, hint: str = "") -> None:
    """Raises ValueError unless all of `x` is finite and in [low, high]; silent under tracing."""
    if x is None or isinstance(x, str):
        raise ValueError(f"{name} is {x!r}; expected a number, or an array of them")
    if isinstance(x, jax.core.Tracer) or np.size(x) == 0:
        return
    if isinstance(x, jax.Array):
        with jax.ensure_compile_time_eval():  # a constant may be checked while others are traced
            smallest, largest = (float(v) for v in _range(x))
    else:
        smallest, largest = float(np.min(x)), float(np.max(x))
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        raise ValueError(f"{name} holds NaN or infinity; expected finite values")
    if smallest < low or largest > high:
        raise ValueError(
            f"{name} has values in [{smallest:g}, {largest:g}]; expected [{low:g}, {high:g}]"
            + (f": {hint}" if hint else "")
        )


@jax.jit
def _range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(x), jnp.max(x)
