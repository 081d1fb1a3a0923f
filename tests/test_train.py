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

import dilaff_jax
from dilaff_jax import evaluate, metrics, train
from dilaff_jax.data import datasets, prepare
from dilaff_jax.errors import UserError
from dilaff_jax.interop import hub
from dilaff_jax.models import segmenter
from dilaff_jax.report import run_summary
from dilaff_jax.runtime import checkpoint, parallel
from tests import data_files
from tests.running import (
    Killed,
    assert_bit_identical,
    assert_same_numbers,
    finish,
    killed_after,
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


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_run_that_dies_after_any_step_resumes_bit_identical(
    at, unbroken, data_dir, tmp_path, monkeypatch
):
    """Dies without any chance to save; steps 1 and 3 lie between checkpoints."""
    with killed_after(monkeypatch, at):
        train.train_and_evaluate(make_config(data_dir), tmp_path)
    train.train_and_evaluate(make_config(data_dir), tmp_path)
    assert_bit_identical(unbroken[0], tmp_path)


def test_a_run_says_where_its_time_went_however_often_it_was_started(
    data_dir, tmp_path, monkeypatch, capsys
):
    with killed_after(monkeypatch, 5):  # the last checkpoint is of step 4
        train.train_and_evaluate(make_config(data_dir), tmp_path)
    capsys.readouterr()
    train.train_and_evaluate(make_config(data_dir), tmp_path)
    first, second = map(json.loads, (tmp_path / "goodput.jsonl").read_text().splitlines())
    assert (first["begin"], second["begin"], second["step"]) == (0, first["step"], 6)
    for start in (first, second):
        assert start["seconds"]["compilation"] > 0
        assert start["seconds"]["checkpoints"] > 0
    said = capsys.readouterr()
    assert re.search(r"time, \d+ s: .* % steps, .*0\.0 % lost to 1 restart\b", said.out + said.err)
    assert re.search(r"\d images/s a device", said.out + said.err)


@pytest.mark.slow
def test_two_processes_of_two_devices_are_one_of_four_and_one_device(
    unbroken, data_dir, cache, tmp_path
):
    """Same losses, same evaluation, by pmap, by shard_map and with the state in pieces."""
    for mode in parallel.MODES:
        workdir = tmp_path / mode
        pieces = ("--config.parallel.min_size=8",) if mode == "fsdp" else ()
        for process in pair(data_dir, workdir, f"--config.parallel.mode={mode}", *pieces):
            finish(process)
        assert_same_numbers(lines(workdir), lines(unbroken[0]))


@pytest.mark.parametrize(
    ("mode", "devices"), [("pmap", 1), ("pmap", 2), ("shard_map", 4), ("fsdp", 4)]
)
def test_other_devices_give_the_same_run(mode, devices, unbroken, data_dir, tmp_path):
    config = make_config(data_dir)
    config.parallel.update({"mode": mode, "devices": devices, "min_size": 8})
    train.train_and_evaluate(config, tmp_path)
    assert_same_numbers(lines(tmp_path), lines(unbroken[0]))


def test_a_run_of_four_devices_goes_on_with_one(unbroken, data_dir, tmp_path):
    workdir = shutil.copytree(unbroken[0], tmp_path / "copy")
    shutil.rmtree(workdir / "checkpoints" / "6")
    config = make_config(data_dir)
    config.parallel.devices = 1
    train.train_and_evaluate(config, workdir)
    assert_same_numbers(lines(workdir), lines(unbroken[0]))


@pytest.mark.parametrize(("before", "after"), [("pmap", "fsdp"), ("fsdp", "shard_map")])
def test_a_run_goes_on_in_another_mode_and_on_other_devices(
    before, after, unbroken, data_dir, tmp_path, monkeypatch
):
    """Checkpoints know nothing of how the state lay: in pieces on four devices, whole on two."""
    config = make_config(data_dir)
    config.parallel.update({"mode": before, "min_size": 8})
    with killed_after(monkeypatch, 3):
        train.train_and_evaluate(config, tmp_path)
    config.parallel.update({"mode": after, "devices": 2})
    train.train_and_evaluate(config, tmp_path)
    assert_same_numbers(lines(tmp_path), lines(unbroken[0]))


def test_a_run_in_pieces_that_dies_resumes_bit_identical(data_dir, tmp_path, monkeypatch, capsys):
    config = make_config(data_dir)
    config.parallel.update({"mode": "fsdp", "mesh": {"data": 2, "fsdp": 2}, "min_size": 8})
    train.train_and_evaluate(config, tmp_path / "whole")
    said = capsys.readouterr()
    assert "parameters in 2 pieces:\n  cut along axis " in said.out + said.err
    with killed_after(monkeypatch, 3):
        train.train_and_evaluate(config, tmp_path / "dead")
    train.train_and_evaluate(config, tmp_path / "dead")
    assert_bit_identical(tmp_path / "whole", tmp_path / "dead")
    # What it wrote is used as any run is.
    image = np.zeros((40, 48, 3), np.uint8)
    assert dilaff_jax.load(tmp_path / "dead")(image).labels.shape == (40, 48)


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


def evaluation(data_dir, trained, workdir, batch_size, devices, mode="pmap", **changes):
    config = make_config(data_dir)
    config.eval.update({"batch_size": batch_size, **changes})
    on = parallel.Devices(mode, devices, min_size=8)
    source = datasets.load(config.data, config.data.eval_split)
    return evaluate.Evaluation(config, trained[0], on, workdir, source)(trained[1], 1)


@pytest.mark.parametrize(
    ("batch_size", "devices", "mode"),
    [(3, 1, "pmap"), (8, 1, "pmap"), (4, 2, "pmap"), (8, 4, "pmap"), (8, 4, "fsdp")],
)
def test_evaluation_counts_every_image_once_whatever_the_batch(
    batch_size, devices, mode, data_dir, trained, tmp_path
):
    one = evaluation(data_dir, trained, tmp_path / "a", 1, 1)
    other = evaluation(data_dir, trained, tmp_path / "b", batch_size, devices, mode)
    assert other.scalars == one.scalars


def test_one_large_image_pads_no_other(data_dir, trained, tmp_path, monkeypatch):
    """And every pixel of images of two sizes is counted once."""
    for name, size in {**{str(i): (40, 32) for i in range(5)}, "huge": (160, 200)}.items():
        data_files.save(data_files.picture(*size), tmp_path / "in/train/images" / f"{name}.png")
        labels = data_files.classes_map(*size, classes=8)
        labels[:2] = 255
        data_files.save(labels, tmp_path / "in/train/labels" / f"{name}.png")
    (tmp_path / "in" / "classes.txt").write_text("\n".join("abcdefgh"))
    prepare.prepare("image_folder/sizes", tmp_path / "data", tmp_path / "in")
    config = make_config(tmp_path / "data")
    config.data.dataset = "image_folder/sizes"
    source = datasets.load(config.data, "train")
    shapes, shard = [], parallel.Devices.shard

    def recorded(self, batch):
        shapes.append(batch["image"].shape)
        return shard(self, batch)

    monkeypatch.setattr(parallel.Devices, "shard", recorded)
    on = parallel.Devices("pmap", 2)
    found = evaluate.Evaluation(config, trained[0], on, tmp_path / "run", source)(trained[1], 1)
    assert set(shapes) == {(2, 160, 200, 3), (4, 40, 32, 3)}
    assert found.scalars["images"] == 6
    labelled = 5 * 38 * 32 + 158 * 200
    assert int(found.counts["device"]["plain"].sum()) == labelled


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


@pytest.mark.parametrize("on_a_hub", [False, True])
def test_a_run_can_start_from_another_runs_weights(
    on_a_hub, unbroken, data_dir, tmp_path, monkeypatch
):
    config = make_config(data_dir, num_steps=1)
    config.init.workdir = str(unbroken[0])
    if on_a_hub:  # itself tested in test_hub
        runs = {"hf://somebody/run": unbroken[0]}
        monkeypatch.setattr(hub, "download", runs.__getitem__)
        config.init.workdir = "hf://somebody/run"
    config.optim.update({"learning_rate": 0.0, "ema": 0.0})
    train.train_and_evaluate(config, tmp_path)
    first, second = saved(tmp_path, 1), saved(unbroken[0], checkpoint_step(unbroken[0]))
    key = "['params']['encoder']['conv0']['conv']['kernel']"
    np.testing.assert_array_equal(first[key], second["['average']" + key])


def test_a_run_can_start_from_a_run_with_other_classes(unbroken, data_dir, tmp_path):
    images = data_files.image_folder(tmp_path / "images", size=(40, 40))
    prepare.prepare("image_folder/other", tmp_path / "data", images)
    config = make_config(tmp_path / "data", num_steps=1)
    config.data.update({"dataset": "image_folder/other", "eval_split": "train"})
    config.init.workdir = str(unbroken[0])
    config.optim.update({"learning_rate": 0.0, "ema": 0.0})
    with pytest.raises(
        UserError, match=r"(?s)parameters differ:\n  .*logits.*config.init.drop and"
    ):
        train.train_and_evaluate(config, tmp_path / "a")
    config.init.drop = config.init.keep = ("decoder/logitz/*",)
    with pytest.raises(UserError, match="fits no parameter of"):
        train.train_and_evaluate(config, tmp_path / "b")
    config.init.drop = config.init.keep = ("decoder/logits/*",)
    train.train_and_evaluate(config, tmp_path / "c")
    first, second = saved(tmp_path / "c", 1), saved(unbroken[0], checkpoint_step(unbroken[0]))
    key = "['params']['encoder']['conv0']['conv']['kernel']"
    np.testing.assert_array_equal(first[key], second["['average']" + key])


def checkpoint_step(workdir):
    """The step whose refined mIoU was highest."""
    scores = {
        line["step"]: line["eval/refined/miou"] for line in lines(workdir) if "eval/images" in line
    }
    return max(scores, key=lambda s: (scores[s], s))


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(unbroken, data_dir):
    config = make_config(data_dir, resume_changed=True)
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


@pytest.mark.parametrize(
    ("plain", "refined", "advises"),
    [
        (0.6, 0.55, True),
        (0.6, 0.6, False),
        (0.6, 0.7, False),
        (0.6, None, False),
        (None, 0.6, False),
    ],
)
def test_propagation_that_does_harm_is_said_with_what_to_do(plain, refined, advises):
    scalars = {"plain/miou": plain, "refined/miou": refined}
    results = evaluate.Results(1, {k: v for k, v in scalars.items() if v is not None}, "")
    assert bool(results.advice) == advises
    if advises:
        assert "lowers mean IoU by 5.0 points: --mode fit" in results.advice


def scored(values):
    """`Evaluation.score` that gives these values by step."""
    return lambda self, results: values.get(results.step)


# Steps and their scores: where patience is 2, and where training ends.
WAITING = [
    ({1: 0.5, 2: 0.4, 3: 0.5, 4: 0.9}, 3),
    ({1: 0.1, 2: 0.2, 3: 0.15, 4: 0.3, 5: 0.3, 6: 0.2, 7: 0.9}, 6),
    ({1: 0.5, 3: 0.4, 5: 0.6}, 8),  # undefined at the other steps: nothing to compare
]


@pytest.mark.parametrize(("scores", "end"), WAITING)
def test_training_ends_when_nothing_has_become_better(
    scores, end, data_dir, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(evaluate.Evaluation, "score", scored(scores))
    config = make_config(data_dir, num_steps=8, eval_every=1, checkpoint_every=3, patience=2)
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert results.step == checkpoint.latest_step(tmp_path / "run") == end
    said = "no better miou in 2 evaluations: training ends at step"
    assert (said in capfd.readouterr().out) == (end < 8)

    # Killed on the way and started again, it ends there too, and once ended it stays so.
    with killed_after(monkeypatch, 2):
        train.train_and_evaluate(config, tmp_path / "killed")
    for _ in range(2):
        train.train_and_evaluate(config, tmp_path / "killed")
        assert checkpoint.latest_step(tmp_path / "killed") == end
    assert_bit_identical(tmp_path / "run", tmp_path / "killed", at=end)

    # More patience goes on.
    config.patience = 0
    train.train_and_evaluate(config, tmp_path / "killed")
    assert checkpoint.latest_step(tmp_path / "killed") == 8


def test_a_run_does_not_go_on_with_other_settings_unless_told_to(data_dir, tmp_path):
    config = make_config(data_dir, num_steps=4)
    train.train_and_evaluate(config, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    config.optim.learning_rate = 0.01
    config.num_steps = 6
    expected = (
        rf"{tmp_path} holds a run with another config or other data:\n"
        r"  num_steps: found 4, wanted 6\n  optim.learning_rate: found 0.05, wanted 0.01\n.*"
        r"config.resume_changed=True"
    )
    with pytest.raises(UserError, match=expected):
        train.train_and_evaluate(config, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    config.resume_changed = True
    train.train_and_evaluate(config, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 4, 6, 6]
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert "changed" not in starts[0]
    assert starts[1]["changed"] == [
        "num_steps: found 4, wanted 6",
        "optim.learning_rate: found 0.05, wanted 0.01",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["learning_rate"] == 0.01


@pytest.mark.parametrize("count", [10, 11])
def test_a_run_does_not_go_on_with_other_images(count, data_dir, tmp_path):
    """A fold of equal length as well: what differs is the images, not their number."""
    config = make_config(data_dir, num_steps=2)
    train.train_and_evaluate(config, tmp_path / "run")
    other = data_files.tiny_shapes(tmp_path / "data", train=count, seed=5)
    config.data.data_dir = str(other)
    config.num_steps = 4
    config.resume_changed = False
    expected = r"training data \(shapes/tiny train\): found "
    with pytest.raises(UserError, match=expected):
        train.train_and_evaluate(config, tmp_path / "run")
    config.resume_changed = True
    if count == 10:
        train.train_and_evaluate(config, tmp_path / "run")
    else:
        with pytest.raises(UserError, match=r"saved data position .* examples differ"):
            train.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim.ema": 0.0}, "written with another optimiser or average .* average has other"),
        ({"optim.name": "adamw"}, "written with another optimiser or average .* opt_state has"),
        ({"batch_size": 8}, "saved data position .* batch_size differ"),
        ({"seed": 1}, "saved data position .* seed differ"),
    ],
)
def test_what_no_checkpoint_can_go_on_with_is_named(changes, expected, unbroken, data_dir):
    config = make_config(data_dir, resume_changed=True)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=expected):
        train.train_and_evaluate(config, unbroken[0])


def test_an_evaluation_that_fails_costs_no_step(data_dir, tmp_path, monkeypatch, capsys):
    failing = evaluate.Evaluation.__call__

    def fail(self, variables, step):
        if step == 4:
            raise MemoryError("no room for 12 megapixels")
        return failing(self, variables, step)

    monkeypatch.setattr(evaluate.Evaluation, "__call__", fail)
    results = train.train_and_evaluate(make_config(data_dir), tmp_path)
    assert results.step == 6
    said = "the evaluation at step 4 failed (MemoryError: no room for 12 megapixels); going on"
    assert said in capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 6]
    assert checkpoint.latest_step(tmp_path) == 6


def kill_in(monkeypatch, what):
    """Ends the process, as far as this one can tell, where an evaluation counts or is rated."""

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(*what, die)


@pytest.mark.parametrize(
    "what",
    [
        (evaluate.Evaluation, "_count"),
        (evaluate.Results, "report"),
        (train.reporting.Reporter, "pictures"),
        (checkpoint.Checkpoints, "rate"),
        (evaluate.Evaluation, "finish"),
    ],
)
def test_a_run_that_dies_within_an_evaluation_has_its_steps_and_makes_up_for_it(
    what, unbroken, data_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        kill_in(patch, what)
        with pytest.raises(Killed):
            train.train_and_evaluate(make_config(data_dir), tmp_path)
        assert checkpoint.latest_step(tmp_path) == 4
        # Again and again, as a lack of memory would: the run gives this evaluation up, not itself.
        if what[1] == "_count":
            for _ in range(4):
                with pytest.raises(Killed):
                    train.train_and_evaluate(make_config(data_dir), tmp_path)
            with pytest.raises(Killed):  # in that of the last step
                train.train_and_evaluate(make_config(data_dir), tmp_path)
            assert checkpoint.latest_step(tmp_path) == 6
            return
    train.train_and_evaluate(make_config(data_dir), tmp_path)
    assert_bit_identical(unbroken[0], tmp_path)
    for at in (4, 6):
        scores = [
            json.loads((w / "checkpoints" / str(at) / "metrics" / "metrics").read_text())
            for w in (unbroken[0], tmp_path)
        ]
        assert scores[0] == scores[1]


def test_a_score_that_is_lost_is_noted_again(unbroken, data_dir, tmp_path):
    workdir = shutil.copytree(unbroken[0], tmp_path / "run")
    path = workdir / "checkpoints" / "6" / "metrics" / "metrics"
    before = path.read_text()
    shutil.rmtree(path.parent)
    train.train_and_evaluate(make_config(data_dir), workdir)
    assert path.read_text() == before


def test_a_last_evaluation_that_fails_is_an_error_after_everything_is_saved(
    data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate.Evaluation, "_count", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        train.train_and_evaluate(make_config(data_dir), tmp_path)
    assert "--mode=eval evaluates the last" in caught.value.__notes__[0]
    assert checkpoint.latest_step(tmp_path) == 6
    monkeypatch.undo()
    assert evaluate.evaluate_run(make_config(data_dir), tmp_path).step == 6


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("iou/backgruond", r"did you mean 'background'.*; expected iou/ and one of background, "),
        ("iou/", r"config.best_metric is 'iou/'; expected iou/ and one of background"),
        ("trimap_miou/7", "expected trimap_miou/ and one of 1, "),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_at_once(metric, expected, data_dir, tmp_path):
    with pytest.raises(UserError, match=expected):
        train.train_and_evaluate(make_config(data_dir, best_metric=metric), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_best_metric_that_is_undefined_on_the_images_is_no_score(
    data_dir, tmp_path, monkeypatch, capsys
):
    summary = metrics.segmentation_summary

    def without(confusion, names=None):
        return {k: v for k, v in summary(confusion, names).items() if k != "iou/background"}

    monkeypatch.setattr(metrics, "segmentation_summary", without)
    config = make_config(data_dir, best_metric="iou/background", num_steps=2)
    assert train.train_and_evaluate(config, tmp_path).step == 2
    assert "step 2 has no score: best_metric is undefined" in capsys.readouterr().out
    assert checkpoint.latest_step(tmp_path) == 2


@pytest.mark.parametrize("name", ["a*b?/[!x]/run[1]"])
def test_a_workdir_may_have_any_name(name, data_dir, tmp_path):
    """What a library takes for a pattern: checkpoints were saved, and could not be read again."""
    workdir = tmp_path / name
    train.train_and_evaluate(make_config(data_dir, num_steps=2), workdir)
    config = make_config(data_dir, num_steps=4, resume_changed=True)
    assert train.train_and_evaluate(config, workdir).step == 4
    assert [line["step"] for line in lines(workdir)] == [2, 2, 4, 4]
    assert evaluate.evaluate_run(config, workdir).step in (2, 4)
    assert all(np.isfinite(v).all() for v in saved_in(workdir, 4, tmp_path).values())


def saved_in(workdir, at, tmp_path):
    """`saved`, of a copy whose name is no pattern: it is whole in itself."""
    shutil.copytree(workdir, tmp_path / "copy")
    return saved(tmp_path / "copy", at)


def strict(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_figures_that_are_undefined_are_null_and_read_as_nan(data_dir, tmp_path):
    """Validation without one labelled pixel: its mIoU is undefined."""
    root = data_files.image_folder(tmp_path / "in", size=(32, 32))
    data_files.image_folder(root, split="validation", size=(32, 32))
    for file in (root / "validation/labels").iterdir():
        data_files.save(np.full((32, 32), 255, np.uint8), file)
    prepare.prepare("image_folder/empty", tmp_path / "data", root)
    config = make_config(tmp_path / "data", num_steps=2, best_metric="miou")
    config.data.dataset = "image_folder/empty"
    results = train.train_and_evaluate(config, tmp_path / "run")
    assert np.isnan(results.scalars["plain/miou"])
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        strict(line)
    strict((tmp_path / "run/evaluation/2/results.json").read_text())
    assert np.isnan(evaluate.last_results(tmp_path / "run").scalars["plain/miou"])
    assert run_summary.main([str(tmp_path / "run"), str(tmp_path / "record.json")]) == 0
    assert strict((tmp_path / "record.json").read_text())["results"]["plain/miou"] is None
    config.data.train_split = "validation"
    with pytest.raises(UserError, match="has not one labelled pixel"):
        train.train_and_evaluate(config, tmp_path / "other")
