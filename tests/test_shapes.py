"""shapes: the same everywhere, hard in the intended ways."""

import hashlib

import cv2
import numpy as np
import pytest

from dilaff_jax.data import data_config, datasets, prepare, shapes
from dilaff_jax.data.shapes import BAR, CHECKS, CLASSES, DISC, DOTS, POLYGON, RING, STRIPES

HARD, EASY = (100, 0), (shapes.OBJECT_SCALE, shapes.TINT)


def drawn(index, size=128, seed=0, options=HARD):
    return shapes.draw(np.random.Generator(np.random.PCG64([seed, 0, index])), size, *options)


@pytest.fixture(scope="module")
def examples():
    return [drawn(i) for i in range(40)]


@pytest.mark.parametrize(
    ("options", "digest"),
    [(HARD, "7e223c49621ac405"), (EASY, "dc906b8eeb8b251e")],
    ids=["hard", "default"],
)
def test_the_images_are_the_same_on_every_machine(options, digest):
    found = hashlib.sha256()
    for i in range(30):
        for array in drawn(i, options=options):
            found.update(array.tobytes())
    # Found with NumPy 2.0 and 2.4, OpenCV 4.12 and 5.0.
    assert found.hexdigest()[:16] == digest


def test_by_default_colour_tells_much_and_objects_are_larger():
    small, large = ([drawn(i, options=o)[1] for i in range(40)] for o in (HARD, EASY))
    for index in (BAR, RING, DISC, POLYGON):
        assert sum((x == index).sum() for x in large) > 1.5 * sum((x == index).sum() for x in small)
    assert nearest_mean_recall([drawn(i, options=EASY) for i in range(40)]) > 0.3


def test_every_class_occurs_and_some_pixels_are_ignored(examples):
    counts = sum(np.bincount(label.ravel(), minlength=256) for _, label in examples)
    share = counts / counts.sum()
    assert (share[: len(CLASSES)] > 0.01).all()
    assert share[: len(CLASSES)].max() < 0.7
    assert 0.005 < share[255] < 0.1
    assert counts[len(CLASSES) : 255].sum() == 0


def nearest_mean_recall(examples):
    """Of the nearest class mean in colour, fitted on the pixels it is tested on."""
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in examples]).astype(float)
    label = np.concatenate([label.ravel() for _, label in examples])
    pixels, label = pixels[label < 255], label[label < 255]
    means = np.stack([pixels[label == c].mean(0) for c in range(len(CLASSES))])
    guess = ((pixels[:, None] - means) ** 2).sum(-1).argmin(1)
    return np.mean([(guess[label == c] == c).mean() for c in range(len(CLASSES))])


def test_where_it_is_hard_colour_alone_does_not_tell_the_class(examples):
    assert nearest_mean_recall(examples) < 0.25  # chance: 0.125


def test_textures_have_edges_inside_one_class(examples):
    """Neighbours within a textured class differ by far more than noise."""
    for index in (STRIPES, DOTS, CHECKS):
        steps = []
        for image, label in examples:
            same = (label[:, 1:] == index) & (label[:, :-1] == index)
            steps.append(np.abs(np.diff(image.astype(int), axis=1)).max(-1)[same])
        assert np.quantile(np.concatenate(steps), 0.9) > 25, CLASSES[index]


def test_some_borders_have_little_contrast(examples):
    """Across borders of filled objects, a good part differs no more than noise does."""
    steps = []
    for image, label in examples:
        for index in (DISC, POLYGON):
            cross = ((label[:, 1:] == index) != (label[:, :-1] == index)) & (label[:, 1:] < 255)
            steps.append(np.abs(np.diff(image.astype(int), axis=1)).mean(-1)[cross])
    steps = np.concatenate(steps)
    assert 0.1 < np.mean(steps < 18) < 0.7


def test_bars_and_rings_are_thin(examples):
    for index in (BAR, RING):
        widest = max(
            cv2.distanceTransform((label == index).astype(np.uint8), cv2.DIST_L2, 5).max()
            for _, label in examples
        )
        assert widest <= 5, CLASSES[index]  # crossing lines are wider than one


def test_discs_touch_without_a_class_edge(examples):
    """Some connected region of discs is longer than any single disc, and has edges inside."""
    longest = 0
    for _, label in examples:
        count, _, stats, _ = cv2.connectedComponentsWithStats((label == DISC).astype(np.uint8))
        if count > 1:
            longest = max(longest, stats[1:, cv2.CC_STAT_WIDTH].max())
    assert longest > 2 * 13 + 5


@pytest.mark.parametrize("size", [32, 100, 256])
def test_any_size_can_be_drawn(size):
    for i in range(5):
        image, label = drawn(i, size)
        assert image.shape == (size, size, 3)
        assert label.shape == (size, size)


def test_splits_and_seeds_share_no_image(tmp_path):
    found = {}
    for seed in (0, 1):
        options = shapes.ShapesOptions(size=32, train=6, validation=6, test=6, generator_seed=seed)
        prepare.prepare(f"shapes/s{seed}", tmp_path, options=options)
        data = data_config.default(dataset=f"shapes/s{seed}", data_dir=str(tmp_path))
        for split in ("train", "validation", "test"):
            source = datasets.load(data, split)
            for i in range(len(source)):
                key = source[i]["image"].tobytes()
                assert key not in found, (seed, split, i, found[key])
                found[key] = (seed, split, i)
    assert len(found) == 36


def test_preparing_twice_gives_the_same_records(tmp_path):
    options = shapes.ShapesOptions(size=32, train=5, validation=2, test=2)
    for name in ("one", "two"):
        prepare.prepare("shapes", tmp_path / name, options=options)
    one, two = (
        datasets.load(data_config.default(data_dir=str(tmp_path / name)), "train")
        for name in ("one", "two")
    )
    assert one.names == two.names
    for i in range(5):
        np.testing.assert_array_equal(one[i]["image"], two[i]["image"])
        np.testing.assert_array_equal(one[i]["label"], two[i]["label"])


def test_a_size_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--size=8: want 32 to 2048"):
        prepare.prepare("shapes", tmp_path, options=shapes.ShapesOptions(size=8))
    with pytest.raises(ValueError, match="--tint=101: want 0 to 100"):
        prepare.prepare("shapes", tmp_path, options=shapes.ShapesOptions(tint=101))
