"""The ablation: what is trained, what may be seen by what, and the statistics."""

import collections
import copy
import os
import signal
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
import scipy.stats

from dilaff_jax import affinity, losses, metrics, propagate, resume, train
from dilaff_jax.ablation import (
    ablate_config,
    arms,
    baseline_outputs,
    cache,
    counts,
    network_outputs,
    operators,
    run,
    selection,
    statistics,
)
from dilaff_jax.ablation.operators import Candidate
from dilaff_jax.models import segmenter
from dilaff_jax.objective import Objective
from dilaff_jax.runtime import preemption
from tests import data_files, planted, test_affinity, tiny_ablation, tiny_config
from tests.running import ROOT


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=6, validation=5, test=4)


def make_config(data_dir, **changes):
    config = tiny_ablation.get_config()
    config.data.data_dir = str(data_dir)
    config.ablate.update(changes)
    return config


# The whole, on networks that are really trained.


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """Three calls: stopped within the second arm, gone on with, and called again when done."""
    workdir = tmp_path_factory.mktemp("ablation")
    config, trained, computed = make_config(data_dir), [], []

    def spy_train(of_run, to):
        trained.append(to.relative_to(workdir).as_posix())
        if len(trained) == 2:
            raise preemption.Preempted("asked to stop")
        return train_and_evaluate(of_run, to)

    def spy_fill(folder, *rest):
        computed.append(folder)
        return fill(folder, *rest)

    train_and_evaluate, fill = train.train_and_evaluate, network_outputs.fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_and_evaluate", spy_train)
        patch.setattr(network_outputs, "fill", spy_fill)
        with pytest.raises(preemption.Preempted):
            run.ablate(config, workdir)
        first = run.ablate(config, workdir)
        number = len(computed)
        again = run.ablate(config, workdir)
    return {"first": first, "again": again, "trained": trained, "computed": number} | {
        "computed_again": len(computed) - number, "workdir": workdir, "config": config,
    }  # fmt: skip


def test_a_stopped_ablation_trains_nothing_twice(whole):
    arms_trained = [name.split("/")[0] for name in whole["trained"]]
    assert arms_trained == ["baseline", "joint", "joint", "aaf"]
    assert set(whole["trained"]) == {"baseline/seed-3", "joint/seed-3", "aaf/seed-3"}
    assert (whole["computed"], whole["computed_again"]) == (6, 0)


SEEDS = """
import pathlib, sys
import jax
from dilaff_jax.ablation import arms
from tests import test_ablate

data_dir, workdir, cache = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
config = test_ablate.make_config(data_dir, seeds=(1, 2), arms=("baseline", "joint"))
arms.train_all(arms.runs(config, pathlib.Path(workdir)))
"""


def test_two_seeds_compile_the_step_once_an_arm(data_dir, tmp_path):
    cache = tmp_path / "cache"
    paths = map(str, (data_dir, tmp_path / "study", cache))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SEEDS, *paths]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    assert len(list((tmp_path / "study").glob("*/seed-*/starts.jsonl"))) == 4
    compiled = collections.Counter(path.name.partition("-")[0] for path in cache.glob("*-cache"))
    # Mapped over the devices: step and evaluation of each arm.
    assert (compiled["jit_init"], compiled["jit__fun"]) == (2, 4), compiled


def test_called_again_it_gives_the_same_numbers(whole):
    for key in ("variants", "differences", "selection", "affinity", "transitions", "per_image"):
        assert whole["first"][key] == whole["again"][key], key


def test_every_run_is_an_ordinary_one_evaluated_on_the_selection_split(whole):
    for arm in ("baseline", "joint", "aaf"):
        folder = whole["workdir"] / arm / "seed-3"
        assert (folder / "metrics.jsonl").exists()
        results = train.evaluate.last_results(folder)
        assert results.step == 4
        assert results.scalars["images"] == 5
    assert train.evaluate.last_results(whole["workdir"] / "joint" / "seed-3").scalars[
        "affinity/mean/f1"
    ]


