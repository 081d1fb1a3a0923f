"""`--mode refine`: files of any form in, what the method says of them out; and what is refused."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import dilaff_jax
from dilaff_jax import commands
from dilaff_jax.data import images
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.serving import foreign_files, refine_files, writer
from tests import data_files, tiny_run

C = len(tiny_run.NAMES)
NAMES = ("a", "street/b", "street/c")
SIZES = {"a": (40, 48), "street/b": (37, 50), "street/c": (40, 48)}


def picture(size, seed):
    coarse = data_files.picture(-(-size[0] // 8), -(-size[1] // 8), seed)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]


def logits_of(name, stride=4, classes=C):
    rng = np.random.default_rng(len(name))
    rows, columns = (-(-n // stride) for n in SIZES[name])
    return rng.normal(0, 3, (rows, columns, classes)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_run):
    return dilaff_jax.load(tiny_run)


@pytest.fixture
def folders(tmp_path):
    """Images, results and truth of three images in two folders."""
    for seed, name in enumerate(NAMES):
        data_files.save(picture(SIZES[name], seed), tmp_path / "images" / f"{name}.jpg")
        save(logits_of(name), tmp_path / "results" / f"{name}.npy")
        truth = np.random.default_rng(seed).integers(0, C, SIZES[name]).astype(np.uint8)
        truth[:3] = 255
        data_files.save(truth, tmp_path / "truth" / f"{name}.png")
    return tmp_path


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def run(model, folders, results="results", truth=None, output="out", **form):
    return refine_files.refine(
        model,
        folders / "images",
        folders / results,
        writer.Options(folders / output, propagation="both", probs=True),
        foreign_files.Form(**form),
        truth and folders / truth,
    )


def labels_at(path):
    return images.decode_label(path.read_bytes())


def assert_same_labels(folders, one="out", other="other"):
    for name in NAMES:
        first, second = (labels_at(folders / o / "labels" / f"{name}.png") for o in (one, other))
        np.testing.assert_array_equal(first, second)


def test_files_are_refined_as_arrays_are(model, folders):
    summary = run(model, folders)
    changed = 0
    for name in NAMES:
        image = images.decode_image((folders / "images" / f"{name}.jpg").read_bytes())
        wanted = model.refine(image, logits_of(name))
        found = labels_at(folders / "out" / "labels" / f"{name}.png")
        np.testing.assert_array_equal(found, wanted.labels)
        plain = labels_at(folders / "out" / "labels_plain" / f"{name}.png")
        np.testing.assert_array_equal(plain, wanted.plain)
        with np.load(folders / "out" / "probs" / f"{name}.npz") as file:
            np.testing.assert_allclose(file["probs"], wanted.probs, atol=1e-3)
        changed += (found != plain).sum()
    assert summary.changed == changed > 0
    assert summary.pixels == sum(h * w for h, w in SIZES.values())
    assert f"3 images refined; {changed / summary.pixels:.2%} of" in str(summary)


def test_every_layout_and_form_gives_the_same(model, folders):
    run(model, folders, output="other")
    forms = {
        "chw": lambda name, x: np.moveaxis(x, -1, 0),
        "batch": lambda name, x: np.moveaxis(x, -1, 0)[None],
        "probs": lambda name, x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
        "double": lambda name, x: x.astype(np.float64),
    }
    for form, change in forms.items():
        for name in NAMES:
            save(change(name, logits_of(name)), folders / form / f"{name}.npy")
        run(model, folders, form)
        assert_same_labels(folders)
    for name in NAMES:
        path = folders / "npz" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, logits=logits_of(name), names=np.array(["x"]))
    run(model, folders, "npz")
    assert_same_labels(folders)


def test_what_prediction_wrote_goes_in(model, folders):
    """The probabilities of `--mode predict --probs`, in half precision with their class names."""
    from dilaff_jax.serving import predict_files

    options = writer.Options(folders / "predicted", propagation="without", probs=True)
    predict_files.predict(model, folders / "images", options)
    summary = run(model, folders, "predicted/probs")
    options = writer.Options(folders / "other", propagation="with")
    predict_files.predict(model, folders / "images", options)
    assert summary.images == 3
    differing = [
        np.mean(
            labels_at(folders / "out/labels" / f"{n}.png")
            != labels_at(folders / "other/labels" / f"{n}.png")
        )
        for n in NAMES
    ]
    assert max(differing) < 0.05  # they were at full size, in half precision


def test_label_maps_become_probabilities_as_sure_as_they_are_said_to_be(model, folders):
    rng = np.random.default_rng(0)
    for name in NAMES:
        labels = rng.integers(0, C, SIZES[name]).astype(np.uint8)
        labels[:, :2] = 255
        data_files.save_palette(labels, folders / "maps" / f"{name}.png")
    with pytest.raises(
        DataError, match=r"a\.png: a label map says nothing of how sure it is; give"
    ):
        run(model, folders, "maps")
    run(model, folders, "maps", confidence=0.8)
    image = images.decode_image((folders / "images" / "a.jpg").read_bytes())
    labels = images.load_label(folders / "maps" / "a.png")
    probs = np.where(np.arange(C) == labels[..., None], 0.8, 0.1)
    probs[:, :2] = 1 / C
    wanted = model.refine(image, np.log(probs).astype(np.float32))
    np.testing.assert_array_equal(labels_at(folders / "out" / "labels" / "a.png"), wanted.labels)
    run(model, folders, "maps", output="sure", confidence=0.999999)
    sure = labels_at(folders / "sure" / "labels" / "a.png")[:, 2:]
    kept = [(x == labels[:, 2:]).mean() for x in (sure, wanted.labels[:, 2:])]
    assert kept[0] > kept[1]


def test_figures_before_and_after_are_those_of_the_metrics(model, folders):
    summary = run(model, folders, truth="truth")
    for variant, folder in (("before", "labels_plain"), ("after", "labels")):
        confusion = np.zeros((C, C), np.int64)
        for name in NAMES:
            truth = images.load_label(folders / "truth" / f"{name}.png")
            found = labels_at(folders / "out" / folder / f"{name}.png")
            for t, p in zip(truth[truth != 255], found[truth != 255], strict=True):
                confusion[t, p] += 1
        hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
        assert summary.figures[variant]["miou"] == pytest.approx((hits / union).mean())
        assert {"boundary_f", "boundary_iou", "trimap_miou/1"} <= summary.figures[variant].keys()
    content = json.loads((folders / "out" / "refinement.json").read_text())
    assert content["figures"] == summary.figures
    assert content["operator"]["name"] == "signed"
    assert content["provenance"]["versions"]["jax"] == jax.__version__
    assert content["transitions"].keys() == summary.transitions.keys()
    assert "boundary F" in str(summary)


def test_aligned_corners_are_an_option(model, folders):
    run(model, folders, align_corners=True)
    image = images.decode_image((folders / "images" / "street/b.jpg").read_bytes())
    wanted = model.refine(image, logits_of("street/b"), align_corners=True)
    found = labels_at(folders / "out" / "labels" / "street/b.png")
    np.testing.assert_array_equal(found, wanted.labels)


def broken(folders, kind):
    """Makes one thing wrong with the results."""
    path = folders / "results" / "street" / "b.npy"
    good = logits_of("street/b")
    match kind:
        case "missing":
            path.unlink()
        case "extra":
            save(good, folders / "results" / "street" / "d.npy")
        case "twice":
            save(good, folders / "results" / "street" / "b.npz.npy")
            (folders / "results/street/b.npz.npy").rename(folders / "results/street/b.npz")
        case "damaged":
            path.write_bytes(path.read_bytes()[:100])
        case "pickled":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "integers":
            save(good.astype(np.int32), path)
        case "nan":
            good[0, 0, 0] = np.nan
            save(good, path)
        case "never":
            good[2, 2] = -np.inf
            save(good, path)
        case "classes":
            save(logits_of("street/b", classes=C + 2), path)
        case "ambiguous":
            save(np.zeros((C, 4, C), np.float32), path)
        case "other image":
            save(np.zeros((20, 10, C), np.float32), path)
        case "too large":
            save(np.zeros((74, 100, C), np.float32), path)
        case "several":
            path.unlink()
            np.savez(path.with_suffix(".npz"), x=good, y=good)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 file \(street/b\) without a result in .*results"),
        ("extra", r"1 file \(street/d\) without an image, in .*results"),
        ("twice", r"b\.npy and .*b\.npz are of one image"),
        ("damaged", r"b\.npy: no array that NumPy reads"),
        ("pickled", r"b\.npy: no array that NumPy reads without unpickling"),
        ("integers", r"b\.npy: shape \(10, 13, 3\), int32; expected floating point"),
        ("nan", r"b\.npy: holds NaN"),
        ("never", r"b\.npy: at some pixel all classes are -infinity"),
        ("classes", r"b\.npy: shape \(10, 13, 5\), for 3 classes: give --layout=hwc"),
        ("ambiguous", r"b\.npy: shape \(3, 4, 3\), for 3 classes: give --layout=hwc"),
        ("other image", r"b\.npy: 20 x 10 values for an image of 37 x 50 pixels"),
        ("too large", r"b\.npy: 74 x 100 values for an image of 37 x 50 pixels"),
        ("several", r"b\.npz: holds the arrays x, y; keep one"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, message, model, folders):
    broken(folders, kind)
    with pytest.raises(ValueError, match=message):
        run(model, folders)


def test_bad_truth_is_refused_by_name(model, folders):
    data_files.save(np.zeros((5, 5), np.uint8), folders / "truth" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: 5 x 5 pixels; its image has 40 x 48"):
        run(model, folders, truth="truth")
    data_files.save(np.full(SIZES["a"], 7, np.uint8), folders / "truth" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: labels hold 7 .* classes 0 to 2"):
        run(model, folders, truth="truth")
    (folders / "truth" / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 file \(a\) without a label map in"):
        run(model, folders, truth="truth")


def test_a_label_map_with_other_classes_is_refused_by_name(model, folders):
    for name in NAMES:
        data_files.save(np.full(SIZES[name], C, np.uint8), folders / "maps" / f"{name}.png")
    with pytest.raises(DataError, match=r"a\.png: labels hold 3 at 1920 pixels; .* 0 to 2"):
        run(model, folders, "maps", confidence=0.8)


def test_a_name_may_hold_what_looks_like_a_suffix(model, folders):
    """As exports of tools call them: frame.jpg.png is the image, frame.jpg.npy its result."""
    for suffix, folder in ((".jpg", "images"), (".npy", "results")):
        (folders / folder / f"a{suffix}").rename(folders / folder / f"a.jpg{suffix}")
    run(model, folders)
    assert (folders / "out" / "labels" / "a.jpg.png").exists()


def test_two_images_of_one_name_are_refused(model, folders):
    data_files.save(picture((40, 48), 9), folders / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.(jpg|png) and .*a\.(jpg|png) have one name"):
        run(model, folders)


def test_results_are_not_overwritten(model, folders):
    (folders / "out").mkdir()
    (folders / "results").rename(folders / "out" / "labels")
    with pytest.raises(UserError, match="where output goes"):
        run(model, folders, "out/labels")
    with pytest.raises(UserError, match="expected a probability above 0 and below 1"):
        foreign_files.Form(confidence=1.0)


def test_the_command_refines_and_says_what_it_needs(tiny_run, folders, capsys):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(input=str(folders / "images"), output=str(folders / "out")):
        with pytest.raises(UserError, match="needs --input, --logits and --output"):
            commands.refine(None, tiny_run)
        with flagsaver.flagsaver(logits=str(folders / "results"), truth=str(folders / "truth")):
            commands.refine(None, tiny_run)
    shown = capsys.readouterr().out
    assert "3 images refined" in shown
    assert "mean IoU" in shown
    one = {"input": str(folders / "images" / "a.jpg"), "logits": str(folders / "results/a.npy")}
    with flagsaver.flagsaver(output=str(folders / "one"), **one):
        commands.refine(None, tiny_run)
    assert (folders / "one" / "labels" / "a.png").exists()


def test_identity_changes_nothing(tiny_run, folders):
    summary = run(dilaff_jax.load(tiny_run, refine={"name": "identity"}), folders, truth="truth")
    assert summary.changed == 0
    assert summary.figures["before"] == summary.figures["after"]
