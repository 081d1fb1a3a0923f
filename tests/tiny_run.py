"""A run's workdir without the time of a training: config, classes, and one checkpoint."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from dilaff_jax import optim, step, train
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import checkpoint, parallel
from dilaff_jax.serving import network
from tests import tiny_config

NAMES = ("ground", "tree", "car")
COLORS = np.array([[90, 80, 70], [40, 160, 60], [230, 60, 50]], np.uint8)


def write(workdir, **changes):
    """Writes the workdir of a network with three classes and random weights, and returns it."""
    config = tiny_config.get_config()
    config.data.data_dir = str(workdir / "no_data")  # it must be of no use
    with config.model.ignore_type():
        for key, value in changes.items():
            config.model[key] = value
    if config.model.affinity is None:
        config.loss.affinity = 0.0
    model = segmenter.build(segmenter.config_of_run(config), len(NAMES), axis_name=parallel.AXIS)
    tx, _ = optim.optimiser(config.optim, config.num_steps)
    state = jax.jit(step.TrainStep(config, model, len(NAMES), tx).init, static_argnums=0)(
        (1, 32, 32, 3), step.seed_of(config)
    )
    # A fresh network is undecided everywhere; this one has opinions.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(x + rng.normal(0, 0.5, x.shape), x.dtype), state.params
    )
    state = state.replace(params=params, average={**state.average, "params": params})
    train.save_config(config, workdir, types.SimpleNamespace(class_names=NAMES, colors=COLORS))
    devices = parallel.Devices("pmap", 1)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", devices)
    position = types.SimpleNamespace(get_state=dict)
    checkpoints.save(3, devices.replicate(state), position)
    checkpoints.rate(3, 0.5)
    checkpoints.close()
    return workdir


def expected(workdir, image):
    """Labels, plain labels and probabilities of an image, by the model and `refine_logits`."""
    from dilaff_jax import propagate, resize

    net, model, _ = network.from_run(workdir)
    outputs = jax.jit(lambda v, x: model.apply(v, x, train=False))(net.variables, image[None])
    size = image.shape[:2]
    plain = np.argmax(resize.bilinear(outputs["logits"], size), -1)[0]
    if model.offsets is None:
        return plain, plain, jax.nn.softmax(resize.bilinear(outputs["logits"], size))[0]
    labels, probs = propagate.refine_logits(
        outputs["logits"],
        outputs["affinity_logits"],
        model.offsets,
        size,
        propagate.operator(**net.refine),
    )
    return np.asarray(labels[0]), plain, np.asarray(probs[0])
