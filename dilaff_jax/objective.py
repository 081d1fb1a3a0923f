"""The losses of a config, from what a network gives for a batch: `config.loss`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import affinity, losses, propagate, resize, schema
from dilaff_jax.errors import UserError
from dilaff_jax.kernels import backends
from dilaff_jax.losses import LossSum
from dilaff_jax.numerics import log_probs
from dilaff_jax.schema import Key, Rule

# Of a pixel by itself; of all pixels of an image at once.
PIXEL_LOSSES = ("cross_entropy", "focal")
REGION_LOSSES = ("dice", "tversky", "lovasz_softmax", "boundary", "region_mutual_information")
SEGMENTATION_LOSSES = (*PIXEL_LOSSES, "ohem", "loss_max_pooling", *REGION_LOSSES)
AFFINITY_LOSSES = ("balanced", "bce", "focal", "ohem", "max_pooling")
SCHEDULES = ("constant", "linear", "cosine")
# Mining chooses what it counts by the predictions, so no count is known before the forward pass.
MINING = ("ohem", "loss_max_pooling", "max_pooling")


def _summands(text: object) -> dict[str, float]:
    """Weights by name of a sum such as "cross_entropy + 0.5*dice"; {} where it is none."""
    weights: dict[str, float] = {}
    for part in text.split("+") if isinstance(text, str) else ():
        number, times, name = part.strip().rpartition("*")
        try:
            weight = float(number) if times else 1.0
        except ValueError:
            return {}
        name = name.strip()
        if name not in SEGMENTATION_LOSSES or name in weights or not 0 < weight < math.inf:
            return {}
        weights[name] = weight
    return weights


KEYS: schema.Section = {
    "segmentation": Key(
        "cross_entropy",
        Rule(
            f"one of {', '.join(map(repr, SEGMENTATION_LOSSES))}, or a sum of several such as "
            "'cross_entropy + 0.5*dice'",
            lambda v: bool(_summands(v)),
        ),
        "`cross_entropy`, `ohem`, `focal`, `loss_max_pooling`, `dice`, `tversky`, "
        "`lovasz_softmax`, `boundary`, `region_mutual_information`; or a sum such as "
        "`'cross_entropy + 0.5*dice'`, see [which loss](method.md#which-loss).",
    ),
    "segmentation_options": Key(
        {},
        schema.OPTIONS,
        "Its keyword arguments, such as `class_weights`: numbers, or `'median_frequency'` for "
        "√(median frequency / frequency) in the training split. Of a sum: `{'dice': {...}, ...}`.",
    ),
    "blocks": Key(
        "auto",
        schema.choice("auto", "rows", "planes"),
        "How logits are enlarged to the labels, piece by piece: `rows`, few and channels last, "
        "as a TPU likes it; `planes`, a plane a class, as a GPU does; `auto` by the platform.",
    ),
    "auxiliary": Key(0.4, schema.FROM_0, "Weight of the auxiliary head's loss."),
    "deep": Key(
        1.0,
        schema.FROM_0,
        "Weight of the segmentation loss of a decoder's coarser steps, where it scores them "
        "(`decoder_options.deep_supervision`): half of it for the finest, a quarter for the next.",
    ),
    "affinity": Key(1.0, schema.FROM_0, "λ; 0 is the plain baseline, without affinity head."),
    "affinity_schedule": Key(
        "constant",
        schema.choice(*SCHEDULES),
        "Of λ over the run: `constant`; `linear` or `cosine`, from its value to 0, so that the "
        "affinity shapes the features first and the segmentation has the last word.",
    ),
    "affinity_loss": Key(
        "balanced",
        schema.choice(*AFFINITY_LOSSES),
        "`balanced`, `bce`, `focal`, `ohem` or `max_pooling`.",
    ),
    "affinity_options": Key({}, schema.OPTIONS, "Its keyword arguments."),
    "affinity_class_weights": Key(
        (),
        schema.WEIGHTS,
        "One for each class: pairs weigh the mean of their two classes' weights (`balanced`, "
        "`bce`, `focal`).",
    ),
    "soft_targets": Key(
        False, schema.SWITCH, "Affinity targets from area-pooled labels instead of the nearest."
    ),
    "void_strip": Key(
        0,
        schema.WHOLE,
        "Pixels of void this near to a class count as its in affinity targets: 3 closes the strips "
        "of about five pixels between the objects of VOC.",
    ),
    "boundaries": Key(
        1.0, schema.FROM_0, "Weight of the loss of semantic boundaries, with `model.boundaries`."
    ),
    "aaf": Key(0.0, schema.FROM_0, "Weight of the Adaptive Affinity Fields loss, a baseline."),
    "refined": Key(
        0.0,
        schema.FROM_0,
        "Weight of the cross-entropy of the refined segmentation: training through the "
        "propagation.",
    ),
}


MEDIAN_FREQUENCY = "median_frequency"


def with_class_weights(
    config: ml_collections.ConfigDict, class_pixels: np.ndarray | None
) -> ml_collections.ConfigDict:
    """The config with numbers in place of `class_weights = "median_frequency"`.

    w[c] = √(median of the frequencies / frequency[c]); 1 for a class without pixels (median
    frequency balancing, Eigen and Fergus 2015, https://arxiv.org/abs/1411.4734; the root, which
    spares precision, is our choice).

    Args:
        config: the whole config; it stays as it is.
        class_pixels: labelled pixels of each class in the training split, `[C]`, if known.

    Raises:
        UserError: `class_weights` is another word, or `class_pixels` are not known.
    """
    config = config.copy_and_resolve_references()
    for name, (_, options) in segmentation_terms(config.loss).items():
        wanted = options.get("class_weights")
        if not isinstance(wanted, str):
            continue
        where = f"class_weights of {name} (config.loss.segmentation_options) is {wanted!r}"
        if wanted != MEDIAN_FREQUENCY:
            raise UserError(f"{where}; give one number for each class, or {MEDIAN_FREQUENCY!r}")
        if class_pixels is None:
            raise UserError(
                f"{where}, and this data set was prepared without counts of its pixels; prepare it "
                "with dilaff_jax.data.prepare, or give one number for each class"
            )
        pixels = np.asarray(class_pixels, np.float64)
        weights = np.ones(len(pixels))
        found = pixels > 0
        weights[found] = np.sqrt(np.median(pixels[found]) / pixels[found])
        with options.ignore_type():
            options.class_weights = tuple(weights.tolist())
    return config


def segmentation_terms(loss: ml_collections.ConfigDict) -> dict[str, tuple[float, Any]]:
    """{loss: (weight, keyword arguments)} of `config.loss.segmentation`.

    Raises:
        UserError: it is no loss; options of a loss that it does not name.
    """
    weights, options = _summands(loss.segmentation), loss.segmentation_options
    if len(weights) == 1:
        return {name: (weight, options) for name, weight in weights.items()}
    unknown = [key for key in options if key not in weights]
    if unknown:
        raise UserError(
            f"config.loss.segmentation_options has {unknown[0]!r}; {loss.segmentation!r} is a sum "
            f"of losses, so give the options of each by its name: {', '.join(weights)}"
        )
    nothing = ml_collections.ConfigDict()
    return {name: (weight, options.get(name, nothing)) for name, weight in weights.items()}


class Objective:
    """The losses of one config.

    Args:
        config: the whole config.
        model: a `Segmenter`.
        num_classes: C.

    Attributes:
        weights: {term: weight} of the terms that this config has.

    Raises:
        UserError: options of `config.loss` that are unknown or contradict each other.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, model: nn.Module, num_classes: int
    ) -> None:
        self._config, self._offsets = config.loss, model.offsets
        self._num_classes, self._steps = num_classes, config.num_steps
        self._refine = propagate.operator(**config.refine)
        self._check(config)
        self._segmentation = self._named(config.loss) if model.segmentation else {}
        weights = {
            **{term: weight for term, (_, weight, _) in self._segmentation.items()},
            "auxiliary": config.loss.auxiliary if config.model.aux else 0.0,
            "deep": config.loss.deep if self._is_deep(model) else 0.0,
            "affinity": config.loss.affinity,
            "boundaries": config.loss.boundaries if config.model.boundaries is not None else 0.0,
            "aaf": config.loss.aaf,
            "refined": config.loss.refined,
        }
        self.weights = {term: weight for term, weight in weights.items() if weight}
        self._check_head()
        if not model.segmentation and {"aaf", "refined"} & self.weights.keys():
            raise UserError(
                "loss.aaf and loss.refined are losses of a segmentation, and model.segmentation is "
                "None; set both to 0"
            )

    def weight(self, term: str, step: jax.Array) -> jax.Array | float:
        """What a term counts at a step, from 0 on: its weight, λ by its schedule."""
        schedule = self._config.affinity_schedule
        if term != "affinity" or schedule == "constant":
            return self.weights[term]
        share = jnp.clip(step / self._steps, 0, 1)
        left = 1 - share if schedule == "linear" else (1 + jnp.cos(jnp.pi * share)) / 2
        return self.weights[term] * left

    def __call__(self, outputs: Mapping[str, Any], labels: jax.Array) -> dict[str, LossSum]:
        """Returns sum and count of every term. labels: `[b, H, W]`, at full resolution."""
        logits = outputs["logits"]
        terms = {
            term: self._of_segmentation(name, logits, labels, options)
            for term, (name, _, options) in self._segmentation.items()
        }
        if "auxiliary" in self.weights:
            terms["auxiliary"] = self._of_segmentation(
                "cross_entropy", outputs["aux_logits"], labels, {}
            )
        if "deep" in self.weights:
            terms["deep"] = _weighted_sum(
                (weight / 2**step, self._of_segmentation(name, scores, labels, options))
                for step, scores in enumerate(outputs["deep_logits"], start=1)
                for name, weight, options in self._segmentation.values()
            )
        if "affinity" in self.weights:
            terms["affinity"] = self._affinity(outputs["affinity_logits"], labels)
        if "boundaries" in self.weights:
            maps = outputs["boundary_logits"]
            coarse = affinity.downsample_labels(labels, maps[0].shape[1:-1])
            # Each of the maps counts whole, as in CASENet.
            terms["boundaries"] = _weighted_sum(
                (1.0, losses.semantic_boundaries(logits, coarse)) for logits in maps
            )
        if "aaf" in self.weights:
            coarse = affinity.downsample_labels(labels, logits.shape[1:-1])
            terms["aaf"] = losses.adaptive_affinity_fields(logits, coarse)
        if "refined" in self.weights:
            _, probs = propagate.refine_logits(
                logits,
                outputs["affinity_logits"],
                self._offsets,
                labels.shape[1:],
                self._refine,
                finite=True,
            )
            # Cross-entropy of log p is that of p: softmax(log p) = p.
            terms["refined"] = losses.cross_entropy(log_probs(probs), labels)
        return terms

    def _of_segmentation(
        self, name: str, logits: jax.Array, labels: jax.Array, options: Mapping[str, Any]
    ) -> LossSum:
        loss = getattr(losses, name)
        if name not in PIXEL_LOSSES:
            return loss(resize.bilinear(logits, labels.shape[1:]), labels, **options)
        if labels.ndim > 3:  # patches of volumes, of the size of which all logits fit
            return loss(resize.bilinear(logits, labels.shape[1:]), labels, **options)
        blocks = self._config.blocks
        if blocks == "auto":
            blocks = "planes" if backends.traced_for() == "gpu" else "rows"
        return losses.upsampled_loss(loss, logits, labels, blocks, **options)

    @staticmethod
    def _is_deep(model: nn.Module) -> bool:
        return bool(model.segmentation) and bool(getattr(model.decoder, "deep_supervision", False))

    @staticmethod
    def _named(loss: ml_collections.ConfigDict) -> dict[str, tuple[str, float, Any]]:
        """{term: (loss, weight, options)}: one loss is the term "segmentation"."""
        terms = segmentation_terms(loss)
        return {
            name if len(terms) > 1 else "segmentation": (name, weight, options)
            for name, (weight, options) in terms.items()
        }

    def _affinity(self, logits: jax.Array, labels: jax.Array) -> LossSum:
        grid, num_classes = logits.shape[1:-1], self._num_classes
        labels = affinity.close_void(labels, self._config.void_strip, len(grid))
        coarse = affinity.downsample_labels(labels, grid)
        if self._config.soft_targets:
            target, valid = affinity.soft_targets(labels, self._offsets, grid, num_classes)
        else:
            target, valid = affinity.targets(coarse, self._offsets)
        dilations = len(affinity.distinct_dilations(self._offsets))
        loss = getattr(losses, f"affinity_{self._config.affinity_loss}")
        options = dict(self._config.affinity_options)
        weights = self._config.affinity_class_weights
        if weights:
            if len(weights) != num_classes:
                raise UserError(
                    f"loss.affinity_class_weights has {len(weights)} numbers; expected one for "
                    f"each of {num_classes} classes, or () for none"
                )
            options["weights"] = affinity.pair_weights(coarse, self._offsets, weights)
        return loss(logits, target, valid, dilations, **options)

    def _check(self, config: ml_collections.ConfigDict) -> None:
        loss = config.loss
        schema.check(loss, KEYS, "config.loss")
        if loss.affinity_class_weights and loss.affinity_loss in MINING:
            raise UserError(
                f"loss.affinity_loss {loss.affinity_loss!r} mines its edges and takes no "
                "loss.affinity_class_weights; use 'balanced', 'bce' or 'focal', or set ()"
            )
        accumulate = config.optim.accumulate
        used = (*_summands(loss.segmentation), loss.affinity_loss)
        if accumulate > 1 and any(name in MINING for name in used):
            raise UserError(
                f"optim.accumulate is {accumulate} and a loss of {used} mines by the predictions; "
                "its count is not known before all microbatches are seen: use accumulate=1"
            )

    def _check_head(self) -> None:
        if self._offsets is None and {"affinity", "refined"} & self.weights.keys():
            raise UserError(
                "loss.affinity and loss.refined need an affinity head: set model.affinity, {} for "
                "its defaults, or set both to 0 for the plain baseline"
            )


def _weighted_sum(parts: Iterable[tuple[float, LossSum]]) -> LossSum:
    """One LossSum, `[n]`, that `finish` takes to Σ weight·finish(part)."""
    given = list(parts)
    entries = sum(part.sum.size for _, part in given)
    sums = [part.sum.ravel() * (weight * entries / part.sum.size) for weight, part in given]
    return LossSum(
        jnp.concatenate(sums), jnp.concatenate([part.count.ravel() for _, part in given])
    )
