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

from dilaff_jax import affinity, losses, memory, metrics, propagate, resize
from dilaff_jax.parallel import AXIS

Batch: TypeAlias = Mapping[str, jax.Array]

SEGMENTATION_LOSSES = ("cross_entropy", "ohem", "focal", "loss_max_pooling")
AFFINITY_LOSSES = ("balanced", "bce", "focal", "ohem", "max_pooling")
# Mining chooses what it counts by the predictions, so no count is known before the forward pass.
MINING = ("ohem", "loss_max_pooling", "max_pooling")

# What may be found not to be finite in a step, in the order in which one leads to the next.
SOURCES = (
    "image",
    "parameters",
    "segmentation",
    "auxiliary",
    "affinity",
    "aaf",
    "refined",
    "gradient",
)


def default_config() -> ml_collections.ConfigDict:
    """Every key of `config.loss`.

    segmentation: one of `SEGMENTATION_LOSSES`, with segmentation_options (its keyword arguments,
    class_weights among them). auxiliary: weight of the auxiliary head's loss. affinity: λ, 0 for
    the plain baseline without affinity head. affinity_loss: one of `AFFINITY_LOSSES`, with
    affinity_options, and affinity_class_weights: W, one for each class, for
    `affinity.pair_weights`. soft_targets: area-pooled affinity targets instead of nearest labels.
    aaf: weight of the Adaptive Affinity Fields loss, a rival. refined: weight of the cross-entropy
    of the refined segmentation (training through the propagation).
    """
    return ml_collections.ConfigDict(
        {
            "segmentation": "cross_entropy",
            "segmentation_options": {},
            "auxiliary": 0.4,
            "affinity": 1.0,
            "affinity_loss": "balanced",
            "affinity_options": {},
            "affinity_class_weights": (),
            "soft_targets": False,
            "aaf": 0.0,
            "refined": 0.0,
        }
    )


