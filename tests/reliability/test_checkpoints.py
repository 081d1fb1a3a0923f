"""Damaged, unfinished, foreign and unwritable checkpoints: never garbage, never the last one lost."""

import contextlib
import json
import re
import resource
import shutil
import time

import jax
import numpy as np
import pytest
from absl import logging

from dilaff_jax import step, train
from dilaff_jax.data import prepare
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import checkpoint, parallel
from tests import data_files
from tests.reliability import runs
from tests.running import assert_bit_identical, make_config, saved

LAST = runs.OPTIONS["num_steps"]
pytestmark = [
    # Orbax leaves the other reads of a failed restore to the garbage collector, which complains.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Position:
    """What `Checkpoints` asks of the data's iterator."""

    def __init__(self, at=0):
        self.state = {"step": at, "seed": 7}

    def get_state(self):
        return self.state

    def set_state(self, state):
        if state.keys() != {"step", "seed"}:
            raise ValueError(f"no position: {state}")
        self.state = state


def state_at(at):
    """A state of random numbers, which no codec makes smaller, without a network.

    Its arrays are much larger than the indices beside them: Orbax leaves old indices in its files
    (how many depends on the time), and damage to those is no damage.
    """
    rng = np.random.default_rng(at)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"conv": {"kernel": array(3, 3, 32, 64), "bias": array(64)}, "logits": array(64, 5)}
    stats = {"norm": {"mean": array(64)}}
    window = step.RunningMetrics(np.int32(at), {"total": array()}, np.eye(5, dtype=np.int32), {})
    average = {"params": jax.tree.map(np.copy, params), "batch_stats": stats}
    momentum = ({"trace": jax.tree.map(np.copy, params)}, ())
    return step.TrainState(
        np.int32(at), params, stats, momentum, average, window, np.array([-1, 0], np.int32)
    )


ABSTRACT = jax.eval_shape(lambda: state_at(0))
LIKE = {"params": ABSTRACT.params, "batch_stats": ABSTRACT.batch_stats}


