"""The optimiser and its schedule, from `config.optim`."""

from typing import Any

import jax
import ml_collections
import optax

OPTIMISERS = ("sgd", "adamw")
SCHEDULES = ("poly", "cosine", "constant")


def default_config() -> ml_collections.ConfigDict:
    """Every key of `config.optim`: the field's SGD (mmsegmentation's DeepLab recipe).

    name: "sgd" or "adamw". learning_rate: the highest. schedule: "poly", "cosine" or "constant",
    over all steps after `warmup_steps` of linear rise. power: of poly. end: the share of the
    learning rate at the end. momentum, nesterov: SGD's; b1, b2: AdamW's. weight_decay: on all but
    norms and biases, added to the gradient by SGD (as torch does), decoupled in AdamW.
    head_multiplier: of the learning rate of all that is not the encoder. clip_norm: of the whole
    gradient, 0 for none. accumulate: parts in which a device goes through its rows. ema: decay of
    the averaged weights that are evaluated, 0 for none.
    """
    return ml_collections.ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.01,
            "schedule": "poly",
            "power": 0.9,
            "end": 0.0,
            "warmup_steps": 0,
            "momentum": 0.9,
            "nesterov": False,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 5e-4,
            "head_multiplier": 1.0,
            "clip_norm": 0.0,
            "accumulate": 1,
            "ema": 0.0,
        }
    )


def schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    """Learning rate by step: warm-up from 0, then lr·(end + (1-end)·decay(t)), t from 0 to 1.

    decay is (1-t)^power for poly and (1 + cos πt)/2 for cosine.

    Raises:
        ValueError: an unknown schedule, or a warm-up as long as the run.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule is {config.schedule!r}; expected one of {SCHEDULES}")
    if not 0 <= config.warmup_steps < max(num_steps, 1):
        raise ValueError(
            f"optim.warmup_steps is {config.warmup_steps}; the run has {num_steps} steps"
        )
    peak, steps = config.learning_rate, num_steps - config.warmup_steps
    decay = {
        "poly": lambda: optax.polynomial_schedule(peak, config.end * peak, config.power, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, config.end),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not config.warmup_steps:
        return decay
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, decay], [config.warmup_steps])


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay: kernels. Norms and biases, all of one axis, do not."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def optimiser(
    config: ml_collections.ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the gradient transformation and the schedule that it follows.

    Raises:
        ValueError: an unknown optimiser, and what `schedule` raises.
    """
    rate = schedule(config, num_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    if config.name == "sgd":
        trace = optax.trace(config.momentum, config.nesterov)
        core = [decay, trace if config.momentum else optax.identity()]
    elif config.name == "adamw":
        core = [optax.scale_by_adam(config.b1, config.b2), decay]
    else:
        raise ValueError(f"optim.name is {config.name!r}; expected one of {OPTIMISERS}")
    heads = optax.masked(optax.scale(config.head_multiplier), _is_head)
    return optax.chain(clip, *core, heads, optax.scale_by_learning_rate(rate)), rate


def _is_head(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "encoder", params)
