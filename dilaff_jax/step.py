"""What one device does in a step: state, losses, update. The only collectives of training.

Every loss is a sum over the *global* batch divided by the global count of what it sums: counts are
psummed before anything is divided, so uneven ignore masks weigh as they should.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dilaff_jax import affinity, losses, metrics
from dilaff_jax.errors import UserError
from dilaff_jax.losses import LossSum
from dilaff_jax.models import dispatch, frozen
from dilaff_jax.objective import SEGMENTATION_LOSSES, Objective
from dilaff_jax.runtime import parameter_names
from dilaff_jax.runtime.parallel import AXIS

Batch: TypeAlias = Mapping[str, jax.Array]

# What may be found not to be finite in a step, in the order in which one leads to the next.
SOURCES = (
    "image",
    "parameters",
    "segmentation",
    *SEGMENTATION_LOSSES,  # each, where they are a sum
    "auxiliary",
    "deep",
    "affinity",
    "boundaries",
    "aaf",
    "refined",
    "gradient",
)


def seed_of(config: ml_collections.ConfigDict) -> np.ndarray:
    """The key of `config.seed` as numbers, which every process can place on its devices."""
    return np.asarray(jax.random.key_data(jax.random.key(config.seed)))


class RunningMetrics(flax.struct.PyTreeNode):
    """Sums since the last report; part of the state, so that a resumed run reports the same.

    losses: {term: sum over steps of the finished loss}. confusion: int32 `[C, C]`, at the stride of
    the logits; 0 without a segmentation. norms: sums of the norms of gradient and update.
    """

    steps: jax.Array
    losses: dict[str, jax.Array]
    confusion: jax.Array
    norms: dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes.

    opt_state: of the parameters that are trained. average: the moving average of {params,
    batch_stats} where they change, or None. window: the running metrics, under the name that
    checkpoints have for them. fault: int32 `[2]`, the step whose numbers were not finite (-1: none)
    and bits of `SOURCES`; from then on nothing changes.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any
    window: RunningMetrics
    fault: jax.Array

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables to evaluate: the average where one is kept."""
        return parameter_names.averaged(self.params, self.batch_stats, self.average)