@contextlib.contextmanager
def opened(folder):
    found = checkpoint.Checkpoints(folder, parallel.Devices("pmap", 1))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Checkpoints of steps 2 and 4, with scores, in a workdir."""
    workdir = tmp_path_factory.mktemp("good")
    with opened(workdir / "checkpoints") as checkpoints:
        for at in (2, 4):
            placed = parallel.Devices("pmap", 1).replicate(state_at(at))
            checkpoints.save(at, placed, Position(at))
            checkpoints.rate(at, at / 10)
    return workdir


@pytest.fixture
def workdir(good, tmp_path):
    return shutil.copytree(good, tmp_path / "run")


@pytest.fixture
def warnings(caplog):
    logging.use_absl_handler()
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)  # another test may have left it higher
    yield lambda: "\n".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    logging.set_verbosity(before)


def restored(folder):
    """The step that is restored; what else comes out has to be that step's to the bit."""
    position = Position()
    with opened(folder) as checkpoints:
        at, state = checkpoints.restore(ABSTRACT, position)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(at)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert position.state == {"step": at, "seed": 7}
    return at


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def array_data(folder):
    """The file that holds most of the numbers."""
    return max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "one bit flipped": lambda path: runs.copy_with(path, lambda x: runs.flip(x, 0.6)),
    "truncated": lambda path: runs.copy_with(path, lambda x: x[: len(x) // 2]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_the_newest_gives_the_saved_state_or_the_one_before(
    damage, good, tmp_path, caplog
):
    """Some files hold nothing that is needed; then the newest is read, and is what was saved."""
    fell_back = set()
    for i, name in enumerate(files(good / "checkpoints" / "4")):
        folder = shutil.copytree(good / "checkpoints", tmp_path / str(i))
        DAMAGES[damage](folder / "4" / name)
        caplog.clear()
        at = restored(folder)
        assert at in (2, 4)
        if at == 2:
            fell_back.add(str(name))
            assert f"checkpoint {folder / '4'} " in caplog.text
            assert "cannot be read; trying the one before" in caplog.text
        else:
            assert "trying the one before" not in caplog.text
            # A score that is lost costs no numbers: the run rates the step again.
            lost = str(name) == "metrics/metrics" and damage != "missing"
            assert ("the score in" in caplog.text) == lost
    # The test is of use only where these are hit.
    needed = {"data/metadata", "state/_METADATA", "state/manifest.ocdbt"}
    needed.add(str(array_data(good / "checkpoints" / "4").relative_to(good / "checkpoints" / "4")))
    assert needed <= fell_back


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_a_flipped_bit_in_the_numbers_is_noticed(share, workdir, warnings):
    """Orbax's format has no checksums of array data: it would give other weights."""
    runs.copy_with(array_data(workdir / "checkpoints" / "4"), lambda x: runs.flip(x, share))
    with pytest.raises(ValueError, match=r"checkpoints/4 cannot be read .*move that folder away"):
        checkpoint.read_variables(workdir, LIKE)
    assert restored(workdir / "checkpoints") == 2


def test_what_differs_from_what_was_saved_is_named(workdir, warnings):
    """Numbers that decode well, but are those of another state."""
    path = workdir / "checkpoints" / "4" / "data" / "metadata"
    content = json.loads(path.read_text())
    content["digest"]["average/params/conv/bias"] = "00000000"
    path.write_text(json.dumps(content))
    expected = "not what was saved: average/params/conv/bias"
    with pytest.raises(ValueError, match=expected):
        checkpoint.read_variables(workdir, LIKE)
    assert restored(workdir / "checkpoints") == 2
    assert expected in warnings()


def test_a_changed_data_position_or_score_is_noticed(good, tmp_path):
    for i, (file, old, new) in enumerate(
        [("data/metadata", '"step": 4', '"step": 5'), ("metrics/metrics", "0.4", "0.9")]
    ):
        workdir = shutil.copytree(good, tmp_path / str(i))
        path = workdir / "checkpoints" / "4" / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(ValueError, match="not what was saved"):
            checkpoint.read_variables(workdir, LIKE)
        assert restored(workdir / "checkpoints") == 2


def test_a_checkpoint_without_digest_is_read_with_a_warning(workdir, warnings):
    """As older versions wrote them: the data item was the position alone."""
    path = workdir / "checkpoints" / "4" / "data" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text())["position"]))
    assert restored(workdir / "checkpoints") == 4
    assert "checkpoints/4 was written without a digest" in warnings()
    assert checkpoint.read_variables(workdir, LIKE)[0] == 4


def test_where_no_checkpoint_can_be_read_the_run_stops_and_all_stay(workdir):
    before = files(workdir)
    for at in (2, 4):
        path = array_data(workdir / "checkpoints" / str(at))
        runs.copy_with(path, lambda x: runs.flip(x, 0.5))
    with (
        opened(workdir / "checkpoints") as checkpoints,
        pytest.raises(OSError, match=r"no checkpoint can be read: .*/4 .*/2 .* move the folder"),
    ):
        checkpoints.restore(ABSTRACT, Position())
    assert files(workdir) == before


