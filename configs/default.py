"""Every key of a config and its default; other configs derive from this one.

A config is the experiment: `python -m dilaff_jax.main --config configs/NAME.py --workdir DIR`, any
key changed by `--config.optim.learning_rate=0.02`. The keys of each part are explained where they
are used: data in `dilaff_jax/data/config.py`, model in `models/segmenter.py`, loss in `step.py`,
optim in `optim.py`, inference in `inference.py`, eval in `evaluate.py`, init in `initialise.py`,
ablate in `ablation/config.py`.
"""

import ml_collections

from dilaff_jax import evaluate, inference, initialise, optim, step
from dilaff_jax.ablation import config as ablation
from dilaff_jax.data import config as data
from dilaff_jax.models import segmenter


def get_config() -> ml_collections.ConfigDict:
    """The default config: DeepLabv3-R50 with affinity on `shapes`."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Steps of the run, and images of all devices and processes together in each.
    config.num_steps = 10_000
    config.batch_size = 16

    config.data = data.default()
    config.model = segmenter.default_config()
    # The head's default sources without "stride2": on CamVid it gained nothing (findings.md),
    # and it moved a third of what the affinity adds to a training step on a TPU (performance.md).
    config.model.affinity = ml_collections.ConfigDict({"sources": ("decoder", "stride4")})
    config.loss = step.default_config()
    config.optim = optim.default_config()
    config.inference = inference.default_config()

    # The refinement that is evaluated beside the plain segmentation: `propagate.operator`.
    config.refine = ml_collections.ConfigDict({"name": "signed", "steps": 5, "strength": 0.1})

    # Steps between lines of metrics.jsonl, evaluations, and checkpoints. The last step has all.
    config.log_every = 50
    config.eval_every = 1000
    config.checkpoint_every = 1000
    config.eval = evaluate.default_config()
    # What marks the best checkpoint (of the refined result, if there is a head), and how many of
    # the latest are kept besides.
    config.best_metric = "miou"
    config.keep_latest = 2

    # Which arms, seeds, splits and candidates --mode ablate compares.
    config.ablate = ablation.default()

    # What a fresh run starts from.
    config.init = initialise.default_config()
    # mode: "pmap" or "shard_map". devices: of each process, 0 for all. The rest: several processes.
    config.parallel = ml_collections.ConfigDict(
        {"mode": "pmap", "devices": 0, "coordinator": "", "num_processes": 0, "process_id": -1}
        # Seconds of silence after which a process is taken for dead, and the others end.
        | {"heartbeat": 100}
    )
    # Steps that are profiled to workdir/profile, as (first, last); () for none.
    config.profile_steps = ()
    return config
