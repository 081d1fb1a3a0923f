"""Whole runs: evaluation, resuming after kills, several processes, overfitting, init, configs."""

import json
import re
import shutil
import struct

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dilaff_jax import evaluate, metrics, train
from dilaff_jax.data import datasets, prepare
from dilaff_jax.models import segmenter
from dilaff_jax.report import run_summary
from dilaff_jax.runtime import checkpoint, parallel
from tests import data_files
from tests.running import (
    assert_bit_identical,
    assert_same_numbers,
    finish,
    lines,
    make_config,
    pair,
    saved,
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=10, validation=7)


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    """A run from start to end, in this process."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    results = train.train_and_evaluate(make_config(data_dir), workdir)
    return workdir, results


def test_a_run_leaves_metrics_checkpoints_results_and_pictures(unbroken):
    workdir, results = unbroken
    found = lines(workdir)
    assert [line["step"] for line in found] == [2, 4, 4, 6, 6]
    assert all(np.isfinite(v) for line in found for v in line.values())
    assert {"train/loss", "train/miou", "train/learning_rate"} <= found[0].keys()
    assert found[-1]["eval/refined/miou"] == results.scalars["refined/miou"]
    assert found[-1]["eval/images"] == 7
    assert json.loads((workdir / "config.json").read_text())["num_steps"] == 6
    assert json.loads((workdir / "classes.json").read_text())["names"][0] == "background"
    assert list((workdir / "tensorboard").glob("events.*"))
    picture = cv2.imread(str(next((workdir / "evaluation" / "6" / "pictures").glob("*.png"))))
    assert picture.shape == (32 + 18, 5 * 32, 3)
    assert "mean IoU" in results.table
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert {4, 6} <= kept


def test_a_run_is_recorded_with_what_made_it(unbroken, tmp_path, capsys):
    workdir, results = unbroken
    file = tmp_path / "results" / "run.json"
    assert run_summary.main([str(workdir), str(file)]) == 0
    kept = json.loads(file.read_text())
    assert kept["config"]["seed"] == 0
    assert [start["step"] for start in kept["starts"]] == [0]
    assert kept["starts"][0]["versions"]["jax"] == jax.__version__
    assert [line["step"] for line in kept["curve"]] == [2, 4, 4, 6, 6]
    assert kept["results"] == {k: round(v, 6) for k, v in results.scalars.items()}
    assert kept["results"]["plain/iou/background"] > 0
    assert kept["table"] == results.table


def test_no_record_without_an_evaluation(tmp_path):
    with pytest.raises(SystemExit, match="holds no evaluation"):
        run_summary.main([str(tmp_path), str(tmp_path / "run.json")])


def test_evaluating_again_gives_what_the_run_saw(unbroken, data_dir, capsys):
    workdir, results = unbroken
    again = evaluate.evaluate_run(make_config(data_dir), workdir)
    assert again.step in (4, 6)
    assert "boundary F" in capsys.readouterr().out
    if again.step == 6:
        assert again.scalars == results.scalars


def test_a_finished_run_started_again_changes_nothing(unbroken, data_dir, tmp_path):
    workdir, results = unbroken
    copy = shutil.copytree(workdir, tmp_path / "copy")
    again = train.train_and_evaluate(make_config(data_dir), copy)
    assert again.scalars == results.scalars
    assert_bit_identical(workdir, copy)


@pytest.fixture(scope="module")
def everything(data_dir, tmp_path_factory):
    """A run with what the others leave off."""
    workdir = tmp_path_factory.mktemp("runs") / "everything"
    config = make_config(data_dir, num_steps=4, profile_steps=(2, 3))
    config.model.dtype = "bfloat16"
    config.optim.accumulate = 2
    config.batch_size = 8
    with config.ignore_type():
        config.inference.window = (32, 24)
    config.inference.update({"scales": (1.0, 0.75), "flip": True})
    config.loss.refined = 0.5
    return workdir, train.train_and_evaluate(config, workdir)


def events(workdir):
    """The event files' summaries, by tag: length, its checksum, the message, its checksum."""
    found = {}
    for path in (workdir / "tensorboard").glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found.update({value.tag: value for value in event.summary.value})
            at += size + 16
    return found