def model_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config.model`, without affinity head where no loss would train it."""
    model = ml_collections.ConfigDict(config.model)
    if not config.loss.affinity and not config.loss.refined:
        model.affinity = None
    return model


class Window(flax.struct.PyTreeNode):
    """Sums since the last report; part of the state, so that a resumed run reports the same.

    losses: {term: sum over steps of the finished loss}. confusion: int32 `[C, C]`, at the stride of
    the logits. norms: sums of the norms of gradient and update.
    """

    steps: jax.Array
    losses: dict[str, jax.Array]
    confusion: jax.Array
    norms: dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes.

    average: the moving average of {params, batch_stats}, or None. fault: int32 `[2]`, the step
    whose numbers were not finite (-1: none) and bits of `SOURCES`; from then on nothing changes.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any
    window: Window
    fault: jax.Array

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables to evaluate: the average where one is kept."""
        if self.average is not None:
            return dict(self.average)
        return {"params": self.params, "batch_stats": self.batch_stats}


class Objective:
    """The losses of one config.

    Args:
        config: the whole config.
        model: a `Segmenter`.

    Attributes:
        weights: {term: weight} of the terms that this config has.

    Raises:
        ValueError: options of `config.loss` that are unknown or contradict each other.
    """

    def __init__(self, config: ml_collections.ConfigDict, model: nn.Module) -> None:
        self._config, self._offsets = config.loss, model.offsets
        self._refine = propagate.operator(**config.refine)
        weights = {
            "segmentation": 1.0,
            "auxiliary": config.loss.auxiliary if config.model.aux else 0.0,
            "affinity": config.loss.affinity,
            "aaf": config.loss.aaf,
            "refined": config.loss.refined,
        }
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self._check(config)

    def __call__(self, outputs: Mapping[str, Any], labels: jax.Array) -> dict[str, losses.Parts]:
        """Returns the parts of every term. labels: `[b, H, W]`, at full resolution."""
        logits = outputs["logits"]
        found = {"segmentation": self._segmentation(logits, labels)}
        if "auxiliary" in self.weights:
            found["auxiliary"] = losses.enlarged(
                losses.cross_entropy, outputs["aux_logits"], labels
            )
        if "affinity" in self.weights:
            found["affinity"] = self._affinity(outputs["affinity_logits"], labels, logits.shape[-1])
        if "aaf" in self.weights:
            coarse = affinity.downsample_labels(labels, logits.shape[1:3])
            found["aaf"] = losses.adaptive_affinity_fields(logits, coarse)
        if "refined" in self.weights:
            edges, size = outputs["affinity_logits"], labels.shape[1:3]
            _, probs = propagate.refine_logits(logits, edges, self._offsets, size, self._refine)
            # Cross-entropy of log p is that of p: softmax(log p) = p.
            found["refined"] = losses.cross_entropy(propagate.log_probs(probs), labels)
        return found

    def _segmentation(self, logits: jax.Array, labels: jax.Array) -> losses.Parts:
        name, options = self._config.segmentation, self._config.segmentation_options
        loss = getattr(losses, name)
        if name in MINING:
            return loss(resize.bilinear(logits, labels.shape[1:3]), labels, **options)
        return losses.enlarged(loss, logits, labels, **options)

    def _affinity(self, logits: jax.Array, labels: jax.Array, num_classes: int) -> losses.Parts:
        grid = logits.shape[1:3]
        coarse = affinity.downsample_labels(labels, grid)
        if self._config.soft_targets:
            target, valid = affinity.soft_targets(labels, self._offsets, grid, num_classes)
        else:
            target, valid = affinity.targets(coarse, self._offsets)
        dilations = len(np.unique(affinity.dilation_of(self._offsets)))
        loss = getattr(losses, f"affinity_{self._config.affinity_loss}")
        options = dict(self._config.affinity_options)
        weights = self._config.affinity_class_weights
        if weights:
            if len(weights) != num_classes:
                raise ValueError(
                    f"loss.affinity_class_weights has {len(weights)} numbers; expected one for "
                    f"each of {num_classes} classes, or () for none"
                )
            options["weights"] = affinity.pair_weights(coarse, self._offsets, weights)
        return loss(logits, target, valid, dilations, **options)

    def _check(self, config: ml_collections.ConfigDict) -> None:
        loss = config.loss
        for option, allowed in (
            ("segmentation", SEGMENTATION_LOSSES),
            ("affinity_loss", AFFINITY_LOSSES),
        ):
            if loss[option] not in allowed:
                raise ValueError(
                    f"loss.{option} is {loss[option]!r}; allowed: {', '.join(allowed)}"
                )
        negative = [name for name, weight in self.weights.items() if weight < 0]
        if negative:
            raise ValueError(f"loss.{negative[0]} is {loss[negative[0]]}; expected 0 or more")
        if self._offsets is None and {"affinity", "refined"} & self.weights.keys():
            raise ValueError(
                "loss.affinity and loss.refined need an affinity head: set model.affinity, {} for "
                "its defaults, or set both to 0 for the plain baseline"
            )
        if loss.affinity_class_weights and loss.affinity_loss in MINING:
            raise ValueError(
                f"loss.affinity_loss {loss.affinity_loss!r} mines its edges and takes no "
                "loss.affinity_class_weights; use 'balanced', 'bce' or 'focal', or set ()"
            )
        accumulate, used = config.optim.accumulate, (loss.segmentation, loss.affinity_loss)
        if accumulate > 1 and any(name in MINING for name in used):
            raise ValueError(
                f"optim.accumulate is {accumulate} and a loss of {used} mines by the predictions; "
                "its count is not known before all parts are seen: use accumulate=1"
            )


class TrainStep:
    """One training step as a pure per-device program over the axis `AXIS`.

    Args:
        config: the whole config.
        model: a `Segmenter` built with axis_name `AXIS`.
        num_classes: C.
        tx: the optimiser.

    Raises:
        ValueError: as `Objective`.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: nn.Module,
        num_classes: int,
        tx: optax.GradientTransformation,
    ) -> None:
        self._config, self._model, self._num_classes, self._tx = config, model, num_classes, tx
        self._objective = Objective(config, model)

    def init(self, image_shape: tuple[int, ...]) -> TrainState:
        """The state at step 0, from `config.seed`; `image_shape` is `[1, H, W, 3]`."""
        images = jnp.zeros(image_shape, jnp.uint8)
        variables = self._model.init(jax.random.key(self._config.seed), images, train=False)
        return self.start(variables["params"], variables.get("batch_stats", {}))

    def start(self, params: Any, batch_stats: Any) -> TrainState:
        """The state at step 0 with these variables."""

        def zeros(names: Iterable[str]) -> dict[str, jax.Array]:
            # One array each: the state's memory is given away, and none may be given twice.
            return {name: jnp.zeros((), jnp.float32) for name in names}

        kept = {"params": params, "batch_stats": batch_stats}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=self._tx.init(params),
            average=jax.tree.map(jnp.copy, kept) if self._config.optim.ema else None,
            window=Window(
                steps=jnp.zeros((), jnp.int32),
                losses=zeros(("total", *self._objective.weights)),
                confusion=jnp.zeros((self._num_classes, self._num_classes), jnp.int32),
                norms=zeros(("gradient", "update")),
            ),
            fault=jnp.array([-1, 0], jnp.int32),
        )

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        """Takes this device's rows of the batch, returns the state that all devices share.

        batch: `image` `[b, H, W, 3]` in [0, 255], `label` `[b, H, W]`.
        """
        key = jax.random.fold_in(jax.random.key(self._config.seed), state.step)
        gradient, batch_stats, found, confusion = self._gradient(state, batch, key)
        # Written down, or each is made again wherever it is read, from parameters that then have to
        # be copied before they can be overwritten.
        updates, opt_state = memory.written(
            self._tx.update(gradient, state.opt_state, state.params)
        )
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            fresh = {"params": params, "batch_stats": batch_stats}
            average = optax.incremental_update(fresh, average, 1 - self._config.optim.ema)
        norms = {"gradient": optax.tree.norm(gradient), "update": optax.tree.norm(updates)}
        new = state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            average=average,
            window=self._observe(state, found, confusion, norms),
        )
        bits = self._faults(state.params, batch, found, norms["gradient"])
        healthy = (bits == 0) & (state.fault[0] < 0)
        # A step with numbers that are not finite leaves everything as it was, so what is saved is
        # sound even where the host learns of it only at its next look.
        kept = jax.tree.map(lambda a, b: jnp.where(healthy, a, b), new, state)
        fault = jnp.where(state.fault[0] < 0, jnp.stack([state.step, bits]), state.fault)
        fault = jnp.where(healthy, state.fault, fault)
        return kept.replace(step=state.step + 1, fault=fault)

    def _gradient(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any, dict[str, jax.Array], jax.Array]:
        """Gradient of the global loss, new statistics, finished terms, confusion matrix."""
        parts = self._config.optim.accumulate
        if parts == 1:
            return self._one_part(state.params, state.batch_stats, batch, key, None)
        rows = batch["label"].shape[0]
        if rows % parts:
            raise ValueError(
                f"optim.accumulate is {parts}; a device's {rows} rows are not a multiple of it"
            )
        split = {k: v.reshape(parts, rows // parts, *v.shape[1:]) for k, v in batch.items()}
        counts = self._label_counts(state, split)

        def visit(carry: Any, xs: Any) -> tuple[Any, None]:
            sums, stats = carry
            index, part = xs
            part_key = jax.random.fold_in(key, index)
            gradient, stats, found, confusion = self._one_part(
                state.params, stats, part, part_key, counts
            )
            return (jax.tree.map(jnp.add, sums, (gradient, found, confusion)), stats), None

        zeros = (
            jax.tree.map(jnp.zeros_like, state.params),
            jax.tree.map(jnp.zeros_like, dict(state.window.losses)),
            jnp.zeros_like(state.window.confusion),
        )
        (sums, stats), _ = jax.lax.scan(
            visit, (zeros, state.batch_stats), (jnp.arange(parts), split)
        )
        gradient, found, confusion = sums
        return gradient, stats, found, confusion

    def _one_part(
        self, params: Any, batch_stats: Any, batch: Batch, key: jax.Array, counts: Any
    ) -> tuple[Any, Any, dict[str, jax.Array], jax.Array]:
        def share(params: Any) -> tuple[jax.Array, Any]:
            """This device's share of the global loss: its sums over everybody's counts."""
            outputs, mutated = self._model.apply(
                {"params": params, "batch_stats": batch_stats},
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            found = self._objective(outputs, batch["label"])
            local = {k: jax.lax.stop_gradient(v.count) for k, v in found.items()}
            total = counts or jax.lax.psum(local, AXIS)
            shares = {k: losses.finish(losses.Parts(v.sum, total[k])) for k, v in found.items()}
            shares["total"] = sum(
                (self._objective.weights[k] * v for k, v in shares.items()), jnp.zeros(())
            )
            return shares["total"], (shares, mutated.get("batch_stats", {}), outputs["logits"])

        gradient, (shares, stats, logits) = jax.grad(share, has_aux=True)(params)
        coarse = affinity.downsample_labels(batch["label"], logits.shape[1:3])
        confusion = metrics.confusion(jnp.argmax(logits, -1), coarse, self._num_classes)
        gradient, shares, confusion = jax.lax.psum((gradient, shares, confusion), AXIS)
        return gradient, stats, shares, confusion

    def _label_counts(self, state: TrainState, split: Batch) -> dict[str, jax.Array]:
        """The counts of the whole batch, all parts and devices, from the labels alone."""
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
        found: dict[str, jax.Array],
        confusion: jax.Array,
        norms: dict[str, jax.Array],
    ) -> Window:
        # The window begins anew on the step after a report, which comes every log_every steps.
        begin = state.step % self._config.log_every == 0
        old = jax.tree.map(lambda x: jnp.where(begin, jnp.zeros_like(x), x), state.window)
        seen = Window(jnp.ones((), jnp.int32), found, confusion, norms)
        return jax.tree.map(jnp.add, old, seen)

    def _faults(
        self, params: Any, batch: Batch, found: dict[str, jax.Array], gradient: jax.Array
    ) -> jax.Array:
        """Bits of `SOURCES` that are not finite, int32."""
        sound = {name: jnp.isfinite(value) for name, value in found.items() if name != "total"}
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
    found = [name for i, name in enumerate(SOURCES) if bits >> i & 1]
    return (
        f"step {step + 1}: NaN or infinity, first in: {found[0]} (in all: {', '.join(found)}). The "
        "state before that step was kept. Lower optim.learning_rate, set optim.clip_norm, or look "
        "at the batch of that step"
    )