def test_the_last_good_one_stays_whatever_lies_beside_it(workdir, warnings):
    """Set aside twice, and what a killed process was writing: none is taken for a checkpoint."""
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "4", folder / "9.orbax-checkpoint-tmp")
    (folder / "9.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    shutil.copytree(folder / "4", folder / "4.unreadable")
    array_data(folder / "4").unlink()
    assert checkpoint.latest_step(workdir) == 4
    assert restored(folder) == 2
    with opened(folder) as checkpoints:
        checkpoints.discard_after(2)
        placed = parallel.Devices("pmap", 1).replicate(state_at(4))
        checkpoints.save(4, placed, Position(4))
        checkpoints.rate(4, 0.1)
    assert restored(folder) == 4
    assert "4 is set aside as 4.unreadable1" in warnings()
    # A new checkpoint clears the unfinished one away; what was set aside is for a person to look at.
    names = {p.name for p in folder.iterdir()}
    assert names == {"2", "4", "4.unreadable", "4.unreadable1"}


# Whole runs.


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    train.train_and_evaluate(runs.configure(make_config(data_dir)), workdir)
    return workdir


def test_a_run_whose_newest_checkpoint_is_damaged_ends_bit_identical(
    unbroken, data_dir, tmp_path, warnings
):
    workdir = shutil.copytree(unbroken, tmp_path / "copy")
    # All of its files: the arrays are small, and the largest may hold an old index in its middle.
    for path in (workdir / "checkpoints" / str(LAST)).rglob("d/*"):
        runs.copy_with(path, lambda x: runs.flip(x, 0.5))
    train.train_and_evaluate(runs.configure(make_config(data_dir)), workdir)
    assert f"{LAST} is set aside as {LAST}.unreadable" in warnings()
    assert (workdir / "checkpoints" / f"{LAST}.unreadable").is_dir()
    assert_bit_identical(unbroken, workdir, LAST)


@pytest.mark.parametrize("other", ["model", "classes"])
def test_a_workdir_of_another_run_is_refused_and_stays_as_it_is(
    other, unbroken, data_dir, tmp_path
):
    config = runs.configure(make_config(data_dir))
    if other == "model":
        config.model.affinity.width = 16
    else:
        images = data_files.image_folder(tmp_path / "images", size=(40, 40))
        data_files.image_folder(tmp_path / "images", size=(40, 40), split="validation")
        prepare.prepare("image_folder/other", tmp_path / "data", images)
        config.data.update({"dataset": "image_folder/other", "data_dir": str(tmp_path / "data")})
    before = {name: (unbroken / name).read_bytes() for name in files(unbroken)}
    with pytest.raises(UserError, match="holds a run with another config or other data"):
        train.train_and_evaluate(config, unbroken)
    config.resume_changed = True
    differing = "affinity_head" if other == "model" else "decoder/logits"
    with pytest.raises(
        ValueError,
        match=rf"{LAST} was written by another model; \d+ parameters differ:\n  {differing}",
    ):
        train.train_and_evaluate(config, unbroken)
    assert {name: (unbroken / name).read_bytes() for name in files(unbroken)} == before


@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl"])
def test_a_workdir_that_cannot_be_written_stops_the_run_with_its_path(name, data_dir, tmp_path):
    """A file where a folder has to be, or the other way round: that holds for root too."""
    path = tmp_path / "run" / name
    if name == "metrics.jsonl":
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("in the way")
    with pytest.raises((UserError, OSError), match=re.escape(str(path))):
        train.train_and_evaluate(runs.configure(make_config(data_dir)), tmp_path / "run")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        pytest.param(1, r"File too large: '.*/test_a_full_disk", id="metrics"),
        # Larger than all files of this run but those of a checkpoint.
        pytest.param(
            20_000, r"a checkpoint could not be written to .*/checkpoints", id="checkpoint"
        ),
    ],
)
def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(
    limit, message, unbroken, data_dir, tmp_path, monkeypatch, capfd
):
    """The limit of file sizes stands for the disk: it holds for root, and needs no mount."""
    advance = train.reporting.Reporter.advance
    free = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, rows):
        advance(self, rows)
        if self._bar.n == 5:
            deadline = time.monotonic() + 120
            while not (tmp_path / "checkpoints" / "3").exists():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))

    with monkeypatch.context() as patch:
        patch.setattr(train.reporting.Reporter, "advance", fill)
        try:
            with pytest.raises(OSError, match=message):
                train.train_and_evaluate(runs.configure(make_config(data_dir)), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "future.py" not in said
    assert runs.steps(tmp_path) == [3]
    assert all(np.isfinite(value).all() for value in saved(tmp_path, 3).values())
    train.train_and_evaluate(runs.configure(make_config(data_dir)), tmp_path)
    assert_bit_identical(unbroken, tmp_path, LAST)