def test_all_options_work_together(everything):
    workdir, results = everything
    assert all(np.isfinite(v) for line in lines(workdir) for v in line.values())
    assert {"train/refined_loss", "train/affinity_loss"} <= lines(workdir)[0].keys()
    assert results.scalars["images"] == 7
    # One trace of the profiler, of the steps asked for.
    [trace] = (workdir / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_tensorboard_gets_scalars_and_pictures(everything):
    workdir, results = everything
    found = events(workdir)
    assert found["eval/refined/miou"].simple_value == pytest.approx(
        results.scalars["refined/miou"], rel=1e-6
    )
    assert found["time/images_per_second"].simple_value > 0
    [picture] = [value.image for tag, value in found.items() if value.HasField("image")]
    shown = cv2.imdecode(np.frombuffer(picture.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    kept = cv2.imread(str(next((workdir / "evaluation" / "4" / "pictures").glob("*.png"))))
    np.testing.assert_array_equal(shown, kept)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_run_that_dies_after_any_step_resumes_bit_identical(
    at, unbroken, data_dir, tmp_path, monkeypatch
):
    """Dies without any chance to save; steps 1 and 3 lie between checkpoints."""
    advance = train.reporting.Reporter.advance

    def die(self, rows):
        advance(self, rows)
        if self._bar.n == at:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.reporting.Reporter, "advance", die)
        with pytest.raises(_Killed):
            train.train_and_evaluate(make_config(data_dir), tmp_path)
    train.train_and_evaluate(make_config(data_dir), tmp_path)
    assert_bit_identical(unbroken[0], tmp_path)


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_of_four_and_one_device(
    unbroken, data_dir, cache, tmp_path
):
    """Same losses, same evaluation, by pmap and by shard_map."""
    for mode in ("pmap", "shard_map"):
        workdir = tmp_path / mode
        for process in pair(data_dir, workdir, f"--config.parallel.mode={mode}"):
            finish(process)
        assert_same_numbers(lines(workdir), lines(unbroken[0]))


@pytest.mark.parametrize(("mode", "devices"), [("pmap", 1), ("pmap", 2), ("shard_map", 4)])
def test_other_devices_give_the_same_run(mode, devices, unbroken, data_dir, tmp_path):
    config = make_config(data_dir)
    config.parallel.update({"mode": mode, "devices": devices})
    train.train_and_evaluate(config, tmp_path)
    assert_same_numbers(lines(tmp_path), lines(unbroken[0]))


def test_a_run_of_four_devices_goes_on_with_one(unbroken, data_dir, tmp_path):
    workdir = shutil.copytree(unbroken[0], tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "6")
    config = make_config(data_dir)
    config.parallel.devices = 1
    train.train_and_evaluate(config, workdir)
    assert_same_numbers(lines(workdir), lines(unbroken[0]))


@pytest.fixture(scope="module")
def trained(unbroken, data_dir):
    """Model and variables to evaluate."""
    config = make_config(data_dir)
    source = datasets.load(config.data, "validation")
    model = segmenter.build(
        segmenter.config_of_run(config), source.num_classes, axis_name=parallel.AXIS
    )
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    _, variables = checkpoint.read_variables(unbroken[0], like)
    return model, variables, source


def evaluation(data_dir, trained, workdir, batch_size, devices, **changes):
    config = make_config(data_dir)
    config.eval.update({"batch_size": batch_size, **changes})
    on = parallel.Devices("pmap", devices)
    source = datasets.load(config.data, config.data.eval_split)
    return evaluate.Evaluation(config, trained[0], on, workdir, source)(trained[1], 1)


@pytest.mark.parametrize(("batch_size", "devices"), [(3, 1), (8, 1), (4, 2), (8, 4)])
def test_evaluation_counts_every_image_once_whatever_the_batch(
    batch_size, devices, data_dir, trained, tmp_path
):
    one = evaluation(data_dir, trained, tmp_path / "a", 1, 1)
    other = evaluation(data_dir, trained, tmp_path / "b", batch_size, devices)
    assert other.scalars == one.scalars


def test_predictions_are_index_pngs_from_which_the_metrics_follow(data_dir, trained, tmp_path):
    results = evaluation(data_dir, trained, tmp_path, 4, 4, predictions=True)
    source = trained[2]
    for variant in ("plain", "refined"):
        counts = np.zeros((source.num_classes,) * 2, np.int64)
        for i, name in enumerate(source.names):
            path = tmp_path / "evaluation" / "1" / "predictions" / variant / f"{name}.png"
            predicted = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert predicted.shape == (32, 32)
            counts += np.asarray(
                metrics.confusion(predicted, source[i]["label"], source.num_classes)
            )
        expected = metrics.segmentation_summary(counts)["miou"]
        assert results.scalars[f"{variant}/miou"] == pytest.approx(expected)


def easy_images(root):
    """Four images of coloured, noisy regions with straight and round borders, three classes."""
    rng = np.random.default_rng(0)
    colors = np.array([[60, 60, 60], [200, 80, 60], [70, 90, 210]])
    for i in range(4):
        label = np.zeros((64, 64), np.uint8)
        cv2.circle(label, tuple(map(int, rng.integers(16, 48, 2))), 14, 1, -1)
        cv2.rectangle(label, (0, 0), tuple(map(int, rng.integers(16, 32, 2))), 2, -1)
        noise = rng.integers(-50, 50, (64, 64, 3))
        data_files.save(
            (colors[label] + noise).clip(0, 255).astype(np.uint8),
            root / "train" / "images" / f"{i}.png",
        )
        data_files.save_palette(label, root / "train" / "labels" / f"{i}.png")
    (root / "classes.txt").write_text("background\ndisc\nbox\n")
    return root


@pytest.mark.slow
def test_four_images_are_learned_by_heart(tmp_path):
    """More than 95 % mIoU on the images trained on: data, model, loss and step fit together."""
    prepare.prepare("image_folder/easy", tmp_path / "data", easy_images(tmp_path / "source"))
    config = make_config(
        tmp_path / "data", num_steps=150, log_every=50, eval_every=150, checkpoint_every=150
    )
    config.model.decoder = "unet"
    config.model.encoder_options = {"width": 32}
    config.model.decoder_options = {"widths": (32, 32, 32, 32), "dropout": 0.0}
    config.data.update(
        {"dataset": "image_folder/easy", "eval_split": "train", "crop_size": (64, 64)}
    )
    config.data.update({"scale_range": (1.0, 1.0), "photometric": False, "cat_max_ratio": 1.0})
    config.optim.update({"name": "adamw", "learning_rate": 2e-3, "weight_decay": 0.0, "ema": 0.0})
    config.parallel.devices = 1
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results.scalars["plain/miou"] > 0.95
    assert results.scalars["affinity/mean/average_precision"] > 0.5


def test_a_run_can_start_from_another_runs_weights(unbroken, data_dir, tmp_path):
    config = make_config(data_dir, num_steps=1)
    config.init.workdir = str(unbroken[0])
    config.optim.update({"learning_rate": 0.0, "ema": 0.0})
    train.train_and_evaluate(config, tmp_path)
    first, second = saved(tmp_path, 1), saved(unbroken[0], checkpoint_step(unbroken[0]))
    key = "['params']['encoder']['conv0']['conv']['kernel']"
    np.testing.assert_array_equal(first[key], second["['average']" + key])


def checkpoint_step(workdir):
    """The step whose refined mIoU was highest."""
    scores = {
        line["step"]: line["eval/refined/miou"] for line in lines(workdir) if "eval/images" in line
    }
    return max(scores, key=lambda s: (scores[s], s))


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(unbroken, data_dir):
    config = make_config(data_dir)
    config.model.affinity.width = 16
    with pytest.raises(
        ValueError, match=r"was written by another model; \d+ parameters differ:\n  affinity_head"
    ):
        train.train_and_evaluate(config, unbroken[0])


def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(data_dir, tmp_path):
    config = make_config(data_dir)
    config.optim.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match=r"step \d: NaN or infinity, first in: "):
        train.train_and_evaluate(config, tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        assert all(np.isfinite(v).all() for v in saved(tmp_path, int(path.name)).values())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", 0, "config.num_steps is 0"),
        ("batch_size", -4, "config.batch_size is -4"),
        ("batch_size", 6, "batch_size is 6; 4 devices need a multiple of 4"),
        ("keep_latest", 0, "config.keep_latest is 0"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(
    key, value, message, data_dir, tmp_path
):
    with pytest.raises(ValueError, match=re.escape(message)):
        train.train_and_evaluate(make_config(data_dir, **{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_opens_each_split_once_and_keeps_what_it_decoded(data_dir, tmp_path, monkeypatch):
    opened, decoded = [], []
    load, decode = datasets.load, datasets.Source._decode

    def spy_load(config, split):
        opened.append(split)
        return load(config, split)

    def spy_decode(source, record):
        decoded.append(source.title)
        return decode(source, record)

    monkeypatch.setattr(datasets, "load", spy_load)
    monkeypatch.setattr(datasets.Source, "_decode", spy_decode)
    config = make_config(data_dir, num_steps=3, eval_every=1)
    config.data.cache = True
    train.train_and_evaluate(config, tmp_path)
    assert sorted(opened) == ["train", "validation"]
    # Three evaluations of seven images.
    assert decoded.count("shapes/tiny validation") == 7
