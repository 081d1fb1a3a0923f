"""Refinement of class probabilities by propagation along dilated affinities.

Every operator maps `probs` `[B, *spatial, C]` to the same shape, in float32, in one, two or three
spatial dimensions, and is differentiable in all its arrays. Pixel i owns its K weights, one for
each neighbour i + o. The steps themselves are in `kernels`: `kernels.xla` for every platform,
`kernels.tpu` where a TPU keeps the maps on the chip over all steps.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Real

from dilaff_jax import gate, references, resize
from dilaff_jax.affinity import check_offsets, check_shapes, per_offset
from dilaff_jax.errors import UserError
from dilaff_jax.kernels import backends, xla
from dilaff_jax.kernels.backends import Backend
from dilaff_jax.kernels.xla import Offsets, Order, WalkOptions
from dilaff_jax.numerics import check_range, log_probs

Operator: TypeAlias = gate.Operator


def random_walk(
    probs: Real[ArrayLike, " B *spatial C"],
    affinity: Real[ArrayLike, " B *spatial K"],
    offsets: Int[np.ndarray, " K ndim"],
    *,
    steps: int = 3,
    sharpness: ArrayLike = 1.0,
    threshold: ArrayLike = 0.0,
    self_weight: ArrayLike = 1.0,
    restart: ArrayLike = 0.0,
    order: Order = "joint",
    backend: Backend = "auto",
) -> Float[Array, " B *spatial C"]:
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
        backend: "xla"; "pallas", the kernel for a TPU or GPU, which a CPU interprets (slowly, for
            tests); or "auto", the kernel where the order is "joint", and it takes the case and is
            the faster one (`kernels.backends.run`), else XLA. They agree to 1e-5, gradients too.

    Returns:
        float32 `[B, *spatial, C]`.

    Raises:
        UserError: shapes that do not match, a case that backend "pallas" does not take, or
            (outside `jit`) a value out of range or not finite.
    """
    probs, affinity = jnp.asarray(probs), jnp.asarray(affinity)
    static = check_shapes(probs, affinity, offsets, steps, "affinity")
    check_range("probs", probs, -np.inf, np.inf)
    check_range("affinity", affinity, 0, 1, "pass jax.nn.sigmoid(affinity_logits)")
    check_range("sharpness", sharpness, float(np.finfo(np.float32).tiny), np.inf)
    check_range("threshold", threshold, 0, 1)
    check_range("self_weight", self_weight, 0, np.inf)
    check_range("restart", restart, 0, 1)
    if order not in ("joint", "coarse_to_fine", "fine_to_coarse"):
        raise UserError(
            f"order is {order!r}; expected 'joint', 'coarse_to_fine' or 'fine_to_coarse'"
        )
    backends.check(backend)
    options = (_or_none(sharpness, 1), _or_none(threshold, 0), self_weight, _or_none(restart, 0))
    return _random_walk(probs, affinity, options, static, steps, order, backend)


