"""Strangers' image files: every pixel format, and every way of being broken."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from dilaff_jax.data import datasets, image_folder, images, prepare
from dilaff_jax.data.data_config import default
from dilaff_jax.data.images import DataError
from tests.data_files import classes_map, picture, save, save_palette


def decoded(path):
    data, size = images.load_image(path)
    image = images.decode_image(data)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    return image


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_plain_images_are_kept_byte_for_byte(tmp_path, suffix):
    path = save(picture(), tmp_path / f"a.{suffix}")
    assert images.load_image(path) == (path.read_bytes(), (20, 30))
    assert images.encoded_size(path.read_bytes()) == (20, 30)


def test_jpeg_decodes_to_rgb_as_pillow_does(tmp_path):
    smooth = np.asarray(Image.fromarray(picture(4, 5)).resize((60, 40), Image.Resampling.BICUBIC))
    path = save(smooth, tmp_path / "a.jpg", quality=95)
    want = np.asarray(Image.open(path)).astype(int)
    assert np.abs(decoded(path) - want).max() <= 3  # the decoders' DCTs differ by rounding


@pytest.mark.parametrize("suffix", ["bmp", "tif", "webp", "ppm"])
def test_other_formats_become_the_same_rgb(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(picture(), tmp_path / f"a.{suffix}", **options)
    np.testing.assert_array_equal(decoded(path), picture())


def test_grey_is_repeated_over_the_channels(tmp_path):
    grey = picture()[..., 0]
    path = save(grey, tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(path), np.repeat(grey[..., None], 3, -1))


def test_alpha_is_dropped(tmp_path):
    alpha = np.full((20, 30, 1), 7, np.uint8)
    path = save(np.concatenate([picture(), alpha], -1), tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(path), picture())


def test_palette_images_become_their_colours(tmp_path):
    path = save_palette(classes_map(), tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(path), np.asarray(Image.open(path).convert("RGB")))


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.full((20, 30, 3), (200, 40, 90), np.uint8)).convert("CMYK").save(path)
    np.testing.assert_allclose(decoded(path), np.broadcast_to((200, 40, 90), (20, 30, 3)), atol=4)


def test_16_bit_grey_keeps_the_high_byte(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    path = save(values, tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(path)[..., 1], values >> 8)


def test_16_bit_rgb_keeps_the_high_byte(tmp_path):
    import cv2

    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), values[..., ::-1])
    np.testing.assert_array_equal(decoded(path), values >> 8)
    assert images.load_image(path)[0][24] == 8  # stored with 8 bits, so that decoders agree


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise by 90 degrees to see it upright
    stored = np.zeros((20, 30, 3), np.uint8)
    stored[:, :15] = 255  # the left half, which belongs at the top
    path = save(stored, tmp_path / "a.jpg", exif=exif, quality=95)
    upright = decoded(path)
    assert upright.shape == (30, 20, 3)
    assert upright[:14].min() > 200
    assert upright[16:].max() < 60


def broken_files(folder):
    jpeg = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(jpeg, "JPEG")
    png = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(png, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    frames = [Image.fromarray(picture(seed=s)) for s in (0, 1)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    tiff = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tiff, "TIFF")
    contents = {
        "empty.jpg": (b"", "empty"),
        "half.jpg": (jpeg.getvalue()[:4000], "truncated"),
        "half.png": (png.getvalue()[:4000], "truncated"),
        "text.jpg": (b"this is no image", "not a readable image"),
        "header.png": (png.getvalue()[:30], "not a readable image"),
        "flipped.png": (png.getvalue()[:500] + b"\xff" * 80 + png.getvalue()[580:], "damaged"),
        "bomb.png": (bomb.getvalue(), "make the image smaller"),
        "film.gif": (gif.getvalue(), "holds 2 pictures"),
        "float.tif": (tiff.getvalue(), "pixel format 'F' is not supported"),
    }
    for name, (data, message) in contents.items():
        (folder / name).write_bytes(data)
        yield folder / name, message


def test_broken_images_are_refused_with_their_name(tmp_path):
    for path, message in broken_files(tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            images.load_image(path)
        assert str(path) in str(caught.value)


def test_a_png_without_its_end_is_stored_with_one(tmp_path):
    path = save(picture(), tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:-12])
    np.testing.assert_array_equal(decoded(path), picture())
    assert images.load_image(path)[0][-8:-4] == b"IEND"


def test_files_with_wrong_bytes_load_or_raise_a_data_error(tmp_path):
    rng = np.random.default_rng(0)
    save(picture(), tmp_path / "a.png")
    save(picture(), tmp_path / "b.jpg")
    save_palette(classes_map(), tmp_path / "c.png")
    whole = [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    messages = []
    for number in range(600):
        data = bytearray(whole[number % 3])
        reach = min(len(data), int(rng.choice([40, 200, 10**6])))
        for place in rng.integers(0, reach, int(rng.choice([1, 2, 10]))):
            data[place] = rng.integers(256)
        path = tmp_path / "broken"
        path.write_bytes(data)
        for read in (images.load_image, images.load_label):
            try:
                read(path)
            except DataError as e:
                messages.append(str(e))
    assert len(messages) > 100
    assert all(str(tmp_path / "broken") in message for message in messages)


# Label maps.


def test_palette_masks_give_indices_not_colours(tmp_path):
    label = classes_map()
    label[3] = 255
    path = save_palette(label, tmp_path / "a.png")
    np.testing.assert_array_equal(images.load_label(path), label)


def test_palette_masks_of_few_bits_give_indices(tmp_path):
    label = classes_map(classes=3)
    picture = Image.fromarray(label)
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    picture.save(tmp_path / "a.png", bits=2)
    assert (tmp_path / "a.png").read_bytes()[24] == 2
    np.testing.assert_array_equal(images.load_label(tmp_path / "a.png"), label)


def test_grey_masks_of_8_and_16_bits_give_values(tmp_path):
    label = classes_map()
    np.testing.assert_array_equal(images.load_label(save(label, tmp_path / "a.png")), label)
    wide = label.astype(np.uint16) * 1000
    np.testing.assert_array_equal(images.load_label(save(wide, tmp_path / "b.png")), wide)


def test_one_bit_masks_give_0_and_1(tmp_path):
    label = classes_map(classes=2)
    Image.fromarray(label.astype(bool)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.load_label(tmp_path / "a.png"), label)


def test_rgb_masks_are_refused_and_the_option_named(tmp_path):
    path = save(picture(), tmp_path / "a.png")
    with pytest.raises(DataError, match="--color_masks"):
        images.load_label(path)


def test_lossy_masks_are_refused(tmp_path):
    path = save(classes_map(), tmp_path / "a.jpg")
    with pytest.raises(DataError, match="JPEG is lossy"):
        images.load_label(path)


def test_broken_masks_are_refused_with_their_name(tmp_path):
    for path, message in broken_files(tmp_path):
        if path.name not in ("float.tif",):
            with pytest.raises(DataError, match=message):
                images.load_label(path)


def test_colours_become_values_and_unknown_ones_can_be_named(tmp_path):
    rgb = np.zeros((2, 3, 3), np.uint8)
    rgb[0, 0], rgb[1, 2] = (10, 20, 30), (1, 2, 3)
    path = save(rgb, tmp_path / "a.png")
    label = images.load_label(path, {0x000000: 0, 0x0A141E: 5})
    assert label[0, 0] == 5
    assert label[1, 2] == images.UNKNOWN_COLOR + 0x010203
    assert images.load_label(path, {0x000000: 0, 0x0A141E: 5}, other=255)[1, 2] == 255


# Records.


def test_labels_survive_encoding(tmp_path):
    label = np.random.default_rng(0).integers(0, 256, (33, 47)).astype(np.uint8)
    np.testing.assert_array_equal(images.decode_label(images.encode_png(label)), label)


def test_images_survive_encoding():
    np.testing.assert_array_equal(images.decode_image(images.encode_png(picture())), picture())


def test_palette_records_give_indices(tmp_path):
    path = save_palette(classes_map(), tmp_path / "a.png")
    np.testing.assert_array_equal(images.decode_label(path.read_bytes()), classes_map())


@pytest.mark.parametrize("data", [b"", b"nonsense"])
def test_damaged_records_are_refused(data):
    with pytest.raises(DataError, match="damaged record"):
        images.decode_image(data)
    with pytest.raises(DataError, match="damaged record"):
        images.decode_label(data)


def test_rgb_label_records_are_refused():
    with pytest.raises(DataError, match=r"want uint8 \[H, W\]"):
        images.decode_label(images.encode_png(picture()))


def geotiff(array, path, nothing):
    """A TIFF that says, as GDAL does, which value is no data."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[42113] = str(nothing)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, tiffinfo=tags)


def test_what_a_geotiff_says_to_be_without_data_is_ignored(tmp_path):
    image = picture().clip(1)
    image[2:5, 3:9] = 0
    image[10, 10] = (0, 7, 7)  # one band that is 0 is a colour
    label = classes_map()
    marked = label.copy()
    marked[15:, 20:] = 200
    root = tmp_path / "in"
    geotiff(image, root / "images" / "a.tif", 0)
    geotiff(marked, root / "labels" / "a.tif", 200)
    (root / "classes.txt").write_text("a\nb\nc\n")
    prepare.prepare("image_folder/x", tmp_path / "d", root, image_folder.FolderOptions())
    source = datasets.load(default(dataset="image_folder/x", data_dir=str(tmp_path / "d")), "train")
    expected = label.copy()
    expected[15:, 20:] = expected[2:5, 3:9] = 255
    np.testing.assert_array_equal(source[0]["label"], expected)
    np.testing.assert_array_equal(source[0]["image"], image)


def test_no_data_that_is_no_number_is_refused(tmp_path):
    geotiff(classes_map(), tmp_path / "a.tif", "none")
    with pytest.raises(DataError, match=r"a\.tif: its value for `no data` is 'none'"):
        images.load_label(tmp_path / "a.tif")
