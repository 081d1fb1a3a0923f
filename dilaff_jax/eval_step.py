"""What one device does with a batch of evaluation: label maps, and counts over all devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import affinity, metrics, propagate, resize, schema, visualize
from dilaff_jax.models import segmenter, test_time
from dilaff_jax.runtime.parallel import AXIS
from dilaff_jax.schema import Key

PLAIN, REFINED = "plain", "refined"

KEYS: schema.Section = {
    "batch_size": Key(
        16,
        schema.COUNT,
        "Images at a time, over all devices; raised to a multiple of the devices.",
    ),
    "boundaries": Key(
        True,
        schema.SWITCH,
        "Take the boundary measures too, which the host computes, by the pixel.",
    ),
    "tolerance": Key(2.0, schema.FROM_0, "Of the boundary F-score, in pixels."),
    "surface_tolerance": Key(1.0, schema.FROM_0, "Of the surface Dice of volumes, in millimetres."),
    "pictures": Key(4, schema.WHOLE, "How many images are drawn."),
    "predictions": Key(False, schema.SWITCH, "Write every prediction as a PNG of class indices."),
}


class EvalStep:
    """Evaluates one batch, with and without refinement; a per-device program over the axis `AXIS`.

    Args:
        config: the whole config.
        model: a `Segmenter`.
        num_classes: C.

    Attributes:
        variants: what is evaluated: `PLAIN`, and `REFINED` where the model has affinities; none
            of an affinity network by itself.
        dilations: of the affinity channels, each once; [] without.

    Raises:
        UserError: an inference config or an operator that cannot be.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, model: segmenter.Segmenter, num_classes: int
    ) -> None:
        test_time.check(config.inference)
        self._config, self._model, self._num_classes = config, model, num_classes
        self._refine = propagate.operator(**config.refine)
        self.variants: tuple[str, ...] = ()
        if model.segmentation:
            self.variants = (PLAIN,) if model.offsets is None else (PLAIN, REFINED)
        self.dilations: list[int] = []
        if model.offsets is not None:
            self.dilations = affinity.distinct_dilations(model.offsets)

    def __call__(
        self, variables: Any, batch: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Counts summed over all devices; label maps and edge pictures of this device's rows.

        batch: `image` `[b, H, W, 3]` in [0, 255], `label` `[b, H, W]`.
        """
        images, labels = batch["image"], batch["label"]
        size, classes = labels.shape[1:], self._num_classes

        def apply(x: jax.Array) -> Mapping[str, Any]:
            return self._model.apply(variables, x, train=False)  # type: ignore[return-value]

        logits, affinity_logits = test_time.infer(
            apply, images, self._model.offsets, self._config.inference
        )
        # Void and the rows and margins that pad a batch are ignored labels, and count nowhere.
        predictions = {}
        if logits is not None:
            predictions[PLAIN] = jnp.argmax(resize.bilinear(logits, size), axis=-1)
            if affinity_logits is not None:
                predictions[REFINED] = self.propagate(logits, affinity_logits, size)
        counts = {k: metrics.confusion(x, labels, classes) for k, x in predictions.items()}
        shown = jnp.zeros((*labels.shape, 0), jnp.uint8)
        if affinity_logits is not None:
            counts["affinity"] = self._edge_counts(affinity_logits, labels)
            shown = visualize.edge_strength(affinity_logits, self._offsets)
        labels_found = {name: x.astype(jnp.uint8) for name, x in predictions.items()}
        return jax.lax.psum(counts, AXIS), {"labels": labels_found, "edges": shown}

    def propagate(
        self, logits: jax.Array, affinity_logits: jax.Array, size: tuple[int, ...]
    ) -> jax.Array:
        """Labels `[b, *size]` from logits `[b, h, w, C]`, refined as config.refine says."""
        labels, _ = propagate.refine_logits(
            logits, affinity_logits, self._offsets, size, self._refine, finite=True
        )
        return labels

    def _edge_counts(self, affinity_logits: jax.Array, labels: jax.Array) -> jax.Array:
        coarse = affinity.downsample_labels(labels, affinity_logits.shape[1:-1])
        target, valid = affinity.targets(coarse, self._offsets)
        return metrics.affinity_histogram(affinity_logits, target, valid, len(self.dilations))

    @property
    def _offsets(self) -> np.ndarray:
        assert self._model.offsets is not None
        return self._model.offsets
