"""Outputs of networks that were never trained, with errors that are known, for the ablation."""

import zlib

import numpy as np
import scipy.ndimage

from dilaff_jax import affinity
from dilaff_jax.ablation import network_outputs
from dilaff_jax.data import datasets, pipeline

DILATIONS = (1, 2)


def compute(run, split, edge_noise=1.0):
    """Stands in for `outputs.compute`: blurred truth and smooth noise; affinities of the truth."""
    source = datasets.load(run.config.data, split)
    size = pipeline.eval_size(run.config.data, source)
    # By name and seed: an image's errors do not depend on the split's other images.
    rng = np.random.default_rng([zlib.crc32(f"{run.arm} {split}".encode()), run.seed])
    truth = np.stack([example["label"] for example in map(source.__getitem__, range(len(source)))])
    coarse = np.asarray(affinity.downsample_labels(truth, [n // 2 for n in size]))
    known = np.where(coarse == 255, 0, coarse)
    sharp = 6 * np.eye(source.num_classes, dtype=np.float32)[known]
    noise = rng.normal(size=sharp.shape)
    smooth = scipy.ndimage.gaussian_filter(sharp, (0, 1.6, 1.6, 0))
    strength = 2.2 if run.arm == "joint" else 2.5
    logits = smooth + strength * scipy.ndimage.gaussian_filter(noise, (0, 1, 1, 0)) / 0.28
    edges = None
    offsets = None
    if run.arm == "joint":
        offsets = affinity.offsets(DILATIONS)
        target, _ = affinity.targets(coarse, offsets)
        edges = np.where(target, 1.0, -4.0) + edge_noise * rng.normal(size=target.shape)
    return network_outputs.Outputs(
        source=source,
        size=size,
        logits=logits.astype(np.float32),
        affinity_logits=None if edges is None else edges.astype(np.float16),
        offsets=offsets,
        about={"planted": f"{run} {split} {edge_noise}"},
        folder=run.workdir / "analysis" / split,
        own=np.arange(len(source)),
    )
