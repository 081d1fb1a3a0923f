"""Trackers: what arrives there, that a resumed run goes on in the same one, and what is refused."""

import json
import struct
import sys

import ml_collections
import pytest
from absl import logging as absl_logging

from dilaff_jax import settings, train
from dilaff_jax.errors import MissingPackageError, UserError
from dilaff_jax.runtime import trackers
from tests import data_files, running, tiny_config

CONFIG = {"seed": 0, "optim": {"learning_rate": 0.1, "frozen": []}, "data": {"dataset": "shapes"}}
PICTURE = data_files.picture()


def options(*writers, **more):
    return {"writers": writers, "project": "streets", "name": "", **more}


def use(workdir, kind, step, values, **more):
    (tracker,) = trackers.begin(workdir, step, options(kind, **more), CONFIG)
    for at, value in values.items():
        tracker.scalars(at, {"train/loss": value, "eval/iou/traffic light": 0.5})
    tracker.pictures(max(values), {"eval/street": PICTURE})
    tracker.close()


# MLflow.


@pytest.fixture
def client(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_mlflow_has_numbers_pictures_and_the_config(tmp_path, client):
    use(tmp_path, "mlflow", 0, {5: 2.0, 10: 1.0}, name="first")
    experiment = client.get_experiment_by_name("streets")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.learning_rate"] == "0.1"
    assert run.data.params["data.dataset"] == "shapes"
    assert run.data.metrics["eval/iou/traffic light"] == 0.5
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(5, 2.0), (10, 1.0)]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "eval/street")] == [
        "eval/street/10.png"
    ]


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(tmp_path, client):
    use(tmp_path, "mlflow", 0, {5: 2.0})
    use(tmp_path, "mlflow", 5, {10: 1.0})
    experiment = client.get_experiment_by_name("streets")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in history] == [5, 10]
    assert run.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]


def test_a_server_that_fails_later_costs_no_training_and_is_said(tmp_path, client, monkeypatch):
    (tracker,) = trackers.begin(tmp_path, 0, options("mlflow"), CONFIG)

    def fails(*_, **__):
        raise tracker._error("the server is away")

    said = []
    monkeypatch.setattr(tracker._client, "log_batch", fails)
    monkeypatch.setattr(absl_logging, "warning", lambda text, *more: said.append(text % more))
    tracker.scalars(1, {"train/loss": 1.0})
    assert said == ["MLflow did not take what was to be logged: the server is away"]


def test_a_server_that_is_not_there_is_said_at_once(tmp_path, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9 does not begin"):
        trackers.begin(tmp_path, 0, options("mlflow"), CONFIG)


# Weights & Biases, offline.


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra [wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path):
    """The records of an offline run, in blocks of 32 KB as LevelDB's logs are."""
    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def logged(workdir):
    """What the files of all offline runs in a workdir hold: their ids, and rows of numbers."""
    from wandb.proto import wandb_internal_pb2

    ids, rows = set(), []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
                rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return ids, rows


def test_wandb_has_numbers_and_pictures_and_a_resumed_run_goes_on(tmp_path, offline):
    use(tmp_path, "wandb", 0, {5: 2.0, 10: 1.0}, name="first")
    use(tmp_path, "wandb", 10, {15: 0.5})
    ids, rows = logged(tmp_path)
    assert ids == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
    found = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    assert sorted(found) == [(5, 2.0), (10, 1.0), (15, 0.5)]
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/eval/street*.png"))) == 2


def test_without_a_login_wandb_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra [wandb]")

    def no_login(**_):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", no_login)
    with pytest.raises(UserError, match="No API key configured; `wandb login` once, or set WANDB"):
        trackers.begin(tmp_path, 0, options("wandb"), CONFIG)


# All.


def test_a_training_that_is_killed_goes_on_in_all_of_them(tmp_path, monkeypatch, client, offline):
    data_files.tiny_shapes(tmp_path / "data")
    config = tiny_config.get_config()
    config.data.data_dir = str(tmp_path / "data")
    config.reporting.update({"writers": ("tensorboard", "mlflow", "wandb"), "project": "tiny"})
    with running.killed_after(monkeypatch, config.checkpoint_every + 1):
        train.train_and_evaluate(config, tmp_path)
    train.train_and_evaluate(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = sorted({line["step"] for line in lines if "train/loss" in line})
    assert steps[-1] == config.num_steps
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted({m.step for m in history}) == steps
    assert run.data.params["data.dataset"] == config.data.dataset
    ids, rows = logged(tmp_path)
    assert len(ids) == 1
    assert sorted({r["step"] for r in rows if "train/loss" in r}) == steps
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"writers": ("comet",)}, "some of tensorboard, wandb, mlflow"),
        ({"writers": ("wandb", "wandb")}, "some of tensorboard, wandb, mlflow"),
        ({"project": ""}, "project"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, reason):
    config = settings.default_config()
    config.reporting = ml_collections.ConfigDict(config.reporting.to_dict() | changes)
    with pytest.raises(UserError, match=reason):
        settings.check(config)


@pytest.mark.parametrize(("name", "extra"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'dilaff-jax\[{extra}\]'"):
        trackers.begin(tmp_path, 0, options(name), CONFIG)


def test_a_damaged_note_is_named(tmp_path):
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UserError, match=r"trackers\.json is damaged"):
        trackers._identity(tmp_path, "wandb", lambda: "new")
