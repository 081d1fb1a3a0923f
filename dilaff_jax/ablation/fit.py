"""The refinement that suits a trained network, chosen on images it was not trained on.

    python -m dilaff_jax.main --mode fit --workdir W --split held_out
    python -m dilaff_jax.main --mode fit --workdir W --input IMAGES --logits RESULTS --truth LABELS

The bias per dilation is fitted to calibrate the affinities; operator, steps, strength and repulsion
are the best of `config.ablate.grid`, which doing nothing is part of. WORKDIR/refine.json then holds
the choice, all that was to choose from, and what on; evaluation, prediction, refinement, the viewer
and the exports of that workdir use it. Of several processes of one run each takes its share of the
images.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from dilaff_jax import affinity, metrics, schema
from dilaff_jax.ablation import (
    ablate_config,
    arms,
    class_losses,
    foreign_outputs,
    network_outputs,
    operators,
)
from dilaff_jax.ablation import selection as selection_lib
from dilaff_jax.ablation.class_losses import Sides
from dilaff_jax.ablation.network_outputs import Outputs
from dilaff_jax.data import datasets
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import parallel, provenance, refinement, reporting
from dilaff_jax.serving import network
from dilaff_jax.serving.foreign_files import Form

# How many candidates of the table are printed, and how many classes.
_SHOWN, _CLASSES = 5, 20
# A loss of one class from which on it is said that it can be kept from losing: 0.5 points of IoU.
_LOSS = 0.005


def fit_run(
    config: ml_collections.ConfigDict | None,
    workdir: pathlib.Path,
    split: str = "",
    criterion: str = "",
    max_class_loss: float | None = None,
) -> dict[str, Any]:
    """Fits the refinement of a run to its own segmentation; writes and returns refine.json.

    Args:
        config: whose `ablate` has grid and criterion; None for the run's own.
        workdir: of the run.
        split: of its data set; "" for `held_out` where the run held images out, else its
            evaluation split.
        criterion: one of `ablate_config.CRITERIA`; "" for the config's.
        max_class_loss: by how many points of IoU (per cent) a class may lose by the choice on the
            split: pixels are kept as they are by class and confidence, see `gate.gated`, so that
            none loses more. None for whatever is best on the whole.

    Raises:
        FileNotFoundError: no such run.
        UserError: no segmentation or no affinities to fit; a split that was trained on.
    """
    trained = network.read_config(workdir)
    config, criterion = _settled(trained if config is None else config, criterion)
    config = datasets.completed(config)
    if config.model.get("segmentation", {}) is None:
        raise UserError(
            f"{workdir} has no segmentation of its own; give another network's, with labels: "
            "--input IMAGES --logits RESULTS --truth LABELS"
        )
    split = split or ("held_out" if config.data.hold_out else config.data.eval_split)
    common = set(split.split("+")) & set(trained.data.train_split.split("+"))
    if common:
        raise UserError(
            f"the run was trained on {', '.join(sorted(common))}: a refinement that is chosen "
            "there takes the network for better than it is; give another --split, such as "
            f"{trained.data.eval_split}"
        )

    def compute() -> tuple[Outputs, int]:
        run = arms.Run("joint", config.seed, config, workdir)
        outputs = network_outputs.compute(run, split, best=True)
        if outputs.offsets is None:
            raise UserError(f"{workdir} has no affinity head, so there is nothing to refine with")
        return outputs, outputs.about["step"]

    return _fit(config, workdir, compute, split, criterion, max_class_loss)


def fit_files(
    config: ml_collections.ConfigDict | None,
    workdir: pathlib.Path,
    inputs: foreign_outputs.Inputs,
    form: Form,
    criterion: str = "",
    max_class_loss: float | None = None,
) -> dict[str, Any]:
    """Fits the refinement of a run's affinities to what another network says.

    Args:
        config: as for `fit_run`.
        workdir: of the run with the affinities.
        inputs: images, results and true label maps.
        form: of the results.
        criterion: as for `fit_run`.
        max_class_loss: as for `fit_run`.

    Raises:
        FileNotFoundError: no such run or folder.
        DataError: a file that cannot be used.
        UserError: no affinities; names that do not match.
    """
    config, criterion = _settled(
        network.read_config(workdir) if config is None else config, criterion
    )
    with tempfile.TemporaryDirectory(prefix="dilaff_fit_") as folder:

        def compute() -> tuple[Outputs, int]:
            rows = config.eval.batch_size
            return foreign_outputs.compute(workdir, inputs, form, rows, pathlib.Path(folder))

        of = str(inputs.images)
        return _fit(config, workdir, compute, of, criterion, max_class_loss)


def _settled(
    config: ml_collections.ConfigDict, criterion: str
) -> tuple[ml_collections.ConfigDict, str]:
    config = ablate_config.complete(config)
    schema.check(config.ablate, ablate_config.KEYS, "config.ablate")
    criterion = criterion or config.ablate.criterion
    if criterion not in ablate_config.CRITERIA:
        raise UserError(
            f"the criterion is {criterion!r}; allowed: {', '.join(ablate_config.CRITERIA)}"
        )
    return config, criterion


def _fit(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    compute: Callable[[], tuple[Outputs, int]],
    split: str,
    criterion: str,
    max_class_loss: float | None,
) -> dict[str, Any]:
    if max_class_loss is not None and not max_class_loss >= 0:
        raise UserError(
            f"--max_class_loss is {max_class_loss}; expected points of IoU, 0 or more, such as 0.5"
        )
    grid = operators.grid(config.ablate.grid.to_dict())
    outputs, step, histogram = _measured(compute, config.eval.batch_size)
    rows, bias = config.eval.batch_size, metrics.fit_bias(histogram)
    scores = selection_lib.sweep(outputs, grid, bias, rows, config.eval.tolerance)
    choice = selection_lib.choose(grid, [scores], criterion, len(outputs))
    chosen, names = choice.chosen, outputs.source.class_names
    found = class_losses.compare(outputs, chosen, bias, rows)
    by_class = {"plain": found.plain, "refined": found.refined}
    if max_class_loss is not None and chosen != operators.IDENTITY:
        limit = max_class_loss / 100
        chosen, by_class["kept"] = class_losses.gated(outputs, chosen, bias, rows, limit, found)
        scores |= selection_lib.sweep(outputs, [chosen], bias, rows, config.eval.tolerance)
    options = dict(chosen.options)
    if "bias" in options:
        options["bias"] = np.asarray(operators.resolved(options["bias"], bias)).tolist()
    offsets = outputs.offsets
    assert offsets is not None
    dilations = affinity.distinct_dilations(offsets)
    content: dict[str, Any] = {
        "refine": {"name": chosen.operator, **options},
        "step": step,
        "criterion": criterion,
        "max_class_loss": max_class_loss,
        "split": split,
        "images": len(outputs),
        "bias": dict(zip(map(str, dilations), bias.tolist(), strict=True)),
        "edges": metrics.affinity_summary(histogram, dilations, bias=bias),
        "before": scores[operators.IDENTITY.key],
        "after": scores[chosen.key],
        "classes": _classes(by_class, names),
        "candidates": _one_seed(choice.table),
        "provenance": provenance.provenance("numpy"),
    }
    if jax.process_count() > 1:  # each made its own anew, and nobody reads them again
        shutil.rmtree(outputs.folder)
    if jax.process_index() == 0:
        path = refinement.write(workdir, content)
        print(_table(content))
        print(_class_table(content["classes"], options.get("keep"), names))
        print(f"written: {path}")
    return content


def _measured(
    compute: Callable[[], tuple[Outputs, int]], rows: int
) -> tuple[Outputs, int, np.ndarray]:
    """Outputs of this process's images, their step, and the histogram of all processes' edges.

    All files are read for it, so that what is wrong with one is known before the processes wait for
    one another.
    """
    failure, outputs, step, histogram = None, None, 0, np.empty(0)
    try:
        outputs, step = compute()
        if not len(outputs.own):
            raise UserError(
                f"{len(outputs)} images are too few for {jax.process_count()} processes; start one"
            )
        histogram = operators.edge_histograms(outputs, rows)["head"]
    except (OSError, UserError) as error:
        failure = error
    parallel.agree(failure, "fitting")
    assert outputs is not None
    return outputs, step, parallel.sum_over_processes(histogram)


def _one_seed(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates, the best first, with their figures of the one network that there is."""
    flat = [row | {figure: row[figure][0] for figure in selection_lib.FIGURES} for row in table]
    return sorted(flat, key=lambda row: -np.nan_to_num(row["score"], nan=-1.0))


