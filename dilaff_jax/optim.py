"""The optimiser and its schedule, from `config.optim`."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import optax

from dilaff_jax import schema
from dilaff_jax.errors import UserError
from dilaff_jax.schema import Key, Rule

OPTIMISERS = ("sgd", "adamw")
# Of an encoder, with more axes than one but no weights of anything.
_TOKENS = ("cls_token", "register_tokens", "position_embeddings")
SCHEDULES = ("poly", "cosine", "constant")

# The defaults are the field's SGD (mmsegmentation's DeepLab recipe).
KEYS: schema.Section = {
    "name": Key("sgd", schema.choice(*OPTIMISERS), "`sgd` or `adamw`."),
    "learning_rate": Key(0.01, schema.FROM_0, "The highest."),
    "schedule": Key(
        "poly",
        schema.choice(*SCHEDULES),
        "`poly`, `cosine` or `constant`, over all steps after the warm-up.",
    ),
    "power": Key(0.9, schema.ABOVE_0, "Of `poly`."),
    "restarts": Key(0, schema.WHOLE, "How often `cosine` begins anew from the highest rate."),
    "restart_growth": Key(
        1.0,
        Rule("a number of 1 or more", lambda v: schema.is_number(v) and v >= 1),
        "How much longer each cycle is than the one before.",
    ),
    "end": Key(0.0, schema.UP_TO_1, "Share of the learning rate at the end."),
    "warmup_steps": Key(0, schema.WHOLE, "Steps of linear rise."),
    "momentum": Key(0.9, schema.SHARE, "Of SGD."),
    "nesterov": Key(False, schema.SWITCH, "Of SGD."),
    "b1": Key(0.9, schema.SHARE, "Of AdamW."),
    "b2": Key(0.999, schema.SHARE, "Of AdamW."),
    "weight_decay": Key(
        5e-4,
        schema.FROM_0,
        "On all but norms, biases and a transformer's tokens and positions; added to the gradient "
        "by SGD as torch does, decoupled in AdamW.",
    ),
    "head_multiplier": Key(
        1.0, schema.FROM_0, "On the learning rate of all that is not the encoder."
    ),
    "layer_decay": Key(
        1.0,
        Rule("a number in (0, 1]", lambda v: schema.is_number(v) and 0 < v <= 1),
        "The encoder's learning rates fall by this factor from each layer to the one before it, "
        "as fine-tuned transformers are trained; encoders `mit`, `convnext`, `vit`.",
    ),
    "clip_norm": Key(0.0, schema.FROM_0, "Largest norm of the whole gradient; 0: no limit."),
    "accumulate": Key(1, schema.COUNT, "Microbatches in which a device goes through its rows."),
    "frozen": Key(
        (),
        schema.PATTERNS,
        "Patterns of parameters or of modules that do not change, such as `('encoder', 'decoder')`:"
        " no gradient, no state of the optimiser; a module that is frozen whole runs as in "
        "evaluation.",
    ),
    "ema": Key(0.0, schema.SHARE, "Decay of the averaged weights that are evaluated; 0: none."),
}


def schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    """Learning rate by step: warm-up from 0, then lr·(end + (1-end)·decay(t)), t from 0 to 1.

    decay is (1-t)^power for poly and (1 + cos πt)/2 for cosine. With `restarts`, t goes from 0 to 1
    in each cycle (SGDR, https://arxiv.org/abs/1608.03983); the last cycle ends with the run.

    Raises:
        UserError: a warm-up as long as the run; restarts of another schedule, or more than steps.
    """
    if not 0 <= config.warmup_steps < max(num_steps, 1):
        raise UserError(
            f"optim.warmup_steps is {config.warmup_steps}; the run has {num_steps} steps"
        )
    if config.restarts and config.schedule != "cosine":
        raise UserError(
            f"optim.restarts is {config.restarts} and optim.schedule {config.schedule!r}; only "
            "'cosine' begins anew"
        )
    peak, steps = config.learning_rate, num_steps - config.warmup_steps
    decay = {
        "poly": lambda: optax.polynomial_schedule(peak, config.end * peak, config.power, steps),
        "cosine": lambda: _cosine(config, steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not config.warmup_steps:
        return decay
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, decay], [config.warmup_steps])


def _cosine(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """One fall after the other, each `restart_growth` times as long as the one before."""
    growth = [config.restart_growth**i for i in range(config.restarts + 1)]
    ends = [round(steps * sum(growth[: i + 1]) / sum(growth)) for i in range(len(growth))]
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if min(lengths) < 1:
        raise UserError(
            f"optim.restarts is {config.restarts}, with restart_growth {config.restart_growth}: a "
            f"cycle would have no step of the {steps} after the warm-up; give fewer"
        )
    falls = [optax.cosine_decay_schedule(config.learning_rate, n, config.end) for n in lengths]
    return optax.join_schedules(falls, ends[:-1]) if config.restarts else falls[0]


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay: kernels. Norms and biases, all of one axis, do not.

    Nor do a transformer's learned tokens and positions, as where these were trained.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and path[-1].key not in _TOKENS, params
    )


def layer_rates(decay: float, layer_groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """The factor on the learning rate of each module in `layer_groups`, from the image on.

    decay^(n - i) for group i of n, as BEiT and ConvNeXt are fine-tuned; what is in no group, the
    last norms and the decoder, has 1 (https://arxiv.org/abs/2106.08254).
    """
    count = len(layer_groups)
    return {name: decay ** (count - i) for i, names in enumerate(layer_groups) for name in names}


def optimiser(
    config: ml_collections.ConfigDict, num_steps: int, encoder: Any = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the gradient transformation and the schedule that it follows.

    Args:
        config: `config.optim`.
        num_steps: of the run.
        encoder: the model's, which with `layer_decay` says the order of its layers
            (`layer_groups`).

    Raises:
        UserError: a config that `KEYS` does not allow, what `schedule` raises, and `layer_decay`
            with an encoder whose layers have no stated order.
    """
    schema.check(config, KEYS, "config.optim")
    rate = schedule(config, num_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask)
    if config.name == "sgd":
        trace = optax.trace(config.momentum, config.nesterov)
        core = [decay, trace if config.momentum else optax.identity()]
    else:
        core = [optax.scale_by_adam(config.b1, config.b2), decay]
    heads = optax.masked(optax.scale(config.head_multiplier), _is_head)
    layers = [] if config.layer_decay == 1 else [_by_layer(config.layer_decay, encoder)]
    return optax.chain(clip, *core, heads, *layers, optax.scale_by_learning_rate(rate)), rate


def _by_layer(decay: float, encoder: Any) -> optax.GradientTransformation:
    groups = getattr(encoder, "layer_groups", ())
    if not groups:
        raise UserError(
            f"optim.layer_decay is {decay}, and this encoder does not say which of its layers come "
            "first (layer_groups); mit, convnext and vit do. Leave it at 1"
        )
    rates = layer_rates(decay, groups)

    def scale(path: Any, update: jax.Array) -> jax.Array:
        of_encoder = path[0].key == "encoder"
        return update * rates.get(path[1].key, 1.0) if of_encoder else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def _is_head(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "encoder", params)
