"""The study: changes of one config, compared on the selection split; and processes that share runs."""

import dataclasses
import errno
import fcntl
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from dilaff_jax import affinity, train
from dilaff_jax.ablation import (
    agreement,
    arms,
    config_study,
    evaluations,
    network_outputs,
    operators,
)
from dilaff_jax.runtime import locks
from tests import planted, test_ablate

data_dir = test_ablate.data_dir
CHANGES = {"fine": {"model": {"affinity": {"stride": 2}}}, "weak": {"loss": {"affinity": 0.1}}}


def make_config(data_dir, **changes):
    return test_ablate.make_config(data_dir, changes=changes or CHANGES)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    config = make_config(data_dir)
    config.num_steps = 2
    seen, compute = [], network_outputs.compute

    def spy(run_, split):
        seen.append(split)
        return compute(run_, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_outputs, "compute", spy)
        found = config_study.study(config, workdir)
    return {"found": found, "workdir": workdir, "splits": set(seen), "config": config}


def test_every_change_is_a_network_of_its_own(whole):
    rows = whole["found"]["rows"]
    assert list(rows) == ["baseline", "joint", "fine", "weak"]
    assert rows["fine"]["gflop"] > rows["joint"]["gflop"] > rows["baseline"]["gflop"]
    assert rows["weak"]["gflop"] == rows["joint"]["gflop"]
    assert "refined" not in rows["baseline"]
    for name in ("joint", "fine", "weak"):
        assert 0 <= rows[name]["refined"]["miou"]["mean"] <= 1
        assert rows[name]["configured"]["operator"].startswith("signed")
        assert (whole["workdir"] / name / "seed-3" / "config.json").exists()


def test_the_selected_is_never_below_doing_nothing(whole):
    for row in whole["found"]["rows"].values():
        if "refined" in row:
            assert row["refined"]["miou"]["mean"] >= row["plain"]["miou"]["mean"]
            assert row["refined"]["miou"]["mean"] >= row["configured"]["miou"]["mean"]


def test_the_report_split_stays_unseen(whole):
    assert whole["splits"] == {"validation"}


