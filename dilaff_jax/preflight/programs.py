"""The programs of a run, for devices that need not be there."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dilaff_jax import objective, optim
from dilaff_jax.eval_step import EvalStep
from dilaff_jax.models import segmenter
from dilaff_jax.preflight import footprint
from dilaff_jax.preflight.footprint import Footprint
from dilaff_jax.runtime.parallel import AXIS, Devices
from dilaff_jax.step import TrainStep, seed_of

TRAIN = "training step"
# What the training step would need without `optim.frozen`.
NOTHING_FROZEN = "nothing frozen"
EVALUATE = "eval step"
PROPAGATE = "propagation"


class Programs:
    """The programs of a run, lowered for given devices from shapes alone.

    Args:
        config: the whole config.
        num_classes: C.
        eval_size: (height, width) of evaluation images, or three sides of volumes.
        devices: mapped by shard_map.

    Raises:
        UserError: the config cannot be.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        num_classes: int,
        eval_size: tuple[int, ...],
        devices: Devices,
    ) -> None:
        # Which weights classes have changes nothing that is compiled.
        config = objective.with_class_weights(config, np.ones(num_classes))
        self._config, self._devices, self._eval_size = config, devices, eval_size
        self._model = segmenter.build(segmenter.config_of_run(config), num_classes, axis_name=AXIS)
        channels = self._model.channels
        self._num_classes, self._image = num_classes, (1, *config.data.crop_size, channels)
        self._tx, _ = optim.optimiser(config.optim, config.num_steps, self._model.encoder)
        self._train = TrainStep(config, self._model, num_classes, self._tx, devices.spread)
        self._eval = EvalStep(config, self._model, num_classes)
        self._seed = seed_of(config)
        # Bands may be of fewer bits; what floating point needs is enough for all.
        self._dtype = jnp.float32 if config.data.bands else jnp.uint8
        self._state = jax.eval_shape(lambda: self._train.init(self._image, self._seed))

    def rows(self) -> dict[str, int]:
        """{name: images a device}, as the config's batches are divided."""
        devices, evaluated = self._devices, -(-self._config.eval.batch_size // self._devices.total)
        trained = devices.per_process(self._config.batch_size) // devices.total
        programs = {TRAIN: trained}
        if self._config.optim.frozen:
            programs[NOTHING_FROZEN] = trained
        programs[EVALUATE] = evaluated
        if self._model.offsets is not None:
            programs[PROPAGATE] = evaluated
        return programs

    def measure(self, name: str, rows: int, limit: float | None) -> Footprint:
        """What a program needs, compiled here.

        Args:
            name: a key of `rows()`.
            rows: images a device.
            limit: bytes that a device has; None where unknown.

        Raises:
            UserError: the compiler refused it for another reason than its size.
        """
        trains = name in (TRAIN, NOTHING_FROZEN)
        repeats = self._config.optim.accumulate if trains else 1
        lower = {
            TRAIN: self.train_step,
            NOTHING_FROZEN: self.thawed_step,
            EVALUATE: self.eval_step,
            PROPAGATE: self.propagation,
        }
        return footprint.measure(lower[name], rows, limit, repeats)

    def train_step(self, rows: int) -> Any:
        """The training step with `rows` images a device, lowered."""
        return self._lower_step(self._train, self._state, rows)

    def thawed_step(self, rows: int) -> Any:
        """The training step as it would be with nothing frozen, lowered."""
        config = self._config.copy_and_resolve_references()
        config.optim.frozen = ()
        spread = self._devices.spread
        step = TrainStep(config, self._model, self._num_classes, self._tx, spread)
        return self._lower_step(
            step, jax.eval_shape(lambda: step.init(self._image, self._seed)), rows
        )

    def eval_step(self, rows: int) -> Any:
        """The evaluation step, lowered."""
        program = self._devices.map(self._eval, out=("replicated", "sharded"))
        return self._lower(program, self._state.evaluated, self._batch(rows, self._eval_size))

    def propagation(self, rows: int) -> Any:
        """The refinement alone, from logits to labels, lowered."""
        outputs = jax.eval_shape(
            lambda variables, x: self._model.apply(variables, x, train=False),
            self._state.evaluated,
            self._batch(rows, self._eval_size)["image"],
        )
        maps = {name: outputs[name] for name in ("logits", "affinity_logits")}
        if maps["logits"] is None:  # then another network's, taken to be on the affinity's grid
            shape = (*maps["affinity_logits"].shape[:3], self._num_classes)
            maps["logits"] = jax.ShapeDtypeStruct(shape, jnp.float32)

        def program(_: Any, x: dict[str, jax.Array]) -> jax.Array:
            return self._eval.propagate(x["logits"], x["affinity_logits"], self._eval_size)

        return self._lower(self._devices.map(program, out="sharded"), (), maps)

    def _lower_step(self, train_step: TrainStep, state: Any, rows: int) -> Any:
        program = self._devices.map(train_step, out="state", donate=True, shared=1)
        batch = self._batch(rows, self._config.data.crop_size)
        return self._lower(program, state, batch, self._seed)

    def _batch(self, rows: int, size: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (rows * self._devices.total, *size)
        return {
            "image": jax.ShapeDtypeStruct((*shape, self._model.channels), self._dtype),
            "label": jax.ShapeDtypeStruct(shape, jnp.uint8),
        }

    def _lower(self, program: Any, state: Any, batch: Any, *shared: Any) -> Any:
        placed = self._devices.abstract(state, "state"), self._devices.abstract(batch, "sharded")
        whole = self._devices.abstract(shared)
        platform = self._devices.local[0].platform
        return program.trace(*placed, *whole).lower(lowering_platforms=(platform,))
