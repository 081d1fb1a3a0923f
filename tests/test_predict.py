"""Prediction on files: folders, videos, broken files, padding, names, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import dilaff_jax
from dilaff_jax import commands, propagate, resize
from dilaff_jax.data import images
from dilaff_jax.data.class_list import Classes
from dilaff_jax.serving import predict_files, predictor, video, writer
from dilaff_jax.serving.network import Network
from tests import data_files, running
from tests import tiny_run as runs


@pytest.fixture(scope="module")
def model(tiny_run):
    return dilaff_jax.load(tiny_run)


def picture(height, width, seed=0):
    """Blobs of colour, so that neighbouring pixels differ here and agree there."""
    coarse = data_files.picture(-(-height // 8), -(-width // 8), seed)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def options(output, **changes):
    return writer.Options(output, **changes)


def labels_at(path):
    return images.decode_label(path.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two sizes, a subfolder, two of one stem, what cannot be read, what is no image."""
    root = tmp_path_factory.mktemp("in")
    data_files.save(picture(40, 48, 1), root / "a.png")
    data_files.save(picture(37, 50, 2), root / "street" / "b.png")
    data_files.save(picture(40, 48, 3), root / "c.png")
    data_files.save(picture(40, 48, 4), root / "c.bmp")
    (root / "broken.jpg").write_bytes(b"\xff\xd8 not at all")
    (root / "empty.png").write_bytes(b"")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def predicted(model, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    asked = options(out, propagation="both", probs=True, edges=True)
    return out, predict_files.predict(model, folder, asked)


def test_a_folder_gives_index_maps_of_the_original_size_under_the_same_names(
    tiny_run, predicted, folder
):
    out, summary = predicted
    assert summary.images == 4
    found = {p.relative_to(out / "labels").as_posix() for p in (out / "labels").rglob("*.*")}
    assert found == {"a.png", "street/b.png", "c.png.png", "c.bmp.png"}
    for name, file in {"a": "a.png", "street/b": "street/b.png", "c.bmp": "c.bmp"}.items():
        image = np.asarray(Image.open(folder / file).convert("RGB"))
        labels, plain, probs = runs.expected(tiny_run, image)
        np.testing.assert_array_equal(labels_at(out / "labels" / f"{name}.png"), labels)
        np.testing.assert_array_equal(labels_at(out / "labels_plain" / f"{name}.png"), plain)
        with np.load(out / "probs" / f"{name}.npz") as stored:
            np.testing.assert_allclose(stored["probs"], probs, atol=1e-3)
            assert tuple(stored["class_names"]) == runs.NAMES
        assert cv2.imread(str(out / "overlays" / f"{name}.png")).shape == image.shape
        assert cv2.imread(str(out / "edges" / f"{name}.png")).shape[1] == 2 * image.shape[1]
    assert (labels != plain).any()


def test_files_that_cannot_be_read_are_listed_with_the_reason(predicted, folder):
    _, summary = predicted
    assert {p.name for p in summary.failed} == {"broken.jpg", "empty.png", "gone.png"}
    text = str(summary)
    assert "4 images segmented" in text
    assert "3 files failed" in text
    assert "empty (0 bytes)" in text
    assert str(folder / "gone.png") in text


def test_what_the_indices_mean_is_written_beside_them(predicted):
    out, _ = predicted
    assert json.loads((out / "classes.json").read_text())["names"] == list(runs.NAMES)
    legend = cv2.imread(str(out / "legend.png"))[..., ::-1]
    for color in runs.COLORS:
        assert (legend == color).all(axis=-1).any()


def test_exif_rotation_is_applied(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = data_files.save(picture(48, 40, 1), tmp_path / "phone.png", exif=exif)
    predict_files.predict(model, source, options(tmp_path / "out"))
    upright = np.rot90(picture(48, 40, 1), -1)
    found = labels_at(tmp_path / "out" / "labels" / "phone.png")
    np.testing.assert_array_equal(found, model(np.ascontiguousarray(upright)).labels)


# Sizes.


def test_propagation_does_not_see_the_padding(tiny_run):
    padded = dilaff_jax.load(tiny_run, pad=32)
    raw = padded.infer(picture(40, 48))
    assert raw.geometry.canvas == (64, 64)
    rows, columns = raw.geometry.cells(raw.affinity_logits.shape[1:3])
    assert (rows, columns) == (10, 12)
    disturbed = raw.affinity_logits.at[:, rows:].set(1e3).at[:, :, columns:].set(-1e3)
    changed = padded.correction(raw._replace(affinity_logits=disturbed))
    np.testing.assert_array_equal(padded.correction(raw), changed)


def test_padding_changes_nothing_beyond_the_reach_of_the_network(model, tiny_run):
    """The reach: 15 pixels of 3 strided convolutions, 8 of the head's, and 8 of enlarging."""
    image = picture(72, 72)
    exact, padded = (
        model(image, refine=False),
        dilaff_jax.load(tiny_run, pad=32)(image, refine=False),
    )
    np.testing.assert_allclose(exact.probs[:40, :40], padded.probs[:40, :40], atol=1e-5)
    assert padded.labels.shape == (72, 72)
    assert padded.affinity.shape == exact.affinity.shape


@pytest.mark.parametrize("size", [(1, 1), (3, 33)])
def test_images_of_any_size_are_segmented(model, size):
    result = model(picture(*size))
    assert result.labels.shape == size
    assert np.isfinite(result.probs).all()


def test_images_are_scaled_as_in_training_and_labels_come_back_in_full_size(tiny_run, model):
    image = data_files.picture(80, 95)
    half = cv2.resize(image, (48, 40), interpolation=cv2.INTER_AREA)
    _, _, probs = runs.expected(tiny_run, half)
    found = dilaff_jax.load(tiny_run, resize=0.5)(image)
    wanted = np.argmax(resize.bilinear(jnp.log(probs)[None], (80, 95)), -1)[0]
    assert np.mean(found.labels != wanted) < 1e-3


def test_only_the_last_programs_are_kept(monkeypatch):
    compiled = []
    compile_it = jax.stages.Lowered.compile

    def spy(lowered, *args):
        compiled.append(lowered.in_avals[0][1].shape[1])
        return compile_it(lowered, *args)

    monkeypatch.setattr(jax.stages.Lowered, "compile", spy)
    colours = Classes(("red", "green", "blue"), np.eye(3, dtype=np.uint8) * 255)

    def apply(_, images):
        return images[:, ::4, ::4] / 32.0, None

    model = predictor.Predictor(Network(apply, (), None, colours, {"name": "identity"}))
    sizes = [8 + n for n in range(predictor.PROGRAMS + 1)]
    for size in (*sizes, sizes[-1], sizes[1]):
        model.infer(np.zeros((size, 8, 3), np.uint8))
    assert compiled == sizes
    model.infer(np.zeros((sizes[0], 8, 3), np.uint8))
    assert compiled == [*sizes, sizes[0]]


def test_a_list_of_images_gives_a_list_of_results(tiny_run):
    model = dilaff_jax.load(tiny_run)
    pictures = [data_files.picture(40, 48, seed) for seed in range(2)]
    one, other = model(pictures)
    np.testing.assert_array_equal(one.labels, model(pictures[0]).labels)
    np.testing.assert_array_equal(other.probs, model(pictures[1]).probs)
    assert model(()) == []


# Videos.


def film(path, frames=7, size=(40, 48)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, size[::-1])
    for i in range(frames):
        writer.write(np.roll(picture(*size), 2 * i, axis=1))
    writer.release()
    return path


def test_a_video_gives_an_index_map_a_frame_and_an_overlay_video(model, tmp_path):
    (tmp_path / "in").mkdir()
    film(tmp_path / "in" / "clip.avi")
    summary = predict_files.predict(model, tmp_path / "in", options(tmp_path / "out"))
    assert summary.images == 7
    files = sorted((tmp_path / "out" / "labels" / "clip").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(7)]
    frames = list(video.Video(tmp_path / "in" / "clip.avi"))
    for file, frame in zip(files, frames, strict=True):
        np.testing.assert_array_equal(labels_at(file), model(frame).labels)
    shown = video.Video(tmp_path / "out" / "overlays" / "clip.mp4")
    assert shown.rate == 12
    pictures = list(shown)
    assert len(pictures) == 7
    drawn = model(frames[3]).overlay()
    assert np.abs(pictures[3].astype(int) - drawn).mean() < 12  # lossy


def test_results_never_overwrite_one_another(model, tmp_path):
    """Frames of clip.avi go to clip/000000.png, which is the name of an image here."""
    film(tmp_path / "clip.avi")
    for name in ("clip/000000.png", "a.png", "a.jpg", "a.jpg.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), picture(16, 16))
    (tmp_path / "notes.txt").write_text("no image")
    summary = predict_files.predict(model, tmp_path, options(tmp_path / "out"))
    assert summary.images == 7 + 4
    labels = tmp_path / "out" / "labels"
    found = {p.relative_to(labels).as_posix() for p in labels.rglob("*.png")}
    frames = {f"clip.avi/{i:06d}.png" for i in range(7)}
    assert found == frames | {"clip/000000.png", "a.png.png", "a.jpg.png", "a.jpg.png.png"}
    assert labels_at(labels / "clip/000000.png").shape == (16, 16)
    assert "no image or video, not used: 1 file (notes.txt)" in str(summary)


def test_a_video_that_breaks_off_is_a_failure_and_what_there_is_stays(model, tmp_path):
    (tmp_path / "in").mkdir()
    whole = film(tmp_path / "in" / "clip.avi")
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 2 // 3])
    summary = predict_files.predict(model, tmp_path / "in", options(tmp_path / "out"))
    assert 0 < summary.images < 7
    assert f"only {summary.images} of 7 frames can be decoded" in str(summary)
    assert len(list((tmp_path / "out/labels/clip").iterdir())) == summary.images


@pytest.mark.parametrize(
    "error", [MemoryError("no"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_an_image_too_large_for_memory_is_named_and_stops_nothing(
    error, model, tmp_path, monkeypatch
):
    for name, size in (("large", (30, 50)), ("small", (16, 16))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture(*size))
    call = type(model).__call__

    def limited(self, image, **kwargs):
        if image.name == "large.png":
            raise error
        return call(self, image, **kwargs)

    monkeypatch.setattr(type(model), "__call__", limited)
    summary = predict_files.predict(model, tmp_path, options(tmp_path / "out"))
    assert summary.images == 1
    [(path, reason)] = summary.failed.items()
    assert path.name == "large.png"
    assert "an image of 30 x 50 pixels does not fit into memory; --resize=0.5" in reason


def test_a_clip_in_chunks_is_refined_as_the_whole_clip(tiny_run):
    model = dilaff_jax.load(tiny_run, refine={"name": "signed", "steps": 1})
    frames = [np.roll(picture(32, 32), 3 * i, axis=1) for i in range(6)]
    whole = [r.probs for r in video.propagate_in_time(model, iter(frames), chunk=100)]
    parts = [r.probs for r in video.propagate_in_time(model, iter(frames), chunk=2)]
    assert len(parts) == len(whole) == 6
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    single = np.stack([model(f).probs for f in frames])
    assert np.abs(np.stack(whole) - single).max() > 1e-3


def test_time_joins_cells_of_one_colour_and_no_others():
    colors = np.zeros((2, 3, 4, 3), np.float32)
    colors[1, :, 2:] = 100
    offsets = video.between_frames()
    forward = [tuple(o) for o in offsets.tolist()].index((1, 0, 0))
    assert len(offsets) == 18
    walk = video.cross_logits(colors, offsets, {"name": "random_walk"})[0, 1, :, forward]
    np.testing.assert_allclose(1 / (1 + np.exp(-walk)), [0.9, 0.9, 0, 0], atol=1e-5)
    signed = video.cross_logits(colors, offsets, {"name": "signed"})[0, 1, :, forward]
    np.testing.assert_allclose(signed, [np.log(9), np.log(9), 0, 0], atol=1e-5)


def test_without_colour_in_common_time_changes_nothing(tiny_run):
    """Every frame then is refined on its own, as images are."""
    model = dilaff_jax.load(tiny_run, refine={"name": "signed", "steps": 1, "bias": -0.5})
    frames = [np.full((32, 32, 3), 50 * i, np.uint8) for i in range(6)]
    together = list(video.propagate_in_time(model, iter(frames)))
    for result, frame in zip(together, frames, strict=True):
        np.testing.assert_allclose(result.probs, model(frame).probs, atol=1e-5)


# What is refused.


def test_nothing_is_written_where_inputs_lie(model, tmp_path):
    source = data_files.save(picture(40, 48), tmp_path / "labels" / "a.png")
    before = source.read_bytes()
    with pytest.raises(ValueError, match="where output goes; give another folder"):
        predict_files.predict(model, tmp_path / "labels", options(tmp_path))
    with pytest.raises(ValueError, match="input and output are both"):
        predict_files.predict(model, tmp_path, options(tmp_path))
    assert source.read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*")] == ["labels", "a.png"]


def test_the_output_folder_inside_the_input_is_not_taken_for_input(model, tmp_path):
    data_files.save(picture(40, 48), tmp_path / "a.png")
    for _ in range(2):
        assert predict_files.predict(model, tmp_path, options(tmp_path / "out")).images == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propagation": "with"}, "propagation was asked for, but this model has no affinity head"),
        ({"edges": True}, "edges was asked for, but"),
        ({"temporal": True}, "temporal was asked for, but"),
    ],
)
def test_a_model_without_affinities_refuses_what_needs_them(
    tiny_plain_run, folder, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        predict_files.predict(dilaff_jax.load(tiny_plain_run), folder, options(tmp_path, **changes))


def test_temporal_propagation_without_a_video_or_without_propagation_is_refused(
    model, folder, tmp_path
):
    with pytest.raises(ValueError, match="holds no video"):
        predict_files.predict(model, folder, options(tmp_path, temporal=True))
    with pytest.raises(ValueError, match="propagation='without'"):
        predict_files.predict(
            model, folder, options(tmp_path, temporal=True, propagation="without")
        )


def test_an_input_that_is_not_there_or_empty_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give an image"):
        predict_files.predict(model, tmp_path / "no", options(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds no image or video; known are"):
        predict_files.predict(model, tmp_path, options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# The command.


def command(workdir, **values):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**{k: str(v) if k != "overlays" else v for k, v in values.items()}):
        commands.MODES["predict"](None, workdir)


def test_the_command_says_what_it_did_and_fails_if_nothing_could_be_read(
    tiny_run, folder, tmp_path, capsys
):
    command(tiny_run, input=folder / "a.png", output=tmp_path / "out", overlays=False)
    assert "1 images segmented" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "classes.json",
        "labels",
        "legend.png",
    ]
    shutil.copy(folder / "broken.jpg", tmp_path / "broken.mp4")
    for broken in (folder / "broken.jpg", tmp_path / "broken.mp4"):
        with pytest.raises(SystemExit) as stop:
            command(tiny_run, input=broken, output=tmp_path / "none")
        assert stop.value.code == 1
        assert f"{broken}: not " in capsys.readouterr().out


def test_a_prediction_says_nothing_but_its_progress_and_result(tiny_run, folder, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dilaff_jax.main", "--mode=predict", f"--workdir={tiny_run}",
         f"--input={folder / 'a.png'}", f"--output={tmp_path / 'out'}"],
        cwd=running.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1 images segmented"
    assert [line for line in re.split(r"[\r\n]+", result.stderr) if line and "%|" not in line] == []


def test_the_command_needs_a_model_an_input_and_an_output(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="needs --input and --output"):
        command(tiny_run, input=tmp_path)
    with pytest.raises(ValueError, match="either --workdir, a run, or --model"):
        command(commands.pathlib.Path(), input=tmp_path, output=tmp_path / "out")


def test_the_correction_of_the_method_is_the_one_of_refine_logits(tiny_run):
    """`Predictor` takes `refine_logits` apart; together the parts are the whole."""
    model, image = dilaff_jax.load(tiny_run), picture(37, 50)
    raw = model.infer(image)
    labels, probs = propagate.refine_logits(
        raw.logits, raw.affinity_logits, model.network.offsets, (37, 50), model.operator
    )
    result = model(image)
    np.testing.assert_array_equal(result.labels, labels[0])
    np.testing.assert_allclose(result.probs, probs[0], atol=1e-6)
