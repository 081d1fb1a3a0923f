"""Augmentation: image and label stay one, against markers and plain loops."""

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dilaff_jax.data import augment, data_config
from dilaff_jax.data.augment import Augmentation, Crop
from tests.data_files import classes_map, picture

BLOCK = 16


def marked(height=200, width=240):
    """An image whose red is the column and green the row, and labels of 16 × 16 blocks by both.

    So a label can be told from the colours of its pixel, wherever it is moved to. Block 17 is
    ignored.
    """
    rows, columns = np.indices((height, width))
    image = np.stack([columns, rows, np.full_like(rows, 9)], -1).astype(np.uint8)
    return image, label_of(rows, columns)


def label_of(rows, columns):
    number = (rows // BLOCK) * 15 + columns // BLOCK
    return np.where(number == 17, 255, number % 200).astype(np.uint8)


def check_alignment(image, label, valid):
    """Labels agree with colours everywhere but within a pixel of block borders."""
    columns, rows = image[..., 0].astype(float), image[..., 1].astype(float)
    inner = np.ones(label.shape, bool)
    for values in (rows, columns):
        inside = values % BLOCK
        inner &= (inside >= 1) & (inside <= BLOCK - 2)
    inner[valid[0] :] = False
    inner[:, valid[1] :] = False
    want = label_of(rows.astype(int), columns.astype(int))
    assert inner.mean() > 0.1 * (valid[0] * valid[1]) / label.size
    np.testing.assert_array_equal(label[inner], want[inner])


def augmentation(**changes):
    settings = {
        "crop_size": (160, 176),
        "scale_range": (0.5, 2.0),
        "cat_max_ratio": 0.75,
        "flip": 0.5,
    }
    return Augmentation(**settings | changes)


@pytest.mark.parametrize("seed", range(40))
def test_labels_stay_where_their_pixels_go(seed):
    image, label = marked()
    make = augmentation()
    window = make.choose(label, np.random.default_rng(seed))
    image, label = make(image, label, np.random.default_rng(seed))
    assert image.shape == (160, 176, 3)
    assert label.shape == (160, 176)
    check_alignment(image, label, (window.out_height, window.out_width))


@pytest.mark.parametrize("scale", [0.5, 0.61, 1.0, 1.37, 2.0])
def test_the_scale_drawn_is_the_scale_seen(scale):
    image, label = marked()
    make = augmentation(scale_range=(scale, scale), flip=0.0, crop_size=(90, 100))
    image, _ = make(image, label, np.random.default_rng(0))
    step = (image[45, 90, 0] - float(image[45, 10, 0])) / 80
    assert step == pytest.approx(1 / scale, abs=0.03)


def test_base_size_scales_by_the_shorter_side():
    image, label = marked(100, 200)
    make = augmentation(base_size=50, scale_range=(1, 1), flip=0.0, crop_size=(50, 100))
    image, _ = make(image, label, np.random.default_rng(0))
    assert float(image[25, 90, 0]) - float(image[25, 10, 0]) == pytest.approx(160, abs=2)


def test_flips_happen_half_of_the_time_and_mirror_both():
    image, label = marked()
    make = augmentation(scale_range=(1, 1), crop_size=label.shape, cat_max_ratio=1.0)
    flipped = 0
    for seed in range(200):
        out, out_label = make(image, label, np.random.default_rng(seed))
        if out[0, 0, 0] != 0:
            flipped += 1
            np.testing.assert_array_equal(out, image[:, ::-1])
            np.testing.assert_array_equal(out_label, label[:, ::-1])
        else:
            np.testing.assert_array_equal(out, image)
    assert 75 <= flipped <= 125


def test_padding_is_the_mean_and_ignored():
    image, label = picture(20, 30), classes_map(20, 30)
    make = Augmentation((40, 50), pad_rgb=(1, 2, 3), photometric=True)
    for seed in range(10):
        out, out_label = make(image, label, np.random.default_rng(seed))
        assert (out[20:] == (1, 2, 3)).all()
        assert (out[:, 30:] == (1, 2, 3)).all()
        assert (out_label[20:] == 255).all()
        assert (out_label[:, 30:] == 255).all()
        np.testing.assert_array_equal(out_label[:20, :30], label)


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_never_blended(seed):
    label = np.random.default_rng(seed).choice([0, 100, 255], (60, 70)).astype(np.uint8)
    _, out = augmentation(crop_size=(80, 90))(picture(60, 70), label, np.random.default_rng(seed))
    assert set(np.unique(out)) <= {0, 100, 255}


def test_ignored_stays_ignored():
    label = np.full((60, 70), 255, np.uint8)
    for seed in range(20):
        make = augmentation(crop_size=(80, 90), photometric=True)
        _, out = make(picture(60, 70), label, np.random.default_rng(seed))
        assert (out == 255).all()


def test_photometric_changes_the_image_only():
    image, label = picture(60, 70), classes_map(60, 70)
    changed = 0
    for seed in range(20):
        plain = augmentation()(image, label, np.random.default_rng(seed))
        other = augmentation(photometric=True)(image, label, np.random.default_rng(seed))
        np.testing.assert_array_equal(plain[1], other[1])
        changed += (plain[0] != other[0]).any()
    assert changed >= 15


def test_inputs_are_not_changed_and_the_result_is_repeatable():
    image, label = picture(60, 70), classes_map(60, 70)
    image.setflags(write=False)
    label.setflags(write=False)
    make = augmentation(photometric=True)
    first, second = (make(image, label, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_crops_of_one_class_are_avoided():
    label = np.zeros((100, 100), np.uint8)
    label[:, 80:] = 1

    def shares(ratio):
        make = augmentation(crop_size=(30, 30), scale_range=(1, 1), cat_max_ratio=ratio)
        for seed in range(100):
            crop = make(picture(100, 100), label, np.random.default_rng(seed))[1]
            yield np.bincount(crop.ravel()).max() / crop.size

    assert np.mean([s > 0.75 for s in shares(1.0)]) > 0.7
    assert np.mean([s > 0.75 for s in shares(0.75)]) < 0.2


def test_ignored_pixels_do_not_count_as_a_class():
    label = np.full((40, 40), 255, np.uint8)
    label[:2], label[2:4] = 0, 1
    assert augment.largest_share(label, Crop(0, 0, 40, 40, 40, 40)) == 0.5
    assert augment.largest_share(label, Crop(10, 0, 30, 40, 30, 40)) == 1.0


@hypothesis.given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    scale=st.floats(0.05, 8),
    seed=st.integers(0, 99),
)
def test_any_size_gives_a_full_crop(size, crop, scale, seed):
    make = Augmentation(crop, (scale, scale), cat_max_ratio=0.75, flip=0.5, photometric=True)
    label = np.random.default_rng(seed).integers(0, 3, size).astype(np.uint8)
    image, label = make(picture(*size), label, np.random.default_rng(seed))
    assert image.shape == (*crop, 3)
    assert label.shape == crop
    assert (image.dtype, label.dtype) == (np.uint8, np.uint8)


@hypothesis.given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    scale=st.floats(0.05, 8),
)
def test_windows_lie_in_the_image_and_keep_the_scale(size, crop, scale):
    window = augment.random_crop(size, crop, scale, np.random.default_rng(0))
    for start, part, out, length, target in zip(
        window[:2], window[2:4], window[4:], size, crop, strict=True
    ):
        assert start >= 0
        assert 1 <= part <= length - start
        assert 1 <= out <= target
        assert abs(out / scale - part) <= max(1, 1 / scale)


def bilinear_loop(image, out_height, out_width):
    """Bilinear, half-pixel centres, edges repeated: one pixel at a time."""
    height, width = image.shape[:2]
    out = np.zeros((out_height, out_width, 3))
    for i in range(out_height):
        for j in range(out_width):
            y = np.clip((i + 0.5) * height / out_height - 0.5, 0, height - 1)
            x = np.clip((j + 0.5) * width / out_width - 0.5, 0, width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - x + x0) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - x + x0) + image[y1, x1] * (x - x0)
            out[i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return out


# Sizes without ties, in which a centre falls between two source pixels.
@pytest.mark.parametrize("out", [(32, 40), (8, 4), (16, 18)])
def test_cut_is_bilinear_and_nearest_with_the_same_centres(out):
    image, label = picture(20, 30), classes_map(20, 30)
    window = Crop(3, 5, 12, 18, *out)
    got, got_label = augment.cut(image, label, window)
    part, part_label = image[3:15, 5:23], label[3:15, 5:23]
    np.testing.assert_allclose(got, bilinear_loop(part.astype(float), *out), atol=1.01)
    rows = ((np.arange(out[0]) + 0.5) * 12 / out[0]).astype(int)
    columns = ((np.arange(out[1]) + 0.5) * 18 / out[1]).astype(int)
    np.testing.assert_array_equal(got_label, part_label[np.ix_(rows, columns)])


def photometric_reference(image, rng):
    """mmsegmentation's steps one after the other, in floating point, with the same draws."""
    use = rng.random(5) < 0.5
    delta, contrast, saturation = rng.uniform([-32, 0.5, 0.5], [32, 1.5, 1.5])
    hue = int(rng.integers(-18, 19))

    def convert(pixels, alpha=1.0, beta=0.0):
        return np.clip(np.rint(pixels.astype(np.float32) * alpha + beta), 0, 255).astype(np.uint8)

    if use[0]:
        image = convert(image, beta=delta)
    if use[4] and use[1]:
        image = convert(image, alpha=contrast)
    if use[2] or use[3]:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if use[2]:
            hsv[..., 1] = convert(hsv[..., 1], alpha=saturation)
        if use[3]:
            hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not use[4] and use[1]:
        image = convert(image, alpha=contrast)
    return image


@pytest.mark.parametrize("seed", range(30))
def test_photometric_equals_its_steps_done_one_by_one(seed):
    image = picture(40, 50, seed)
    got = augment.photometric(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(got, photometric_reference(image, np.random.default_rng(seed)))


def test_from_config_takes_lists_too():
    data = data_config.default(crop_size=[64, 96], scale_range=[0.5, 1.5], pad_rgb=[1, 2, 3])
    make = Augmentation.from_config(data)
    assert make.crop_size == (64, 96)
    assert make.pad_rgb == (1, 2, 3)