def test_the_numbers_of_the_arms_are_those_of_the_evaluation(whole, data_dir, tmp_path):
    """The same network through `evaluate`, on the report split."""
    config = arms.arm_config(whole["config"], "joint", 3)
    config.data.eval_split = "test"
    config.refine = {"name": "identity"}
    expected = train.evaluate.evaluate_run(config, whole["workdir"] / "joint" / "seed-3").scalars
    found = whole["first"]["variants"]["joint"]["figures"]
    for name in ("miou", "pixel_accuracy", "boundary_iou", "boundary_f", "trimap_miou/4"):
        assert found[name]["mean"] == pytest.approx(expected[f"plain/{name}"], abs=1e-5), name


def test_one_seed_has_no_interval_over_seeds(whole):
    for difference in whole["first"]["differences"]:
        found = difference["figures"]["miou"]
        assert found["over_seeds"] is None
        assert found["std"] is None
        assert len(found["over_images"]) == 2


# What may be trained and seen.


def test_arms_differ_only_in_their_losses(data_dir):
    config = make_config(data_dir)
    base, joint, aaf = (arms.arm_config(config, a, 7) for a in ("baseline", "joint", "aaf"))
    assert (base.loss.affinity, base.loss.aaf) == (0, 0)
    assert (joint.loss.affinity, joint.loss.aaf) == (1, 0)
    assert (aaf.loss.affinity, aaf.loss.aaf) == (0, 1)
    assert segmenter.config_of_run(base).affinity is None
    assert {c.seed for c in (base, joint, aaf)} == {7}
    for other in (base, aaf):
        other.loss = joint.loss
        assert resume.as_json(other) == resume.as_json(joint)


def test_a_folder_from_before_an_option_is_of_its_default(data_dir, tmp_path):
    config = make_config(data_dir)
    config.loss.affinity_class_weights = (1.0,) * 8
    run_ = next(r for r in arms.runs(config, tmp_path) if r.arm == "joint")
    old = copy.deepcopy(run_.config)
    del old.loss.affinity_class_weights
    run_.workdir.mkdir(parents=True)
    (run_.workdir / "config.json").write_text(old.to_json_best_effort())
    with pytest.raises(ValueError, match=r"loss.affinity_class_weights: found \[\], wanted \[1.0"):
        arms.check_folder(run_)
    run_.config.loss.affinity_class_weights = ()
    arms.check_folder(run_)


def test_a_folder_of_another_run_is_refused_with_what_differs(data_dir, tmp_path):
    config = make_config(data_dir)
    run_ = arms.runs(config, tmp_path)[0]
    run_.workdir.mkdir(parents=True)
    other = copy.deepcopy(run_.config)
    other.optim.learning_rate = 0.5
    (run_.workdir / "config.json").write_text(other.to_json_best_effort())
    with pytest.raises(ValueError, match=r"optim.learning_rate: found 0.5, wanted 0.05"):
        arms.train_all([run_])


