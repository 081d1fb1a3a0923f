"""The analysis of trained runs: what is chosen on one split, and counted on the other."""

import dataclasses
from typing import Any, TypeAlias

import ml_collections
import numpy as np
from tqdm import tqdm

from dilaff_jax.ablation import (
    arms,
    baseline_outputs,
    network_outputs,
    operators,
    scoring,
    selection,
)
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.ablation.selection import Selected

ByArm: TypeAlias = dict[str, list[Outputs]]


class Study:
    """What is known so far.

    Attributes:
        config: the whole config.
        runs: the trained runs, by arm in the order of the seeds.
        chosen_on: outputs on the selection split, likewise.
        reported: outputs on the report split, likewise.
        bias: of each run of "joint", `[D]`, fitted on the selection split.
        selected: what was chosen: "refined", "baseline+dense_crf", ...
        missing: {rival: why it could not be run}.
        variants: what is reported.
        counts: {variant: counts by image, by seed}.
        edge_histograms: of affinity logits on the report split, by seed.
    """

    def __init__(self, config: ml_collections.ConfigDict, runs: list[arms.Run]) -> None:
        self.config = config
        self.runs: dict[str, list[arms.Run]] = {}
        for run in runs:
            self.runs.setdefault(run.arm, []).append(run)
        self.chosen_on = self._outputs(config.ablate.selection_split)
        self.reported = self._outputs(config.ablate.report_split)
        self.bias: list[np.ndarray] = []
        self.selected: dict[str, Selected] = {}
        self.missing = baseline_outputs.missing(list(config.ablate.rivals))
        self.variants: list[scoring.Variant] = []
        self.counts: dict[str, list[dict[str, np.ndarray]]] = {}
        self.edge_histograms: list[dict[str, np.ndarray]] = []

    @property
    def rows(self) -> int:
        """Images at a time."""
        return self.config.eval.batch_size

    @property
    def source(self) -> Any:
        """The report split."""
        return next(iter(self.reported.values()))[0].source

    def select(self, executor: baseline_outputs.Pool) -> None:
        """Fits biases and chooses operator and rivals, on the selection split alone."""
        ablate, tolerance = self.config.ablate, self.config.eval.tolerance
        if "refined" in ablate.arms:
            grid = operators.grid(ablate.grid.to_dict())
            self.bias = [selection.fit_bias(o, self.rows) for o in self.chosen_on["joint"]]
            scores = [
                selection.sweep(o, grid, bias, self.rows, tolerance)
                for o, bias in zip(self.chosen_on["joint"], self.bias, strict=True)
            ]
            images = len(self.chosen_on["joint"][0])
            self._choose("refined", grid, scores, images)
        for arm in [a for a in ("baseline", "joint") if a in self.runs]:
            for rival in [r for r in ablate.rivals if r not in self.missing]:
                grid = operators.grid({rival: ablate.rivals[rival].to_dict()})
                some = selection.some_images(self.chosen_on[arm][0], ablate.rival_images)
                scores = [
                    selection.sweep_rival(o, rival, grid, some, tolerance, executor)
                    for o in self.chosen_on[arm]
                ]
                self._choose(f"{arm}+{rival}", grid, scores, len(some))
        for rival, why in self.missing.items():
            tqdm.write(f"{rival} is left out: it {why}")

    def count(self, executor: baseline_outputs.Pool) -> None:
        """Counts every variant on every image of the report split."""
        tolerance = self.config.eval.tolerance
        self.variants = scoring.variants(self.config.ablate.arms, self.selected)
        plain = {
            arm: [scoring.plain_maps(o, self.rows) for o in outputs]
            for arm, outputs in self.reported.items()
        }
        for variant in self.variants:
            self.counts[variant.name] = []
            for i, outputs in enumerate(self.reported[variant.arm]):
                about: dict[str, Any] = {"after": None}
                maps: Any = enumerate(plain[variant.arm][i])
                if variant.after is not None:
                    bias = self.bias[i] if variant.name == "refined" else None
                    maps = scoring.maps_after(outputs, variant.after, bias, self.rows, executor)
                    about = {
                        "after": dataclasses.asdict(variant.after),
                        "bias": None if bias is None else bias.tolist(),
                    }
                self.counts[variant.name].append(
                    scoring.count(outputs, variant, about, plain[variant.arm][i], maps, tolerance)
                )
        if "joint" in self.runs:
            self.edge_histograms = [
                operators.edge_histograms(o, self.rows) for o in self.reported["joint"]
            ]

    def _choose(
        self, name: str, grid: list[operators.Candidate], scores: list[Any], images: int
    ) -> None:
        choice = selection.choose(grid, scores, self.config.ablate.criterion, images)
        self.selected[name] = choice
        tqdm.write(f"selected for {name}: {choice.chosen} of {len(grid)} candidates")

    def _outputs(self, split: str) -> ByArm:
        return {
            a: [network_outputs.compute(r, split) for r in runs] for a, runs in self.runs.items()
        }
