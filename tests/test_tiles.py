"""Images in tiles: no seams, georeference, interruption, memory, and what is refused."""

import json
import pathlib
import subprocess
import sys
import textwrap

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

import dilaff_jax
from dilaff_jax import affinity
from dilaff_jax.data import raster
from dilaff_jax.data.class_list import Classes
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.serving import predict_files, refine_files, tile_files, tiles, writer
from dilaff_jax.serving.foreign_files import Form
from dilaff_jax.serving.geometry import Geometry
from dilaff_jax.serving.network import Network
from dilaff_jax.serving.predictor import Predictor, Raw
from dilaff_jax.serving.reach import reach
from tests import data_files

rasterio = pytest.importorskip("rasterio", reason="needs the extra [geo]")

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

CLASSES = Classes(("a", "b", "c"), np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8))


def picture(height, width, seed=0):
    coarse = data_files.picture(-(-height // 8), -(-width // 8), seed)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def local(variables, images):
    """A network that sees a few pixels around each: maps of strides 4 and 8, of its own sums."""
    x = images.astype(jnp.float32) / 255
    for _ in range(3):
        above, left = x[:, :1], x[:, :, :1]
        above = jnp.concatenate([above, x[:, :-1]], axis=1)
        left = jnp.concatenate([left, x[:, :, :-1]], axis=2)
        x = (above + x + left) / 3
    offsets = affinity.offsets((1, 3))
    fine, coarse = x[:, ::4, ::4], x[:, ::8, ::8]
    edges = jnp.sin(40 * fine[..., :1] + jnp.arange(len(offsets)))
    return 9 * (coarse - coarse.mean(axis=-1, keepdims=True)), 3 * edges


def model(refine=None, apply=local, **fields):
    refine = refine or {"name": "signed", "steps": 3, "strength": 0.2}
    offsets = affinity.offsets((1, 3))
    return Predictor(Network(apply, {"w": np.ones(3)}, offsets, CLASSES, refine, **fields))


def save(path, pixels, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.atleast_3d(pixels)
    given = {"driver": "GTiff", "dtype": bands.dtype, "count": bands.shape[2]}
    given |= {"height": bands.shape[0], "width": bands.shape[1]} | profile
    with rasterio.open(path, "w", **given) as file:
        file.write(np.moveaxis(bands, -1, 0))
    return path


def labels_at(path):
    with rasterio.open(path) as file:
        return file.read(1)


# How an axis is cut.


@hypothesis.given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 9))
def test_tiles_cover_an_axis_and_windows_reach_as_far_as_they_have_to(size, tile, margin):
    cut = tiles.spans(size, tile, margin)
    assert [s.start for s in cut] == [0, *(s.stop for s in cut[:-1])]
    assert cut[-1].stop == size
    assert len({s.length for s in cut}) == 1
    for s in cut:
        assert 0 <= s.first <= max(0, s.start - margin)
        assert min(size, s.stop + margin) <= s.last <= size


def test_how_far_propagation_reaches_is_what_a_changed_pixel_reaches():
    offsets = affinity.offsets((1, 3))
    probs, edges = np.full((1, 61, 61, 2), 0.5, np.float32), np.full((1, 61, 61, 16), 2, np.float32)
    probs[0, 30, 30] = 0.9, 0.1
    for refine in (
        {"name": "signed", "steps": 2, "strength": 0.1},
        {"name": "random_walk", "steps": 2},
        {"name": "random_walk", "steps": 2, "order": "coarse_to_fine"},
        {"name": "random_walk"},
        {"name": "identity"},
    ):
        refined = dilaff_jax.propagate.operator(**refine)(probs, edges, offsets)
        changed = np.argwhere(np.abs(np.asarray(refined)[0, ..., 0] - 0.5) > 1e-7)
        assert np.abs(changed - 30).max() == reach(refine, offsets), refine


# Without seams.


@pytest.mark.parametrize(
    "refine",
    [
        {"name": "signed", "steps": 3, "strength": 0.2},
        {"name": "random_walk", "steps": 2, "order": "coarse_to_fine"},
        {"name": "identity"},
    ],
    ids=lambda r: r["name"],
)
def test_tiles_are_what_the_whole_is(tmp_path, monkeypatch, refine):
    monkeypatch.setattr(tiles.Store, "remove", lambda store: None)
    image = picture(203, 331)
    save(tmp_path / "in.tif", image)
    predictor = model(refine)
    options = writer.Options(tmp_path / "out", propagation="both", tile=64, margin=32)
    predict_files.predict(predictor, tmp_path / "in.tif", options)
    whole = Predictor(predictor.network, pad=32)(image)
    np.testing.assert_array_equal(labels_at(tmp_path / "out/labels/in.tif"), whole.labels)
    np.testing.assert_array_equal(labels_at(tmp_path / "out/labels_plain/in.tif"), whole.plain)
    assert (whole.labels != whole.plain).any() == (refine["name"] != "identity")
    # The numbers, of one window against all maps at once.
    tiling = tiles.Tiling(predictor, 64, 32)
    assert (tiling.unit, tiling.strides) == (32, {"logits": 8, "affinity": 4})
    store = tiles.Store(tmp_path / "out/tiles/in", _key(tmp_path))
    height, width = tiling.canvas(image.shape[:2])
    assert (height, width) == (224, 352)

    def change(rows, columns):
        maps = {
            kind: store.window(
                kind,
                tuple(n // s for n in rows),
                tuple(n // s for n in columns),
                64 // s,
            )[None]
            for kind, s in tiling.strides.items()
        }
        size = min(rows[1], 203) - rows[0], min(columns[1], 331) - columns[0]
        geometry = Geometry(size, size, (rows[1] - rows[0], columns[1] - columns[0]))
        return predictor.correction(
            Raw(geometry, jnp.asarray(maps["logits"]), jnp.asarray(maps["affinity"]))
        )[0]

    complete = change((0, height), (0, width))
    row = tiles.spans(height, 64, tiling.halo)[1]
    column = tiles.spans(width, 64, tiling.halo)[2]
    part = change((row.first, row.last), (column.first, column.last))
    np.testing.assert_allclose(
        part[
            (row.start - row.first) // 4 : (row.stop - row.first) // 4,
            (column.start - column.first) // 4 : (column.stop - column.first) // 4,
        ],
        complete[row.start // 4 : row.stop // 4, column.start // 4 : column.stop // 4],
        atol=1e-5,
    )


def _key(folder):
    return json.loads((folder / "out/tiles/in/key.json").read_text())


def test_a_trained_network_is_without_seams_where_its_margin_covers_what_it_sees(
    tiny_run, tmp_path
):
    image = picture(150, 170)
    save(tmp_path / "in.tif", image)
    predictor = dilaff_jax.load(tiny_run, resize=1.0)
    options = writer.Options(tmp_path / "out", propagation="with", tile=64, margin=96)
    predict_files.predict(predictor, tmp_path / "in.tif", options)
    found = labels_at(tmp_path / "out/labels/in.tif")
    assert found.shape == (150, 170)
    # What differs is where a tile's window ends and the image does not: nothing far from there.
    agree = (found == Predictor(predictor.network, pad=32, resize=1.0)(image).labels).mean()
    assert agree > 0.98
    picture_of_all = np.asarray(Image.open(tmp_path / "out/overlays/in.png"))
    assert picture_of_all.shape == (150, 170, 3)


# What another network says.


def scores_of(image, stride, seed=3):
    rng = np.random.default_rng(seed)
    rows, columns = image.shape[0] // stride, image.shape[1] // stride
    coarse = rng.normal(0, 2, (rows // 4 + 1, columns // 4 + 1, 3))
    return np.kron(coarse, np.ones((4, 4, 1)))[:rows, :columns].astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("size", "stride", "kind"),
    [
        ((203, 331), 1, "logits.npy"),
        ((200, 332), 4, "probabilities.tif"),
        ((192, 320), 4, "chw.npy"),
        ((192, 320), 8, "probabilities.npy"),
        ((203, 331), 1, "labels.tif"),
    ],
)
def test_results_of_others_are_refined_as_whole_ones_are(tmp_path, size, stride, kind):
    image, form = picture(*size), Form()
    save(tmp_path / "in/a.tif", image)
    logits = scores_of(image, stride)
    results = tmp_path / "results"
    results.mkdir()
    if kind == "logits.npy":
        np.save(results / "a.npy", logits.astype(np.float16))
        logits = logits.astype(np.float16)
    elif kind == "chw.npy":
        np.save(results / "a.npy", np.moveaxis(logits, -1, 0))
    elif kind == "probabilities.npy":
        np.save(results / "a.npy", softmax(logits))
    elif kind == "probabilities.tif":
        save(results / "a.tif", softmax(logits))
    else:
        save(results / "a.tif", np.argmax(logits, axis=-1).astype(np.uint8))
        form = Form(confidence=0.9)
        best = np.argmax(logits, axis=-1)[..., None] == np.arange(3)
        logits = np.log(np.where(best, 0.9, 0.05)).astype(np.float32)
    options = writer.Options(tmp_path / "out", propagation="both", tile=64, margin=32)
    summary = refine_files.refine(model(), tmp_path / "in", results, options, form)
    whole = Predictor(model().network, pad=32).refine(image, logits.astype(np.float32))
    found = labels_at(tmp_path / "out/labels/a.tif")
    assert (found != whole.labels).mean() < 1e-4  # probabilities are rounded on their way
    np.testing.assert_array_equal(labels_at(tmp_path / "out/labels_plain/a.tif"), whole.plain)
    assert "labels: 1 file (a.tif)" in str(summary)
    assert summary.pixels == image.shape[0] * image.shape[1]
    assert summary.changed == (found != whole.plain).sum() > 0
    assert json.loads((tmp_path / "out/refinement.json").read_text())["changed"] == summary.changed


def test_an_affinity_network_by_itself_refines_any_classes_in_tiles(tmp_path):
    image = picture(100, 90)
    save(tmp_path / "a.tif", image)
    rng = np.random.default_rng(0)
    save(tmp_path / "a_probs.tif", softmax(rng.normal(size=(100, 90, 5))).astype(np.float32))
    predictor = model(segmentation=False)
    options = writer.Options(tmp_path / "out", tile=64)
    refine_files.refine(predictor, tmp_path / "a.tif", tmp_path / "a_probs.tif", options, Form())
    assert len(json.loads((tmp_path / "out/classes.json").read_text())["names"]) == 5
    assert set(np.unique(labels_at(tmp_path / "out/labels/a.tif"))) == set(range(5))
    with pytest.raises(UserError, match="affinity network by itself"):
        predict_files.predict(predictor, tmp_path / "a.tif", options)


@pytest.mark.parametrize(
    ("array", "name", "reason"),
    [
        (np.zeros((60, 90, 3), np.float32), "a.npy", "60 x 90 values for an image of 100 x 90"),
        (np.full((100, 90, 3), np.nan, np.float32), "a.npy", "holds NaN"),
        (np.zeros((100, 90, 4), np.float32), "a.npy", "give --layout"),
        (np.zeros((100, 90, 2), np.float32), "a.tif", "2 bands; expected one for each of 3"),
        (np.zeros((100, 90, 2), np.uint8), "a.tif", "2 bands of uint8; expected one of labels"),
        (np.full((100, 90), 7, np.uint8), "a.tif", "labels hold 7"),
        (np.zeros((100, 90), np.uint8), "b.tif", "give --confidence"),
        (None, "a.npz", r"windows of a \.npz cannot be read"),
    ],
)
def test_results_that_cannot_be_meant_are_refused(tmp_path, array, name, reason):
    save(tmp_path / "in.tif", picture(100, 90))
    path = tmp_path / name
    if array is None:
        np.savez(path, logits=np.zeros((100, 90, 3), np.float32))
    elif name.endswith("npy"):
        np.save(path, array)
    else:
        save(path, array)
    form = Form(confidence=None if name == "b.tif" else 0.9)
    options = writer.Options(tmp_path / "out", tile=64)
    with pytest.raises(UserError, match=reason):
        refine_files.refine(model(), tmp_path / "in.tif", path, options, form)
    assert not (tmp_path / "out/labels").exists()


# Files.


def test_georeference_and_missing_data_are_kept(tmp_path):
    image = picture(90, 130)
    transform = rasterio.transform.from_origin(500_000, 4_600_000, 0.5, 0.5)
    image[10:20, 30:60] = 0
    image[50:52, 3:5] = 0
    image[image.sum(axis=-1) == 0] = 0
    source = save(tmp_path / "in.tif", image, crs="EPSG:32633", transform=transform, nodata=0)
    options = writer.Options(tmp_path / "out", tile=64)
    assert "georeference" not in str(predict_files.predict(model(), source, options))
    with rasterio.open(tmp_path / "out/labels/in.tif") as file:
        assert file.crs.to_epsg() == 32633
        assert file.transform == transform
        assert file.nodata == 255
        assert file.colormap(1)[1][:3] == (255, 0, 0)
        found = file.read(1)
    with rasterio.open(source) as file:
        np.testing.assert_array_equal(found == 255, file.dataset_mask() == 0)
    assert (found == 255).sum() >= 300


def test_ground_control_points_are_kept(tmp_path):
    points = [
        rasterio.control.GroundControlPoint(row, column, x, y)
        for row, column, x, y in ((0, 0, 10, 50), (0, 60, 11, 50), (60, 0, 10, 49))
    ]
    source = save(tmp_path / "in.tif", picture(64, 64), gcps=points, crs="EPSG:4326")
    predict_files.predict(model(), source, writer.Options(tmp_path / "out", tile=64))
    with rasterio.open(tmp_path / "out/labels/in.tif") as file:
        found, reference = file.gcps
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    assert reference.to_epsg() == 4326


def test_grey_palettes_and_alpha_are_read_as_whole_images_are(tmp_path):
    image = picture(40, 50)
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(image).quantize(16).save(tmp_path / "palette.png")
    alpha = np.full((40, 50, 1), 255, np.uint8)
    alpha[:5] = 0
    Image.fromarray(np.concatenate([image, alpha], -1)).save(tmp_path / "alpha.png")
    Image.fromarray(image).save(tmp_path / "plain.jpg", quality=95, subsampling=0)
    for name in ("grey.png", "palette.png", "alpha.png", "plain.jpg"):
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        with raster.Raster(tmp_path / name) as file:
            found = file.read((3, 33), (7, 47))
            difference = np.abs(found - expected[3:33, 7:47]).max()
            assert difference <= (2 if name.endswith("jpg") else 0), name
            there = file.is_there((0, 40), (0, 50))
        np.testing.assert_array_equal(there, alpha[..., 0] > 0 if name == "alpha.png" else True)


def test_several_files_and_what_cannot_be_read_beside_them(tmp_path):
    save(tmp_path / "in/a/one.tif", picture(70, 60))
    Image.fromarray(picture(30, 30)).save(tmp_path / "in/two.png")
    (tmp_path / "in/broken.tif").write_bytes(b"II*\0 nothing")
    save(tmp_path / "in/deep.tif", picture(30, 30).astype(np.uint16))
    save(tmp_path / "in/bands.tif", np.zeros((30, 30, 5), np.uint8))
    summary = predict_files.predict(
        model(), tmp_path / "in", writer.Options(tmp_path / "out", tile=64)
    )
    assert summary.images == 2
    text = str(summary)
    assert "no georeference, and so none in the labels: 1 file (one.tif); gdal_edit" in text
    assert "broken.tif: not a raster that can be read" in text
    assert "deep.tif: numbers of type uint16; tiles are read of 8 bits" in text
    assert "bands.tif: 5 bands; expected one, or three" in text
    assert {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.tif")
    } == {
        "labels/a/one.tif",
        "labels/two.tif",
    }
    assert not (tmp_path / "out/tiles").exists()


def test_a_file_that_is_cut_off_is_named(tmp_path):
    source = save(tmp_path / "in.tif", picture(400, 400), tiled=True, blockxsize=64, blockysize=64)
    source.write_bytes(source.read_bytes()[:-60_000])
    with pytest.raises(DataError, match=r"in\.tif: damaged or cut off"):
        tile_files.InTiles(model(), writer.Options(tmp_path, tile=64)).predict("in", source)


# Interruption.


def test_what_was_interrupted_goes_on_and_ends_the_same(tmp_path):
    source = save(tmp_path / "in.tif", picture(200, 200))
    calls = []

    class Counted(Predictor):
        def infer(self, image):
            calls.append(image.shape)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return super().infer(image)

    options = writer.Options(tmp_path / "out", tile=64)
    predictor = Counted(model().network)
    with pytest.raises(KeyboardInterrupt):
        predict_files.predict(predictor, source, options)
    assert not (tmp_path / "out/labels/in.tif").exists()
    predict_files.predict(predictor, source, options)
    assert len(calls) == 6 + 16 - 5  # the sixth of sixteen did not end
    other = writer.Options(tmp_path / "other", tile=64)
    predict_files.predict(model(), source, other)
    assert (tmp_path / "out/labels/in.tif").read_bytes() == (
        tmp_path / "other/labels/in.tif"
    ).read_bytes()


def test_maps_of_other_weights_or_of_another_image_are_not_taken_up(tmp_path):
    store = tiles.Store(tmp_path / "s", {"weights": "1"})
    store.write("logits", (0, 0), np.ones((2, 2, 3)))
    assert tiles.Store(tmp_path / "s", {"weights": "1"}).has("logits", (0, 0))
    assert not tiles.Store(tmp_path / "s", {"weights": "2"}).has("logits", (0, 0))
    store.write("logits", (0, 0), np.ones((2, 2, 3)))
    assert not tiles.Store(tmp_path / "s", None).has("logits", (0, 0))


# Memory.


def test_memory_is_that_of_a_tile(tmp_path):
    # 81 megapixels: its colours are 243 MB, and each map in `local` would be 972 MB.
    with rasterio.open(
        tmp_path / "in.tif",
        "w",
        driver="GTiff",
        dtype="uint8",
        count=3,
        height=9_000,
        width=9_000,
        tiled=True,
        compress="deflate",
        sparse_ok=True,
    ):
        pass
    program = f"""
        import pathlib, resource, jax, numpy as np
        from tests.test_tiles import model, tile_files, writer, picture, save
        folder = pathlib.Path({str(tmp_path)!r})
        save(folder / "small.tif", picture(1100, 1100))
        in_tiles = tile_files.InTiles(model(), writer.Options(folder, tile=1024))
        in_tiles.predict("small", folder / "small.tif")
        status = pathlib.Path("/proc/self/status").read_text()
        peak = 1024 * int(status.split("VmPeak:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (peak + 700 * 2**20,) * 2)
        in_tiles.predict("in", folder / "in.tif")
        print("done")
        try:
            model()(np.zeros((9000, 9000, 3), np.uint8))
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            print("the whole:", type(error).__name__)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "done\nthe whole: " in result.stdout, result.stderr[-2000:]
    with rasterio.open(tmp_path / "labels/in.tif") as file:
        assert file.shape == (9_000, 9_000)


def test_a_disk_without_space_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    source = save(tmp_path / "in.tif", picture(640, 640))
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(tile_files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"640 x 640 pixels needs 0\.0 GB .* 0\.0 GB are free"):
        tile_files.InTiles(model(), writer.Options(tmp_path, tile=64)).predict("in", source)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tile": -1}, "tile is -1"),
        ({"tile": 64, "margin": -1}, "tile_margin -1"),
        ({"tile": 64, "probs": True}, "in tiles labels are written"),
        ({"tile": 64, "edges": True}, "in tiles labels are written"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, changes, reason):
    source = save(tmp_path / "in.tif", picture(40, 40))
    with pytest.raises(UserError, match=reason):
        predict_files.predict(model(), source, writer.Options(tmp_path / "out", **changes))


def test_networks_that_cannot_be_in_tiles_are_refused():
    with pytest.raises(UserError, match=r"scales images by 0\.5 first"):
        tiles.Tiling(Predictor(model().network, resize=0.5), 64, 0)
    with pytest.raises(UserError, match="an operator of your own"):
        tiles.Tiling(model({"name": "tests.oracles:torch_random_walk"}), 64, 0)
    with pytest.raises(UserError, match=r"tiles of 64 with 64 around them are larger than the 96"):
        tiles.Tiling(model(size=(96, 96)), 64, 64)

    def uneven(variables, images):
        return jnp.zeros((1, 100, 100, 3)), None

    with pytest.raises(UserError, match="a cell has to be a whole number of pixels"):
        tiles.Tiling(model(apply=uneven), 64, 0)


def test_tiles_are_of_what_all_strides_divide():
    def of_fourteen(variables, images):
        rows, columns = (n // 14 for n in images.shape[1:3])
        return jnp.zeros((1, rows, columns, 3)), jnp.zeros((1, 14 * rows // 2, 7 * columns, 16))

    tiling = tiles.Tiling(model(apply=of_fourteen), 1000, 100)
    assert (tiling.strides, tiling.unit) == ({"logits": 14, "affinity": 2}, 224)
    assert (tiling.tile, tiling.margin) == (1120, 224)


def test_without_rasterio_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[geo\]'"):
        raster.Raster(tmp_path / "in.tif")