def _table(content: Mapping[str, Any]) -> str:
    """The best candidates beside doing nothing, in per cent."""
    best = list(content["candidates"][:_SHOWN])
    best += [row for row in content["candidates"][_SHOWN:] if row["operator"] == "identity"]
    rows = [
        [
            " ".join([row["operator"], *(f"{k}={v}" for k, v in row["options"].items())]),
            *(f"{100 * row[figure]:.2f}" for figure in selection_lib.FIGURES),
        ]
        for row in best
    ]
    title = (
        f"{content['split']}: {content['images']} images, {len(content['candidates'])} candidates "
        f"by {content['criterion']}, per cent"
    )
    return reporting.table(title, ["", "mIoU", "boundary F", "trimap mIoU"], rows)


def _classes(by_class: Mapping[str, Sides], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """IoU of each class that there is, by result."""
    ious = {result: of.ious for result, of in by_class.items()}
    return {
        name: {result: float(x[i]) for result, x in ious.items()}
        for i, name in enumerate(names)
        if not np.isnan(ious["plain"][i])
    }


def _class_table(
    classes: Mapping[str, Mapping[str, float]], keep: Sequence[float] | None, names: Sequence[str]
) -> str:
    """IoU of the classes that propagation changes most, in per cent, those that lose first."""
    by_change = sorted(classes, key=lambda c: -abs(classes[c]["refined"] - classes[c]["plain"]))
    shown = sorted(by_change[:_CLASSES], key=lambda c: classes[c]["refined"] - classes[c]["plain"])
    results = list(next(iter(classes.values()), {}))
    rows = [[c, *(f"{100 * classes[c][r]:.2f}" for r in results)] for c in shown]
    columns = ["IoU", *results]
    if keep is not None:
        columns.append("left alone")
        limits = dict(zip(names, keep, strict=True))
        rows = [[*row, _said(limits[row[0]])] for row in rows]
    worst = min((classes[c]["refined"] - classes[c]["plain"] for c in classes), default=0.0)
    table = reporting.table("by class, per cent", columns, rows)
    if "kept" not in results and worst < -_LOSS:
        table += (
            f"\n{shown[0]} loses {-100 * worst:.1f} points; --max_class_loss "
            f"{100 * _LOSS:g} chooses so that no class loses more than {100 * _LOSS:g}"
        )
    return table


def _said(keep: float) -> str:
    """What a number of a gate does, see `gate.kept`."""
    return {0.0: "all", 1.0: "-"}.get(round(keep, 3), f"above {100 * keep:.0f} %")


def has_inputs(*paths: str | None) -> bool:
    """Whether files are given; all of them, or none.

    Raises:
        UserError: some are.
    """
    given = [bool(path) for path in paths]
    if any(given) and not all(given):
        raise UserError(
            "--mode fit takes --input, --logits and --truth together: another network's results, "
            "with labels; without them it takes a split of the run's data"
        )
    return all(given)