def test_a_folder_of_a_run_that_gives_the_same_weights_is_taken(data_dir, tmp_path):
    """Logged, evaluated and stored otherwise, and on a machine with other devices."""
    config = make_config(data_dir)
    run_ = arms.runs(config, tmp_path)[0]
    run_.workdir.mkdir(parents=True)
    other = copy.deepcopy(run_.config)
    other.update({"log_every": 7, "eval_every": 2, "checkpoint_every": 3, "keep_latest": 9})
    other.data.update({"data_dir": "/elsewhere", "workers": 2, "eval_split": "test"})
    other.model.affinity = None  # the baseline has none anyway
    other.refine = {"name": "identity"}
    (run_.workdir / "config.json").write_text(other.to_json_best_effort())
    arms.check_folder(run_)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_split": "test"}, "both hold 'test'"),
        ({"selection_split": "validation+test"}, "both hold 'test'"),
        ({"selection_split": "train"}, "data.train_split is 'train' and ablate.selection_split"),
        ({"report_split": "train"}, "both hold 'train'"),
        ({"arms": ("refined",)}, "name both"),
        ({"arms": ("joint", "crf")}, "allowed: baseline, joint, refined, aaf"),
        ({"arms": ()}, "allowed: baseline"),
        ({"seeds": (1, 1)}, "expected different whole numbers"),
        ({"seeds": ()}, "expected different whole numbers"),
        ({"criterion": "accuracy"}, "expected one of .miou., .boundary_f., .trimap_miou., "),
        ({"resamples": 0}, "expected a whole number above 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        run.ablate(make_config(data_dir, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_joint_without_affinity_loss_is_refused(data_dir):
    config = make_config(data_dir)
    config.loss.affinity = 0.0
    with pytest.raises(ValueError, match="'joint' would be the baseline"):
        ablate_config.check(config)


def test_a_request_to_stop_ends_what_is_between_trainings(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(preemption.Preempted, match="run again"),
        preemption.stopping_cleanly(tmp_path),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_to_stop_while_a_run_is_set_up_reaches_it_and_ends_the_ablation(tmp_path):
    ended = []

    def train_to_the_end(training):
        training(True)
        os.kill(os.getpid(), signal.SIGTERM)  # while it is set up: asked again later
        with preemption.stop_signal() as stop:
            assert stop.wait(timeout=60)
        ended.append("the run")
        training(False)
        ended.append("not reached")

    with pytest.raises(preemption.Preempted), preemption.stopping_cleanly(tmp_path) as training:
        train_to_the_end(training)
    assert ended == ["the run"]


def test_time_left_is_that_of_the_same_arm(data_dir, tmp_path):
    runs = arms.runs(make_config(data_dir, seeds=(0, 1)), tmp_path)
    clock = arms.Clock(runs)
    assert "unknown" in clock.left(runs)
    clock.add(runs[0], 600)
    clock.add(runs[1], 1200)
    clock.add(runs[4], 300)  # joint of seed 1, stopped on its way
    assert arms.Clock(runs).left([runs[3], runs[4]]).startswith("about 25 min")


# Selection.


@pytest.fixture
def study(data_dir, tmp_path, monkeypatch):
    """Makes a study of planted outputs, whose report split nobody may look at."""

    class Unseen:
        def __getattr__(self, name):
            raise AssertionError(f"the report split was looked at: {name}")

    def compute(run_, split):
        return Unseen() if split == "test" else planted.compute(run_, split)

    def make(**changes):
        monkeypatch.setattr(network_outputs, "compute", compute)
        config = make_config(data_dir, arms=("joint", "refined"), seeds=(0, 1), **changes)
        return run.Study(config, arms.runs(config, tmp_path))

    return make


def select(study):
    with baseline_outputs.pool(1) as executor:
        study.select(executor)
    return study.selected["refined"]


def grid(**entries):
    return ml_collections.ConfigDict(entries)


# Sharpness 0.01 makes every weight 1: a blur.
HARMFUL = {"random_walk": {"steps": (20,), "sharpness": (0.01,), "bias": (-9.0,)}}
HELPFUL = {
    "random_walk": {"steps": (3,), "sharpness": (2.0, 4.0), "bias": ("fitted",)},
    "signed": {"steps": (3,), "strength": (0.05, 0.1), "bias": ("fitted", -2.0)},
}


def test_selection_never_looks_at_the_report_split(study):
    made = study(grid=grid(**HELPFUL))
    found = select(made)
    assert found.chosen.operator in ("random_walk", "signed")
    with baseline_outputs.pool(1) as executor, pytest.raises(AssertionError, match="was looked at"):
        made.count(executor)


def test_identity_is_chosen_where_every_operator_hurts(study):
    found = select(study(grid=grid(**HARMFUL)))
    assert found.chosen == operators.IDENTITY
    identity, harmful = (row["score"] for row in found.table)
    assert harmful < identity


def test_the_chosen_is_never_worse_than_identity_and_the_best_of_its_grid(study):
    found = select(study(grid=grid(**HELPFUL)))
    scores = [row["score"] for row in found.table]
    chosen = next(r for r in found.table if r["options"] == dict(found.chosen.options))
    assert chosen["score"] == max(scores) > scores[0]
    assert len(found.table) == 1 + 2 + 2 * 2
    for row in found.table:
        assert row["score"] == pytest.approx(np.mean(row["miou"]))


def test_the_criterion_may_weigh_boundaries(study):
    found = select(study(grid=grid(**HELPFUL), criterion="miou+boundary_f"))
    for row in found.table:
        assert row["score"] == pytest.approx(np.mean([row["miou"], row["boundary_f"]]))


def test_the_smaller_gain_buys_neither_figure_with_the_other():
    grid = [operators.IDENTITY, *(Candidate("signed", (("steps", n),)) for n in (1, 2, 3))]
    # By seed; the means gain (0.1, -0.02), (0.02, 0.03) and (0.0, 0.3).
    miou = {0: (0.5, 0.7), 1: (0.6, 0.8), 2: (0.5, 0.74), 3: (0.7, 0.5)}
    border = {0: (0.4, 0.4), 1: (0.36, 0.4), 2: (0.4, 0.46), 3: (0.7, 0.7)}
    seeds = [
        {
            c.key: {"miou": miou[n][s], "boundary_f": border[n][s], "trimap_miou": 1 - miou[n][s]}
            for n, c in enumerate(grid)
        }
        for s in (0, 1)
    ]
    found = selection.choose(grid, seeds, "smaller_gain", 1)
    assert [row["score"] for row in found.table] == pytest.approx([0, -0.02, 0.02, 0.0])
    assert found.chosen == grid[2]
    assert selection.choose(grid, seeds, "miou", 1).chosen == grid[1]
    assert selection.choose(grid, seeds, "miou+boundary_f", 1).chosen == grid[3]
    assert selection.choose(grid, seeds, "boundary_f", 1).chosen == grid[3]
    assert selection.choose(grid, seeds, "trimap_miou", 1).chosen == grid[0]


def test_equals_go_to_the_earlier_so_that_doing_nothing_wins():
    both = [operators.IDENTITY, Candidate("signed", (("steps", 0),))]
    scores = {c.key: dict.fromkeys(selection.FIGURES, 0.5) for c in both}
    assert selection.choose(both, [scores], "miou", 1).chosen == operators.IDENTITY


def test_scores_are_kept_and_only_new_candidates_are_run(study, monkeypatch):
    made = study(grid=grid(**HARMFUL))
    select(made)
    ran = []
    refined = operators.refined_labels

    def spy(found, group, *rest):
        ran.extend(group)
        return refined(found, group, *rest)

    monkeypatch.setattr(operators, "refined_labels", spy)
    select(made)
    assert ran == []
    made.config.ablate.grid.signed = {"steps": (1,)}
    select(made)
    assert {c.operator for c in ran} == {"signed"}


def test_swept_labels_are_those_of_one_operator_alone(study):
    found = study().chosen_on["joint"][0]
    group = [
        Candidate("signed", (("steps", 3), ("strength", s), ("bias", b)))
        for s, b in ((0.05, "fitted"), (0.2, -2.0))
    ]
    assert len(operators.groups(group)) == 1
    bias = np.array([-1.0, 0.5])
    maps = np.concatenate([m for _, m in operators.refined_labels(found, group, bias, 2)], axis=1)
    for candidate, labels in zip(group, maps, strict=True):
        refine = operators.operator(candidate, bias)
        edges = found.affinity_logits.astype(np.float32)
        alone = jax.jit(
            lambda x, e, f=refine: propagate.refine_logits(x, e, found.offsets, found.size, f)[0]
        )
        expected = alone(found.logits, edges)
        assert (labels == np.asarray(expected)).mean() > 0.999
    assert (maps[0] != maps[1]).any()


def test_edges_are_counted_as_the_metrics_count_them(study):
    found = study().chosen_on["joint"][0]
    labels = network_outputs.padded_labels(found, np.arange(len(found)), len(found))
    coarse = affinity.downsample_labels(labels, found.affinity_logits.shape[1:3])
    edges = found.affinity_logits.astype(np.float32)

    @jax.jit
    def count(coarse, edges):
        target, valid = affinity.targets(coarse, found.offsets)
        return metrics.affinity_histogram(edges, target, valid, 2)

    expected = count(coarse, edges)
    np.testing.assert_array_equal(operators.edge_histograms(found, 2)["head"], expected)


def test_a_part_of_the_fitted_bias_is_a_candidate():
    fitted = np.array([-2.0, -1.0])
    np.testing.assert_allclose(operators.resolved("fitted", fitted), fitted)
    np.testing.assert_allclose(operators.resolved("fitted*0.25", fitted), [-0.5, -0.25])
    assert operators.resolved(-2.0, fitted) == -2


@pytest.mark.parametrize("bias", ["half", "fitted*", "fitted*x", "fitted/2"])
def test_a_bias_that_cannot_be_is_refused_before_anything_is_trained(bias, data_dir, tmp_path):
    with pytest.raises(ValueError, match="expected a number, 'fitted' or"):
        run.ablate(make_config(data_dir, grid=grid(signed={"bias": (bias,)})), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [{"steps": 3}, {"steps": ()}, {"bias": "fitted"}])
def test_a_grid_without_values_is_refused(entry):
    with pytest.raises(ValueError, match="expected a tuple of values"):
        operators.grid({"signed": entry})


# Counts and statistics.


def maps(seed, classes=4, shape=(4, 30, 41)):
    """Truth in blobs with void, and two predictions of it."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (shape[0], 8, 11)).repeat(5, 1).repeat(5, 2)
    truth = truth[:, : shape[1], : shape[2]]
    wrong = rng.integers(0, classes, (2, *shape))
    predictions = np.where(rng.random((2, *shape)) < 0.1, wrong, np.roll(truth, 1, 2))
    return np.where(rng.random(shape) < 0.1, 255, truth), *predictions


def stacked(prediction, truth, classes=4):
    found = [counts.of_image(p, t, classes, 2.0) for p, t in zip(prediction, truth, strict=True)]
    return {k: np.stack([f[k] for f in found]) for k in found[0]}


def test_figures_of_summed_counts_are_those_of_the_metrics():
    truth, prediction, _ = maps(0)
    weights = np.array([[1, 1, 1, 1], [0, 2, 0, 1]])
    found = counts.figures(stacked(prediction, truth), list("abcd"), weights)
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(4), weight)
        pairs = [(prediction[i], truth[i], 4) for i in drawn]
        expected = metrics.segmentation_summary(
            np.sum([metrics.confusion(*p) for p in pairs], axis=0), list("abcd")
        ) | metrics.boundary_summary(
            iou=metrics.add(*(metrics.boundary_iou(*p) for p in pairs)),
            f=metrics.add(*(metrics.boundary_f(*p) for p in pairs)),
            trimaps=metrics.add(*(metrics.trimap(*p) for p in pairs)),
        )
        for name, values in found.items():
            assert values[row] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 2.0, 3.0])
def test_the_quick_count_is_that_of_the_metrics(tolerance):
    truth, prediction, _ = maps(1)
    truth[3] = 2  # an image without any boundary
    for p, t in zip(prediction, truth, strict=True):
        confusion, pixels, band = counts.Truth(t, 4, tolerance).count(p.astype(np.uint8))
        np.testing.assert_array_equal(band, metrics.trimap(p, t, 4, (counts.TRIMAP,))[0])
        np.testing.assert_array_equal(confusion, metrics.confusion(p, t, 4))
        np.testing.assert_array_equal(pixels, metrics.boundary_f(p, t, 4, tolerance).pixels)


def test_a_choice_is_of_the_classes_that_the_images_have():
    """A class that is predicted and nowhere true would count as 0, and not once it is gone."""
    truth = np.zeros((20, 20), np.uint8)
    truth[:, 10:] = 1
    wrong = truth.copy()
    wrong[0, 0] = 2
    found = [counts.quick_figures(*counts.Truth(truth, 3, 2.0).count(p)) for p in (wrong, truth)]
    assert found[0]["miou"] == pytest.approx((199 / 200 + 1) / 2)
    assert found[1]["miou"] == 1
    everywhere = metrics.segmentation_summary(metrics.confusion(wrong, truth, 3))
    assert everywhere["miou"] == pytest.approx((199 / 200 + 1) / 3)


def test_the_interval_over_seeds_is_the_paired_t_interval_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6))
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert statistics.seed_interval(a - b) == pytest.approx([expected.low, expected.high])
    assert statistics.spread(a)["std"] == pytest.approx(np.std(a, ddof=1))
    assert statistics.seed_interval([0.3]) is None


def test_the_interval_over_images_is_the_paired_bootstrap_of_scipy():
    truth, first, second = maps(2, shape=(4, 30, 41))
    truth, first, second = (np.concatenate([x] * 8) for x in (truth, first, second))
    rng = np.random.default_rng(1)
    first = np.where(rng.random(first.shape) < rng.random((32, 1, 1)) / 2, 0, first)
    one, other = stacked(first, truth), stacked(second, truth)
    weights = statistics.draws(32, 2000)
    assert (weights.sum(axis=1) == 32).all()
    difference = [counts.figures(c, list("abcd"), weights)["miou"] for c in (one, other)]
    found = statistics.image_interval((difference[0] - difference[1])[None])

    def statistic(indices):
        chosen = np.bincount(indices, minlength=32)[None]
        a, b = (counts.figures(c, list("abcd"), chosen)["miou"][0] for c in (one, other))
        return a - b

    expected = scipy.stats.bootstrap(
        (np.arange(32),), statistic, n_resamples=500, method="percentile", vectorized=False,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found == pytest.approx([expected.low, expected.high], abs=0.15 * width)


def test_what_is_kept_is_made_anew_for_something_else(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(3)}

    for about in ({"x": (1, 2)}, {"x": [1, 2]}, {"x": [1, 3]}):
        np.testing.assert_array_equal(
            cache.arrays(tmp_path / "a.npz", about, make)["a"], np.arange(3)
        )
    assert len(made) == 2
    (tmp_path / "b.json").write_text('{"about": 1, "result": 5}')
    assert cache.figures(tmp_path / "b.json", 1, lambda: 6) == 5
    assert cache.figures(tmp_path / "b.json", 2, lambda: 6) == 6


# A bug that made a rival's affinity loss hurt: borders and ignored pixels taken for class edges.


def unmasked_targets(labels, offsets, ignore_label=255):
    """Zero-padded, no mask: what is outside or ignored is "another class"."""
    target, valid = TARGETS(labels, offsets, ignore_label)
    return target, valid | True


def unmasked_loss(logits, target, valid, num_dilations, **options):
    return BALANCED(logits, target, valid | True, num_dilations, **options)


TARGETS, BALANCED = affinity.targets, losses.affinity_balanced


def check_that_masked_pairs_teach_nothing():
    """The gradient of the whole objective at pairs that leave the image or touch void is zero."""
    config = tiny_config.get_config()
    model = segmenter.build(segmenter.config_of_run(config), 8)
    objective = Objective(config, model, 8)
    labels = np.random.default_rng(0).integers(0, 2, (1, 32, 32))
    labels[:, 8:20, :16] = 255
    offsets = model.offsets
    _, valid = jax.jit(lambda x: TARGETS(affinity.downsample_labels(x, (8, 8)), offsets))(labels)
    edges = np.zeros((1, 8, 8, len(model.offsets)), np.float32)

    @jax.jit
    def loss(edges):
        found = objective({"logits": np.zeros((1, 4, 4, 8)), "affinity_logits": edges}, labels)
        return losses.finish(found["affinity"])

    gradient = np.asarray(jax.grad(loss)(edges))
    assert not valid.all()
    assert (gradient[valid] != 0).any()
    assert (gradient[~np.asarray(valid)] == 0).all(), "ignored pairs or borders are taught"


def test_a_dropped_ignore_mask_is_caught(monkeypatch):
    check_that_masked_pairs_teach_nothing()
    test_affinity.test_borders_and_ignored_pixels_are_no_class_edges()
    with monkeypatch.context() as patch:
        patch.setattr(losses, "affinity_balanced", unmasked_loss)
        with pytest.raises(AssertionError, match="are taught"):
            check_that_masked_pairs_teach_nothing()
    with monkeypatch.context() as patch:
        patch.setattr(affinity, "targets", unmasked_targets)
        with pytest.raises(AssertionError, match="are taught"):
            check_that_masked_pairs_teach_nothing()
        with pytest.raises(AssertionError):
            test_affinity.test_borders_and_ignored_pixels_are_no_class_edges()