def signed(
    probs: Real[ArrayLike, " B *spatial C"],
    affinity_logits: Real[ArrayLike, " B *spatial K"],
    offsets: Int[np.ndarray, " K ndim"],
    *,
    steps: int = 5,
    strength: ArrayLike = 0.1,
    bias: ArrayLike = 0.0,
    repulsion: ArrayLike = 1.0,
    backend: Backend = "auto",
) -> Float[Array, " B *spatial C"]:
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
        UserError: shapes that do not match, a case that backend "pallas" does not take, or
            (outside `jit`) a value out of range or not finite.
    """
    probs, affinity_logits = jnp.asarray(probs), jnp.asarray(affinity_logits)
    static = check_shapes(probs, affinity_logits, offsets, steps, "affinity_logits")
    check_range("probs", probs, 0, np.inf)
    check_range("affinity_logits", affinity_logits, -np.inf, np.inf)
    check_range("strength", strength, 0, np.inf)
    check_range("bias", bias, -np.inf, np.inf)
    check_range("repulsion", repulsion, 0, np.inf)
    backends.check(backend)
    biases = per_offset(bias, offsets)
    if _or_none(repulsion, 1) is not None:
        affinity_logits = xla.votes(affinity_logits, biases, repulsion)
        biases = jnp.zeros_like(biases)
    return _signed(probs, affinity_logits, strength, biases, static, steps, backend)


def operator(
    name: str, *, bias: ArrayLike = 0.0, keep: ArrayLike | None = None, **options: Any
) -> Operator:
    """Returns the refinement `f(probs, affinity_logits, offsets) -> probs` that a config names.

    Args:
        name: "identity"; "random_walk", on a = sigmoid(ℓ - b); "signed"; or "module:function",
            an operator of one's own with the signature of `signed`.
        bias: b, see `signed`; undoes the shift that class-balanced training gives the logits.
        keep: `[C]` in [0, 1], which pixels stay as they are, see `gate.Gated`; None for none.
        **options: the keyword arguments of the operator.

    Raises:
        UserError: no operator has this name, or it has no such option; `keep` cannot be.
    """
    refine = _named(name, bias, options)
    return refine if keep is None else gate.Gated(refine, keep)


def _named(name: str, bias: ArrayLike, options: Mapping[str, Any]) -> Operator:
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
    if not isinstance(name, str) or ":" not in name:
        raise UserError(
            f"operator is {name!r}; expected 'identity', 'random_walk', 'signed' or "
            "'module:function'"
        )
    return functools.partial(references.resolve(name, "refine.name"), bias=bias, **options)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(signed if name == "signed" else random_walk).parameters.values()
    known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "bias"]
    for option in options:
        if option not in known:
            raise UserError(
                f"operator {name!r} has no option {option!r}; allowed: "
                f"{', '.join(['bias', 'keep', *known])}"
            )


def refine_logits(
    logits: Real[ArrayLike, " B *any C"],
    affinity_logits: Real[ArrayLike, " B *grid K"],
    offsets: Int[np.ndarray, " K ndim"],
    size: Sequence[int],
    refine: Operator = signed,
    *,
    finite: bool = False,
) -> tuple[Int[Array, " B *size"], Float[Array, " B *size C"]]:
    """Refines at the affinity's stride; returns full-resolution labels and probabilities.

    With p the softmax of the logits on the affinity's grid and q = refine(p), the correction
    log q - log p is enlarged and added to the logits enlarged by themselves: detail that the logits
    have beyond the affinity's grid is kept, and where nothing is corrected the result is exactly
    the unrefined one. (If both share a grid this is softmax of the enlarged log q.) A gate
    (`operator`'s `keep`) leaves pixels of the result as the enlarged logits have them. Our choice.

    A logit of -inf says that a class is never there, see `resize.bilinear_logits`: its probability
    is 0 in the result, and no other class is touched.

    Args:
        logits: `[B, *any, C]`, of any stride; finite, or -inf.
        affinity_logits: `[B, *grid, K]`.
        offsets: `[K, ndim]`, in pixels of the affinity's grid.
        size: of the result, ndim integers.
        refine: an operator, from `operator` or a function with the signature of `signed`.
        finite: whether the logits are known to hold no -inf, as those of networks here do; then
            nobody looks.

    Returns:
        int32 labels `[B, *size]` and float32 probabilities `[B, *size, C]`.

    Raises:
        UserError: shapes that do not match, and what `refine` raises.
    """
    logits = jnp.asarray(logits)
    change = correction(logits, affinity_logits, offsets, refine, finite=finite)
    if len(size) != change.ndim - 2:
        raise UserError(
            f"size is {tuple(size)}, logits are {logits.shape}: offsets of {change.ndim - 2} "
            f"dimensions need [B, *spatial, C] and {change.ndim - 2} sizes"
        )
    scores = _resized(logits, size, finite)
    full = gate.corrected(scores, resize.bilinear(change, size), gate.limits(refine))
    return jnp.argmax(full, axis=-1).astype(jnp.int32), jax.nn.softmax(full)


def correction(
    logits: Real[ArrayLike, " B *any C"],
    affinity_logits: Real[ArrayLike, " B *grid K"],
    offsets: Int[np.ndarray, " K ndim"],
    refine: Operator = signed,
    cells: Sequence[int] | None = None,
    *,
    finite: bool = False,
) -> Float[Array, " B *part C"]:
    """What propagation changes, log q - log p on the affinity's grid; see `refine_logits`.

    Without the operator's gate, which is of the pixels of the result: see `gate.corrected`.

    Args:
        logits: `[B, *any, C]`, of any stride.
        affinity_logits: `[B, *grid, K]`.
        offsets: `[K, ndim]`, in pixels of the affinity's grid.
        refine: an operator.
        cells: how many cells of the grid belong to the image, from its first corner; what lies
            beyond is padding, which then takes no part. None for all.
        finite: see `refine_logits`.

    Returns:
        float32 `[B, *cells, C]`.

    Raises:
        UserError: shapes that do not match, and what `refine` raises.
    """
    logits, affinity_logits = jnp.asarray(logits), jnp.asarray(affinity_logits)
    ndim = check_offsets(offsets).shape[1]
    if logits.ndim != ndim + 2 or affinity_logits.ndim != ndim + 2:
        raise UserError(
            f"logits {logits.shape}, affinity_logits {affinity_logits.shape}: offsets of {ndim} "
            "dimensions need [B, *spatial, C] and [B, *spatial, K]"
        )
    scores = _resized(logits, affinity_logits.shape[1:-1], finite)
    if cells is not None:
        part = (slice(None), *map(slice, cells))
        scores, affinity_logits = scores[part], affinity_logits[part]
    before = jax.nn.softmax(scores)
    return log_probs(gate.ungated(refine)(before, affinity_logits, offsets)) - log_probs(before)


def _resized(logits: jax.Array, size: Sequence[int], finite: bool) -> jax.Array:
    """Logits at another size; -inf is looked for unless they are known to be finite."""
    if finite or logits.shape[1:-1] == tuple(size):
        return resize.bilinear(logits, size)
    return jax.lax.cond(
        jnp.isneginf(logits).any(),
        functools.partial(resize.bilinear_logits, size=tuple(size)),
        functools.partial(resize.bilinear, size=tuple(size)),
        logits,
    )


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
    def in_xla(probs: jax.Array, affinity: jax.Array, options: WalkOptions) -> jax.Array:
        walk = functools.partial(xla.random_walk, offsets=offsets, steps=steps, order=order)
        return _by_platform(walk, probs, affinity, options)

    if order != "joint":
        if backend == "pallas":
            raise UserError(f"backend 'pallas' takes order 'joint' only, not {order!r}")
        backend = "xla"
    arrays = (probs, affinity, options)
    return backends.run(backend, "random_walk", in_xla, arrays, (options,), offsets, steps)


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
    def in_xla(
        probs: jax.Array, affinity_logits: jax.Array, strength: ArrayLike, bias: jax.Array
    ) -> jax.Array:
        run = functools.partial(xla.signed, offsets=offsets, steps=steps)
        return _by_platform(run, probs, affinity_logits, strength, bias)

    arrays = (probs, affinity_logits, strength, bias)
    return backends.run(backend, "signed", in_xla, arrays, (strength,), offsets, steps)


def _by_platform(operator: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """An operator of `kernels.xla` in the form that suits the platform it is lowered for."""
    cpu, gpu = (functools.partial(operator, form=form) for form in ("lanes", "apart"))
    return jax.lax.platform_dependent(*arrays, cpu=cpu, cuda=gpu, rocm=gpu, default=operator)


def _or_none(option: ArrayLike, neutral: float) -> ArrayLike | None:
    """None for a number that changes nothing, so that its pass over the maps is not compiled in."""
    return None if isinstance(option, int | float) and option == neutral else option