def test_differences_are_paired_by_seed(whole):
    found, rows = whole["found"]["differences"]["fine"], whole["found"]["rows"]
    expected = rows["fine"]["refined"]["miou"]["mean"] - rows["baseline"]["plain"]["miou"]["mean"]
    assert found["refined minus baseline"]["miou"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert "refined minus joint" in found
    assert list(whole["found"]["differences"]["baseline"]) == [
        "plain minus baseline", "plain minus joint",
    ]  # fmt: skip


def test_the_plain_figures_of_the_baseline_are_those_of_its_evaluation(whole):
    folder = whole["workdir"] / "baseline" / "seed-3"
    expected = train.evaluate.last_results(folder).scalars["plain/miou"]
    found = whole["found"]["rows"]["baseline"]["plain"]["miou"]["mean"]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joint": {"seed": 1}}, "'joint', which every study has"),
        ({"a/b": {"seed": 1}}, "'a/b', which names a folder"),
        ({"typo": {"loss": {"afinity": 1.0}}}, "changes, typo: .*afinity"),
        ({"stride": {"model": {"affinity": {"stride": 3}}}}, "changes, stride: affinity.stride"),
    ],
)
def test_a_change_that_cannot_be_is_refused_by_name(changes, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_study.study(make_config(data_dir, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


# Where nothing is selected.


@pytest.fixture(scope="module")
def compared(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluations")
    config = make_config(data_dir, weak={"loss": {"affinity": 0.1}})
    config.num_steps = 2
    config.ablate.seeds = (3, 4)
    with config.ignore_type():
        config.ablate.grid = {}
    return {
        "found": config_study.study(config, workdir),
        "workdir": workdir,
        "config": config,
    }


def test_without_a_grid_every_network_is_evaluated_once_on_the_report_split(compared):
    found, workdir = compared["found"], compared["workdir"]
    assert list(found["rows"]) == ["baseline", "joint", "weak"]
    assert found["title"].endswith(compared["config"].ablate.report_split)
    for name, row in found["rows"].items():
        for kind in ("plain", "refined"):
            if kind == "refined" and name == "baseline":
                assert kind not in row
                continue
            expected = [
                train.evaluate.last_results(workdir / name / f"seed-{s}").scalars[f"{kind}/miou"]
                for s in (3, 4)
            ]
            assert row[kind]["miou"]["values"] == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def planted_scores(compared, monkeypatch):
    """The study, of evaluations with scores that are random."""
    rng, drawn = np.random.default_rng(0), {}

    def last_results(workdir):
        names = [f"{k}/{f}" for k in ("plain", "refined") for f in ("miou", "boundary_f")]
        names = names[: 2 if "baseline" in str(workdir) else 4]
        drawn.setdefault(str(workdir), {n: rng.random() for n in names})
        return train.evaluate.Results(2, drawn[str(workdir)], "")

    monkeypatch.setattr(train.evaluate, "last_results", last_results)
    config = compared["config"].copy_and_resolve_references()
    config.ablate.seeds = (3, 4, 5, 6)
    todo = config_study.runs(config, compared["workdir"])
    found = evaluations.compare(config, todo)
    own = {name: [drawn[str(r.workdir)] for r in todo if r.arm == name] for name in found["rows"]}
    return found, own


def test_differences_of_evaluations_are_paired_with_students_interval(planted_scores):
    found, own = planted_scores
    for kind, other, minus in [
        ("refined", "baseline", "plain/miou"),
        ("refined", "weak", "plain/miou"),
        ("refined", "joint", "refined/miou"),
        ("plain", "joint", "plain/miou"),
    ]:
        pairs = zip(own["weak"], own[other], strict=True)
        differences = np.array([a[f"{kind}/miou"] - b[minus] for a, b in pairs])
        name = "plain" if other == "weak" else other
        row = found["differences"]["weak"][f"{kind} minus {name}"]["miou"]
        assert row["mean"] == pytest.approx(differences.mean(), abs=1e-5)
        interval = scipy.stats.t.interval(
            0.95, 3, loc=differences.mean(), scale=scipy.stats.sem(differences)
        )
        assert row["over_seeds"] == pytest.approx(interval, abs=1e-4)


def test_every_network_is_compared_with_every_other(planted_scores):
    """With its plain figures, by seed; either way round."""
    found, own = planted_scores
    assert len(found["pairs"]) == 3 * 2
    for pair in found["pairs"]:
        for kind in ("plain", "refined"):
            if pair["of"] == "baseline" and kind == "refined":
                assert kind not in pair
                continue
            for figure in ("miou", "boundary_f"):
                expected = [
                    a[f"{kind}/{figure}"] - b[f"plain/{figure}"]
                    for a, b in zip(own[pair["of"]], own[pair["minus"]], strict=True)
                ]
                assert pair[kind][figure]["values"] == pytest.approx(expected, abs=1e-5)
                assert pair[kind][figure]["mean"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_the_resolution_says_what_more_seeds_would_tell(planted_scores):
    found, own = planted_scores
    pairs = zip(own["weak"], own["baseline"], strict=True)
    std = np.std([a["plain/miou"] - b["plain/miou"] for a, b in pairs], ddof=1)
    row = found["resolution"]["weak"]["miou"]
    assert row["10"] == pytest.approx(scipy.stats.t.ppf(0.975, 9) * std / 10**0.5, rel=1e-3)
    assert row["3"] > row["5"] > row["10"] > row["20"]


def test_a_run_that_was_not_evaluated_is_evaluated_before_it_is_compared(compared, tmp_path):
    """As where another process saved the last step and was killed before it evaluated."""
    workdir = tmp_path / "study"
    shutil.copytree(compared["workdir"], workdir)
    shutil.rmtree(workdir / "weak" / "seed-4" / "evaluation")
    found = config_study.study(compared["config"], workdir)
    assert found["rows"] == compared["found"]["rows"]


def test_without_a_grid_the_report_split_must_not_be_trained_on(data_dir, tmp_path):
    config = make_config(data_dir)
    config.ablate.report_split = config.data.train_split
    with config.ignore_type():
        config.ablate.grid = {}
    with pytest.raises(ValueError, match=r"data\.train_split.*ablate\.report_split"):
        config_study.study(config, tmp_path)


# Agreement of errors.


def test_pairs_are_counted_as_loops_count_them(data_dir, tmp_path):
    config = test_ablate.make_config(data_dir)
    run = arms.Run("joint", 0, config, tmp_path)
    found, bias = planted.compute(run, "validation"), np.array([-1.0, 0.5])
    expected = np.zeros((2, 2, 2, 2), int)
    labels = network_outputs.padded_labels(found, np.arange(len(found)), len(found))
    coarse = np.asarray(affinity.downsample_labels(labels, found.affinity_logits.shape[1:3]))
    classes = found.logits.argmax(-1)
    for n, k in np.ndindex(len(found), len(found.offsets)):
        dy, dx = found.offsets[k]
        for y, x in np.ndindex(*coarse.shape[1:]):
            y2, x2 = y + dy, x + dx
            inside = 0 <= y2 < coarse.shape[1] and 0 <= x2 < coarse.shape[2]
            if not inside or 255 in (coarse[n, y, x], coarse[n, y2, x2]):
                continue
            same = coarse[n, y, x] == coarse[n, y2, x2]
            says = classes[n, y, x] == classes[n, y2, x2]
            head = found.affinity_logits[n, y, x, k] > bias[k // 8]
            expected[k // 8, int(same), int(says == same), int(head == same)] += 1
    assert (agreement.count(found, bias, 2) == expected).all()


def test_dilations_are_counted_in_the_order_of_the_channels(data_dir, tmp_path):
    run = arms.Run("joint", 0, test_ablate.make_config(data_dir), tmp_path)
    found, bias = planted.compute(run, "validation"), np.array([-1.0, 0.5])
    swapped = dataclasses.replace(
        found,
        affinity_logits=np.roll(found.affinity_logits, 8, axis=-1),
        offsets=affinity.offsets(planted.DILATIONS[::-1]),
    )
    expected = agreement.count(found, bias, 2)[::-1]
    assert (agreement.count(swapped, bias[::-1], 2) == expected).all()


def test_errors_that_fall_together_cannot_be_mended():
    together = np.array([[[[10, 0], [0, 90]]] * 2])
    found = agreement.figures(together, [1])
    assert found["d1/phi"] == pytest.approx(1)
    assert (found["d1/mendable"], found["d1/spoilable"]) == (0, 0)


def test_independent_errors_have_no_correlation():
    found = agreement.figures(np.array([[[[1, 9], [9, 81]]] * 2]), [1])
    assert found["mean/phi"] == pytest.approx(0)
    assert found["mean/mendable"] == pytest.approx(0.9)
    assert found["mean/spoilable"] == pytest.approx(0.1)


def test_correlation_is_that_of_numpy_with_both_kinds_of_pairs_alike():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (1, 2, 2, 2))
    weights, first, second = [], [], []
    for kind, s, h in np.ndindex(2, 2, 2):
        weights.append(counts[0, kind, s, h] / counts[0, kind].sum())
        first.append(s)
        second.append(h)
    covariance = np.cov(first, second, aweights=weights)
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert agreement.figures(counts, [4])["d4/phi"] == pytest.approx(expected)


# Several processes.


def test_a_run_that_another_process_trains_is_left_to_it(data_dir, tmp_path, monkeypatch):
    """It is waited for only when nothing else is left, and trained if the other died."""
    todo = arms.runs(test_ablate.make_config(data_dir, arms=("baseline", "joint")), tmp_path)
    held = train.lock_file(todo[0].workdir)
    held.parent.mkdir(parents=True)
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    trained = []

    def train_one(run, *_):
        trained.append(run.workdir.parent.name)
        if len(trained) == 1:
            other.kill()  # dies without having trained it

    monkeypatch.setattr(train, "_train", train_one)
    arms.train_all(todo)
    other.wait()
    assert trained == ["joint", "baseline"]


def test_a_workdir_that_is_trained_in_is_refused_and_left_alone(data_dir, tmp_path):
    config = test_ablate.make_config(data_dir)
    with locks.held(train.lock_file(tmp_path)) as mine:
        assert mine
        with pytest.raises(ValueError, match="another process trains there"):
            train.train_and_evaluate(config, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock-0"]


def test_a_lock_is_had_once_and_again_when_let_go(tmp_path):
    with locks.held(tmp_path / "lock"):
        with (tmp_path / "lock").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with locks.held(tmp_path / "lock") as again:
            assert not again
    with locks.held(tmp_path / "lock") as free:
        assert free


def test_a_disk_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("WARNING", logger="absl"), locks.held(tmp_path / "lock") as mine:
        assert mine
    assert "no locks on this disk" in caplog.text


def test_a_studys_grid_has_the_operator_that_was_trained_through(whole):
    configured = config_study.configured_candidate(whole["config"].refine)
    assert configured not in operators.grid(whole["config"].ablate.grid.to_dict())
    assert configured.operator == "signed"