class TrainStep:
    """One training step as a pure per-device program over the axis `AXIS`.

    Args:
        config: the whole config.
        model: a `Segmenter` built with axis_name `AXIS`.
        num_classes: C.
        tx: the optimiser.
        spread: of how many devices' rows a batch is made (`Devices.spread`).

    Raises:
        UserError: as `Objective`.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: nn.Module,
        num_classes: int,
        tx: optax.GradientTransformation,
        spread: int = 1,
    ) -> None:
        self._config, self._model, self._num_classes, self._tx = config, model, num_classes, tx
        self._spread = spread
        self._objective = Objective(config, model, num_classes)

    def init(self, image_shape: tuple[int, ...], seed: jax.Array | np.ndarray) -> TrainState:
        """The state at step 0; `image_shape` is `[1, H, W, 3]`, `seed` from `seed_of`."""
        images = jnp.zeros(image_shape, jnp.uint8)
        key = jax.random.wrap_key_data(jnp.asarray(seed))
        variables = self._model.init(key, images, train=False)
        return self.start(variables["params"], variables.get("batch_stats", {}))

    def start(self, params: Any, batch_stats: Any) -> TrainState:
        """The state at step 0 with these variables."""

        def zeros(names: Iterable[str]) -> dict[str, jax.Array]:
            # One array each: the state's memory is given away, and none may be given twice.
            return {name: jnp.zeros((), jnp.float32) for name in names}

        parts = frozen.Frozen(params, self._config.optim.frozen)
        changing, _ = parts.split({"params": params, "batch_stats": batch_stats})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self._tx.init(changing["params"]),
            average=jax.tree.map(jnp.copy, changing) if self._config.optim.ema else None,
            window=RunningMetrics(
                steps=jnp.zeros((), jnp.int32),
                losses=zeros(("total", *self._objective.weights)),
                confusion=jnp.zeros((self._num_classes, self._num_classes), jnp.int32),
                norms=zeros(("gradient", "update")),
            ),
            fault=jnp.array([-1, 0], jnp.int32),
        )

    def __call__(self, state: TrainState, batch: Batch, seed: jax.Array) -> TrainState:
        """Takes this device's rows of the batch, returns the state that all devices share.

        batch: `image` `[b, H, W, 3]` in [0, 255], `label` `[b, H, W]`. seed: from `seed_of`, an
        argument, so that runs which differ in it share a compiled program.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(seed), state.step)
        parts = frozen.Frozen(state.params, self._config.optim.frozen)
        gradient, batch_stats, terms, confusion = self._gradient(state, parts, batch, key)
        changing, fixed = parts.split({"params": state.params, "batch_stats": batch_stats})
        # Written down, or each is made again wherever it is read, from parameters that then have to
        # be copied before they can be overwritten.
        updates, opt_state = dispatch.materialize(
            self._tx.update(gradient, state.opt_state, changing["params"])
        )
        changing["params"] = optax.apply_updates(changing["params"], updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(changing, average, 1 - self._config.optim.ema)
        norms = {"gradient": optax.tree.norm(gradient), "update": optax.tree.norm(updates)}
        new = state.replace(
            params=parameter_names.merge(changing["params"], fixed["params"]),
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
            window=self._observe(state, terms, confusion, norms),
        )
        bits = self._faults(state.params, batch, terms, norms["gradient"])
        healthy = (bits == 0) & (state.fault[0] < 0)
        # A step with numbers that are not finite leaves everything as it was, so what is saved is
        # sound even where the host learns of it only at its next look.
        kept = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, state)
        fault = jnp.where(state.fault[0] < 0, jnp.stack([state.step, bits]), state.fault)
        fault = jnp.where(healthy, state.fault, fault)
        return kept.replace(step=state.step + 1, fault=fault)

    def _gradient(
        self, state: TrainState, parts: frozen.Frozen, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, dict[str, jax.Array], jax.Array]:
        """Gradient of the global loss, new statistics, finished terms, confusion matrix."""
        microbatches = self._config.optim.accumulate
        if microbatches == 1:
            return self._microbatch(state, parts, state.batch_stats, batch, key, None)
        rows = batch["label"].shape[0] // self._spread
        if rows % microbatches:
            raise UserError(
                f"optim.accumulate is {microbatches}; a device's {rows} rows are not a multiple "
                "of it"
            )
        split = {k: self._split(v, microbatches) for k, v in batch.items()}
        counts = self._label_counts(state, split)

        def visit(carry: Any, xs: Any) -> tuple[Any, None]:
            sums, stats = carry
            index, rows = xs
            own_key = jax.random.fold_in(key, index)
            gradient, stats, terms, confusion = self._microbatch(
                state, parts, stats, rows, own_key, counts
            )
            return (jax.tree.map(jnp.add, sums, (gradient, terms, confusion)), stats), None

        zeros = (
            jax.tree.map(jnp.zeros_like, parts.split({"params": state.params})[0]["params"]),
            jax.tree.map(jnp.zeros_like, dict(state.window.losses)),
            jnp.zeros_like(state.window.confusion),
        )
        (sums, stats), _ = jax.lax.scan(
            visit, (zeros, state.batch_stats), (jnp.arange(microbatches), split)
        )
        gradient, terms, confusion = sums
        return gradient, stats, terms, confusion

    def _split(self, rows: jax.Array, microbatches: int) -> jax.Array:
        """`[b, ...]` to `[microbatches, b / microbatches, ...]`, each with rows of all devices."""
        shape = rows.shape[1:]
        split = rows.reshape(self._spread, microbatches, -1, *shape).swapaxes(0, 1)
        return split.reshape(microbatches, -1, *shape)

    def _microbatch(
        self,
        state: TrainState,
        parts: frozen.Frozen,
        batch_stats: Any,
        batch: Batch,
        key: jax.Array,
        counts: Any,
    ) -> tuple[Any, Any, dict[str, jax.Array], jax.Array]:
        changing, fixed = parts.split({"params": state.params})

        def share(params: Any) -> tuple[jax.Array, Any]:
            """This device's share of the global loss: its sums over everybody's counts."""
            with parts.in_evaluation():
                outputs, mutated = self._model.apply(
                    {
                        "params": parameter_names.merge(params, fixed["params"]),
                        "batch_stats": batch_stats,
                    },
                    batch["image"],
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": key},
                )
            terms = self._objective(outputs, batch["label"])
            local = {k: jax.lax.stop_gradient(v.count) for k, v in terms.items()}
            total = counts or jax.lax.psum(local, AXIS)
            shares = {k: losses.finish(LossSum(v.sum, total[k])) for k, v in terms.items()}
            shares["total"] = sum(
                (self._objective.weight(k, state.step) * v for k, v in shares.items()),
                jnp.zeros(()),
            )
            return shares["total"], (shares, mutated.get("batch_stats", {}), outputs["logits"])

        gradient, (shares, stats, logits) = jax.grad(share, has_aux=True)(changing["params"])
        confusion = jnp.zeros_like(state.window.confusion)
        if logits is not None:
            coarse = affinity.downsample_labels(batch["label"], logits.shape[1:-1])
            confusion = metrics.confusion(jnp.argmax(logits, -1), coarse, self._num_classes)
        gradient, shares, confusion = jax.lax.psum((gradient, shares, confusion), AXIS)
        return gradient, stats, shares, confusion

    def _label_counts(self, state: TrainState, split: Batch) -> dict[str, jax.Array]:
        """The counts of the whole batch, all microbatches and devices, from the labels alone."""
        shapes = jax.eval_shape(
            lambda s, x: self._model.apply(
                {"params": s.params, "batch_stats": s.batch_stats}, x, train=False
            ),
            state,
            jax.ShapeDtypeStruct(split["image"].shape[1:], split["image"].dtype),
        )
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def count(labels: jax.Array) -> dict[str, jax.Array]:
            return {k: v.count for k, v in self._objective(blank, labels).items()}

        local = jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(count, split["label"]))
        return jax.lax.psum(local, AXIS)

    def _observe(
        self,
        state: TrainState,
        terms: dict[str, jax.Array],
        confusion: jax.Array,
        norms: dict[str, jax.Array],
    ) -> RunningMetrics:
        # The window begins anew on the step after a report, which comes every log_every steps.
        begin = state.step % self._config.log_every == 0
        old = jax.tree.map(lambda x: jnp.where(begin, jnp.zeros_like(x), x), state.window)
        seen = RunningMetrics(jnp.ones((), jnp.int32), terms, confusion, norms)
        return jax.tree.map(jnp.add, old, seen)

    def _faults(
        self, params: Any, batch: Batch, terms: dict[str, jax.Array], gradient: jax.Array
    ) -> jax.Array:
        """Bits of `SOURCES` that are not finite, int32."""
        sound = {name: jnp.isfinite(value) for name, value in terms.items() if name != "total"}
        sound["gradient"] = jnp.isfinite(gradient)
        sound["parameters"] = jnp.isfinite(optax.tree.norm(params))
        if jnp.issubdtype(batch["image"].dtype, jnp.floating):
            bad = jnp.sum(~jnp.isfinite(batch["image"]))
            sound["image"] = jax.lax.psum(bad, AXIS) == 0
        bits = [jnp.where(ok, 0, 1 << SOURCES.index(name)) for name, ok in sound.items()]
        return sum(bits[1:], bits[0]).astype(jnp.int32)


def fault_message(fault: np.ndarray) -> str | None:
    """Says in which step what was not finite, from `TrainState.fault`; None if all was."""
    step, bits = (int(x) for x in fault)
    if step < 0:
        return None
    sources = [name for i, name in enumerate(SOURCES) if bits >> i & 1]
    return (
        f"step {step + 1}: NaN or infinity, first in: {sources[0]} (in all: {', '.join(sources)}). "
        "The state before that step was kept. Lower optim.learning_rate, set optim.clip_norm, or "
        "look at the batch of that step"
    )
