"""Images of other bands than red, green and blue, from files to exported networks."""

import dataclasses
import json
import pathlib

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax import evaluate, train
from dilaff_jax.data import (
    augment,
    band_folder,
    bands,
    contact_sheet,
    data_config,
    datasets,
    image_folder,
    pipeline,
    prepare,
)
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.export import stablehlo
from dilaff_jax.interop import files, pretrained
from dilaff_jax.models import segmenter
from dilaff_jax.serving import inputs, network, predict_files, predictor, view_page, writer
from tests import data_files, tiny_config

rasterio = pytest.importorskip("rasterio", reason="needs the extra [geo]")

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

KINDS = ["uint8", "uint16", "int16", "float32"]
SIZE = (24, 36)


def image(kind="uint16", count=5, seed=0, size=SIZE):
    values = np.random.default_rng(seed).normal(100, 20, (*size, count))
    return values.clip(1, 255).astype(kind)


def save(values, path, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, values)
    else:
        given = {"driver": "GTiff", "dtype": values.dtype, "count": values.shape[2]}
        given |= {"height": values.shape[0], "width": values.shape[1]} | profile
        with rasterio.open(path, "w", **given) as file:
            file.write(np.moveaxis(values, -1, 0))
    return path


def folder(root, kind="uint16", count=5, suffix=".tif", **profile):
    """Six images of training, three of validation, with masks of two classes."""
    for split, seeds in (("train", range(6)), ("val", range(6, 9))):
        for seed in seeds:
            name = root / split / "images" / f"{seed}{suffix}"
            save(image(kind, count, seed), name, **profile)
            mask = data_files.classes_map(*SIZE, 2, seed)
            data_files.save(mask, root / split / "labels" / f"{seed}.png")
    (root / "classes.txt").write_text("field\nwater\n")
    return root


def prepared(root, data_dir, **options):
    given = band_folder.BandOptions(**options)
    return prepare.prepare("band_folder/set", data_dir, root, given)


def loaded(data_dir, split="train", **changes):
    data = data_config.default(dataset="band_folder/set", data_dir=str(data_dir), **changes)
    return datasets.load(data, split)


# What prepare measures and keeps.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".tif", ".npy", ".npz"])
def test_records_hold_the_numbers_of_the_files(tmp_path, kind, suffix):
    prepared(folder(tmp_path / "src", kind, suffix=suffix), tmp_path / "data")
    source = loaded(tmp_path / "data")
    assert (source.channels, source.dtype, len(source)) == (5, kind, 6)
    for seed in range(6):
        example = source[seed]
        assert example["image"].dtype == kind
        np.testing.assert_array_equal(example["image"], image(kind, seed=seed))
    trained = np.concatenate([image(kind, seed=s).reshape(-1, 5) for s in range(6)])
    np.testing.assert_allclose(source.bands.mean, trained.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(source.bands.std, trained.std(axis=0, dtype=np.float64))
    # Validation is scaled as training was.
    assert loaded(tmp_path / "data", "validation").bands == source.bands


def test_moments_keep_their_digits_far_from_zero():
    moments, parts = bands.Moments(), []
    for seed in range(4):
        values = 1e6 + np.random.default_rng(seed).normal(0, 0.1, (7, 9, 2))
        parts.append(values.reshape(-1, 2))
        moments.add(values, None)
    found, every = moments.to_json(), np.concatenate(parts)
    np.testing.assert_allclose(found["mean"], every.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], every.std(axis=0), rtol=1e-6)


def test_splits_joined_are_measured_together(tmp_path):
    prepared(folder(tmp_path / "src"), tmp_path / "data")
    both = loaded(tmp_path / "data", train_split="train+validation").bands
    every = np.concatenate([image(seed=s).reshape(-1, 5) for s in range(9)])
    np.testing.assert_allclose(both.mean, every.mean(axis=0))
    np.testing.assert_allclose(both.std, every.std(axis=0))


def test_what_has_no_data_counts_in_nothing(tmp_path):
    root = folder(tmp_path / "src", nodata=0)
    values = image()
    values[:4] = 0  # all bands: ignored
    values[10, 10, 2] = 0  # one band: filled
    save(values, root / "train/images/0.tif", nodata=0)
    prepared(root, tmp_path / "data")
    source = loaded(tmp_path / "data")
    every = [values, *(image(seed=s) for s in range(1, 6))]
    for band in range(5):
        used = np.concatenate([v[..., band].ravel() for v in every])
        used = used[used != 0]
        assert source.bands.mean[band] == pytest.approx(used.mean())
        assert source.bands.std[band] == pytest.approx(used.std())
    example = source[0]
    assert (example["label"][:4] == 255).all()
    assert (example["label"][4:] != 255).all()
    mean = np.rint(source.bands.mean)
    np.testing.assert_array_equal(example["image"][:4], np.broadcast_to(mean, (4, 36, 5)))
    assert example["image"][10, 10, 2] == mean[2]
    np.testing.assert_array_equal(example["image"][10, 10, :2], values[10, 10, :2])


def test_nan_is_refused_until_it_is_said_to_be_missing(tmp_path):
    root = folder(tmp_path / "src", "float32", suffix=".npy")
    values = image("float32")
    values[3, 7, 1] = values[5:7, :, :] = np.nan
    np.save(root / "train/images/0.npy", values)
    with pytest.raises(
        DataError, match=r"0\.npy: 361 values are NaN, first in band 2 at \(3, 7\); "
    ):
        prepared(root, tmp_path / "data")
    prepared(root, tmp_path / "data", nan="missing")
    source = loaded(tmp_path / "data")
    assert np.isfinite(source[0]["image"]).all()
    assert source[0]["image"][3, 7, 1] == np.float32(source.bands.mean[1])
    assert (source[0]["label"][5:7] == 255).all()
    assert source[0]["label"][3, 7] != 255


def test_nan_that_a_geotiff_declares_is_no_data(tmp_path):
    root = folder(tmp_path / "src", "float32", nodata=np.nan)
    values = image("float32")
    values[:2] = np.nan
    save(values, root / "train/images/0.tif", nodata=np.nan)
    prepared(root, tmp_path / "data")
    assert (loaded(tmp_path / "data")[0]["label"][:2] == 255).all()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (image(count=4), r"4 bands of uint16, and .*/0\.tif has 5 of uint16; all images"),
        (image("uint8"), r"5 bands of uint8, and .*/0\.tif has 5 of uint16; all images"),
        (np.moveaxis(image(), -1, 0), r"bands seem to come first; save it as \[H, W, C\]"),
        (image()[..., 0], r"1 bands of uint16, and"),
        (np.zeros((2, *SIZE, 5)), r"shape \(2, 24, 36, 5\); expected \[H, W, C\]"),
        (np.full((*SIZE, 5), np.inf), r"900 values are infinite|values are infinite, or too large"),
        (np.full((*SIZE, 5), 2**25, np.int32), r"33554432; whole numbers are kept as float32"),
        (np.zeros((*SIZE, 5), complex), r"numbers of type complex128"),
        (np.zeros((*SIZE, 5), "datetime64[s]"), r"numbers of type datetime64"),
        (np.array([{}]), r"no array that can be read: .*Python objects"),
        (image(size=(12, 36)), r"the mask is 24 x 36, its image .*1\.npy is 12 x 36"),
    ],
    ids=range(11),
)
def test_other_bands_and_numbers_are_named(tmp_path, other, message):
    root = folder(tmp_path / "src")
    (root / "train/images/1.tif").unlink()
    np.save(root / "train/images/1.npy", other, allow_pickle=True)
    with pytest.raises(DataError, match=message) as caught:
        prepared(root, tmp_path / "data")
    assert "1.npy" in str(caught.value)
    assert not (tmp_path / "data/band_folder/set").exists()


def test_damaged_files_are_named(tmp_path):
    whole = save(image(), tmp_path / "a.tif").read_bytes()
    array = save(image(), tmp_path / "a.npy").read_bytes()
    packed = save(image(), tmp_path / "a.npz").read_bytes()
    np.savez(tmp_path / "two.npz", a=image(), b=image())
    for name, data in {"b.tif": whole[:99], "b.npy": array[:99], "b.npz": packed[:-99]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            bands.load(tmp_path / name)
    with pytest.raises(DataError, match=r"two\.npz: holds 2 arrays; save one alone"):
        bands.load(tmp_path / "two.npz")
    damaged = bands.encode(image(), None)[:-30]
    with pytest.raises(DataError, match="damaged record"):
        bands.decode(damaged, bands.Bands.of([0] * 5, [1] * 5))


def test_the_masks_may_be_what_image_folder_takes(tmp_path):
    root = folder(tmp_path / "src")
    (root / "classes.txt").write_text("field 0 200 0\nwater 0 0 200\n")
    for path in root.glob("*/labels/*.png"):
        label = cv2.imread(str(path), 0)
        colours = np.array([[0, 200, 0], [0, 0, 200]], np.uint8)
        data_files.save(colours[label], path)
    prepared(root, tmp_path / "data", color_masks=True)
    source = loaded(tmp_path / "data")
    np.testing.assert_array_equal(source[2]["label"], data_files.classes_map(*SIZE, 2, 2))


def test_options_that_cannot_be(tmp_path):
    root = folder(tmp_path / "src")
    with pytest.raises(DataError, match="--nan=drop: want stop or missing"):
        prepared(root, tmp_path / "data", nan="drop")
    with pytest.raises(DataError, match="--image_bits=12: want 0"):
        prepared(root, tmp_path / "data", image_bits=12)


# The config, and what reads examples.


def test_a_config_is_completed_by_its_data_set(tmp_path):
    prepared(folder(tmp_path / "src"), tmp_path / "data")
    config = tiny_config.get_config()
    config.data.update({"dataset": "band_folder/set", "data_dir": str(tmp_path / "data")})
    found = datasets.completed(config)
    source = loaded(tmp_path / "data")
    assert found.data.bands == 5
    assert found.model.encoder_options.mean == source.bands.mean
    assert found.model.encoder_options.std == source.bands.std
    assert "mean" not in config.model.encoder_options
    assert datasets.completed(found) == found
    config.model.encoder_options.mean = (1.0, 2.0, 3.0, 4.0, 5.0)
    assert datasets.completed(config).model.encoder_options.mean == (1.0, 2.0, 3.0, 4.0, 5.0)
    config.model.ndim = 3  # which these images are not; a network says so
    assert datasets.completed(config).model.ndim == 3
    config.model.ndim = 2
    config.data.bands = 4
    with pytest.raises(UserError, match=r"config\.data\.bands is 4, and the images .* have 5"):
        datasets.completed(config)
    for shown, message in (((6,), "have 5 bands"), ((1, 2), "one or three"), ((0,), "from 1")):
        with pytest.raises(UserError, match=message):
            loaded(tmp_path / "data", shown_bands=shown)


def test_photographs_have_no_bands(tmp_path):
    data_files.tiny_shapes(tmp_path)
    data = data_config.default(dataset="shapes/tiny", data_dir=str(tmp_path))
    assert datasets.load(data, "train").bands is None
    data.bands = 3
    with pytest.raises(UserError, match="holds RGB images of 8 bits; leave it at 0"):
        datasets.load(data, "train")


def test_a_model_and_its_images_agree_on_their_bands():
    options = {"mean": (1.0, 2.0), "std": (1.0,)}
    with pytest.raises(UserError, match="mean has 2 numbers and std 1"):
        segmenter.build_encoder("resnet18", **options)
    model = segmenter.build(
        {"encoder": "unet", "encoder_options": {"mean": (0.0,) * 4, "std": (1.0,) * 4}}
        | {"decoder": "unet", "output_stride": 32},
        2,
    )
    variables = segmenter.abstract_variables(model)
    with pytest.raises(UserError, match=r"shape \(1, 64, 64, 3\); expected \[B, H, W, 4\]"):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, train=False), variables, jnp.zeros((1, 64, 64, 3))
        )


def test_pictures_show_two_deviations_on_either_side():
    about = bands.Bands.of([10, 20, 30, 40], [1, 2, 3, 4], (4, 2, 1))
    values = np.array([[[10, 20, 30, 40], [12, 16, 0, 48], [9, 22, 0, 100]]], np.float32)
    shown = about.picture(values)[0].astype(int)
    np.testing.assert_array_equal(shown, [[128, 128, 128], [255, 0, 255], [255, 191, 64]])
    grey = bands.Bands.of([10], [1]).picture(values[..., :1])
    assert grey.shape == (1, 3, 3)
    assert (grey == grey[..., :1]).all()


def test_contact_sheets_show_bands(tmp_path):
    prepared(folder(tmp_path / "src"), tmp_path / "data")
    sheet = contact_sheet.draw(loaded(tmp_path / "data", shown_bands=(5, 1, 3)))
    assert sheet.dtype == np.uint8
    assert sheet.shape[-1] == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 13])
def test_resizing_is_that_of_each_band(kind, count):
    values = image(kind, count)
    for size, how in (((11, 13), cv2.INTER_AREA), ((50, 61), cv2.INTER_LINEAR)):
        found = bands.resized(values, size, how)
        alone = [
            cv2.resize(np.ascontiguousarray(values[..., i]), size[::-1], interpolation=how)
            for i in range(count)
        ]
        assert found.shape == (*size, count)
        # OpenCV rounds several channels of 16 bits another way than one.
        bound = 1 if kind in ("uint16", "int16") else 1e-3
        difference = np.abs(found.astype(np.float64) - np.stack(alone, axis=-1))
        assert difference.max() <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_photometric_moves_all_bands_by_their_deviations(kind):
    about = bands.Bands.of([100, 120, 90], [10, 20, 30])
    values = image(kind, 3)
    seen = set()
    for seed in range(40):
        found = bands.photometric(values, about, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        use, shift, factor = rng.random(2) < 0.5, rng.uniform(-0.5, 0.5), rng.uniform(0.5, 1.5)
        expected = values.astype(np.float64)
        for band, (mean, std) in enumerate(zip(about.mean, about.std, strict=True)):
            if use[1]:
                expected[..., band] = mean + factor * (expected[..., band] - mean)
            if use[0]:
                expected[..., band] += shift * std
        if kind == "float32":
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
        else:
            limits = np.iinfo(kind)
            expected = expected.clip(limits.min, limits.max)
            assert np.abs(found - expected).max() <= 0.51
        assert found.dtype == kind
        seen.add((bool(use[0]), bool(use[1])))
    assert len(seen) == 4


@pytest.mark.parametrize("count", [1, 5, 13])
def test_batches_are_of_the_bands_and_of_seed_and_step_alone(tmp_path, count):
    prepared(folder(tmp_path / "src", count=count), tmp_path / "data")
    data = data_config.default(
        dataset="band_folder/set", data_dir=str(tmp_path / "data"), crop_size=(32, 40)
    )
    source = datasets.load(data, "train")
    batches = []
    for workers in (0, 2):
        data.workers = workers
        with pipeline.train_batches(data, source, batch_size=4, seed=3) as stream:
            batches.append([next(stream) for _ in range(3)])
    for one, other in zip(*batches, strict=True):
        assert one["image"].shape == (4, 32, 40, count)
        assert one["image"].dtype == np.uint16
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    # Beyond the image, the means.
    with pipeline.eval_batches(
        data_config.default(
            dataset="band_folder/set", data_dir=str(tmp_path / "data"), eval_size=(30, 40)
        ),
        loaded(tmp_path / "data", "validation"),
        batch_size=2,
    ) as stream:
        batch = next(stream)
    np.testing.assert_array_equal(batch["image"][0, :24, :36], image(count=count, seed=6))
    beyond = batch["image"][0, 24:].reshape(-1, count)
    np.testing.assert_array_equal(beyond, np.rint(source.bands.mean) + 0 * beyond)


def test_a_crop_is_the_same_part_of_image_and_mask():
    about = bands.Bands.of([0] * 6, [1] * 6)
    label = data_files.classes_map(40, 50, 50, 1)
    values = np.repeat(label[..., None], 6, axis=-1).astype(np.int16) * np.arange(
        1, 7, dtype=np.int16
    )
    make = augment.Augmentation((24, 32), flip=0.5, bands=about)
    for seed in range(6):
        part, mask = make(values, label, np.random.default_rng(seed))
        for band in range(6):
            np.testing.assert_array_equal(part[..., band], mask.astype(int) * (band + 1))


# Pretrained weights.


@pytest.mark.parametrize("count", [1, 2, 4, 13])
@pytest.mark.parametrize(
    "encoder", ["resnet18", "mobilenet_v2", "convnext_tiny", "mit_b0", "dinov2_vits14"]
)
def test_a_first_convolution_is_adapted_as_timm_does(tmp_path, encoder, count):
    torch = pytest.importorskip("torch")
    from dilaff_jax.interop import torch_layout, torchvision_import
    from dilaff_jax.models import classifier

    torchvision_import.torchvision()  # before timm asks for it
    timm = pytest.importorskip("timm.models._manipulate", reason="needs the extra [pretrained]")
    stride = 16 if encoder.startswith("dino") else 32
    options = {"output_stride": stride, "encoder": encoder, "decoder": "fcn"}

    def variables(model):
        rng = np.random.default_rng(0)
        shapes = segmenter.abstract_variables(model)
        return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)

    colours = segmenter.build(options, 2)
    trained = variables(colours)
    alone = classifier.Classifier(colours.encoder)
    part = {c: {"encoder": tree["encoder"]} for c, tree in trained.items() if "encoder" in tree}
    files.write(tmp_path / "weights.safetensors", torch_layout.to_torch(alone, part))
    statistics = {"mean": (10.0,) * count, "std": (2.0,) * count}
    model = segmenter.build(options | {"encoder_options": statistics}, 2)
    loaded_ = pretrained.load_backbone(model, variables(model), tmp_path / "weights.safetensors")
    flat = jax.tree_util.tree_flatten_with_path(trained["params"]["encoder"])[0]
    found = dict(jax.tree_util.tree_flatten_with_path(loaded_["params"]["encoder"])[0])
    adapted = 0
    for path, kernel in flat:
        if found[path].shape == kernel.shape:
            np.testing.assert_array_equal(found[path], kernel)
            continue
        weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        expected = timm.adapt_input_conv(count, weight).numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(found[path], expected, rtol=1e-6, atol=1e-6)
        adapted += 1
    assert adapted == 1


def test_features_of_adapted_weights_are_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    from dilaff_jax.interop import torchvision_import

    torchvision = torchvision_import.torchvision()
    timm = pytest.importorskip("timm.models._manipulate", reason="needs the extra [pretrained]")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    mean, std = (100.0, 90.0, 80.0, 300.0), (10.0, 20.0, 30.0, 90.0)
    options = {"encoder": "resnet18", "decoder": "fcn", "output_stride": 32}
    model = segmenter.build(options | {"encoder_options": {"mean": mean, "std": std}}, 2)
    x = np.random.default_rng(0).normal(100, 50, (1, 64, 96, 4)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    variables = pretrained.load_backbone(model, variables, tmp_path / "weights.pth")
    with torch.no_grad():
        theirs.conv1.weight = torch.nn.Parameter(
            timm.adapt_input_conv(4, theirs.conv1.weight.detach())
        )
        y = theirs.relu(
            theirs.bn1(theirs.conv1(torch.tensor((x - mean) / std).float().permute(0, 3, 1, 2)))
        )
        for layer in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            y = getattr(theirs, layer)(y)
    ours = model.apply(
        variables, x, method=lambda m, x: m.encoder(segmenter.normalise(x, m.encoder), False)[-1]
    )
    expected = y.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


# A trained network.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of seconds on four bands, of which the last alone tells the classes apart."""
    root = tmp_path_factory.mktemp("bands")
    for split, seeds in (("train", range(8)), ("val", range(8, 11))):
        for seed in seeds:
            label = np.kron(data_files.classes_map(4, 6, 2, seed), np.ones((8, 8), np.uint8))
            values = image("float32", 4, seed, label.shape)
            values[..., 3] = 1000.0 * label + values[..., 0]
            save(values, root / f"src/{split}/images/{seed}.tif", nodata=-9999.0)
            data_files.save(label, root / f"src/{split}/labels/{seed}.png")
    (root / "src/classes.txt").write_text("field\nwater\n")
    prepared(root / "src", root / "data")
    config = tiny_config.get_config()
    config.data.update({"dataset": "band_folder/set", "data_dir": str(root / "data")})
    config.num_steps, config.eval_every, config.checkpoint_every = 240, 240, 240
    config.optim.ema = 0.0
    train.train_and_evaluate(config, root / "run")
    return root, config


def test_it_learns_what_only_the_fourth_band_shows(run):
    root, config = run
    stored = json.loads((root / "run/config.json").read_text())
    assert stored["data"]["bands"] == 4
    results = evaluate.last_results(root / "run")
    assert results.scalars["plain/miou"] > 0.6
    # What was given and what was completed are one run.
    again = train.train_and_evaluate(config, root / "run")
    assert again.scalars == results.scalars
    assert evaluate.evaluate_run(config, root / "run").scalars == pytest.approx(results.scalars)


def test_files_and_arrays_give_one_result(run, tmp_path):
    root, config = run
    model = predictor.load(root / "run")
    path = root / "src/val/images/8.tif"
    with rasterio.open(path) as file:
        values = np.moveaxis(file.read(), 0, -1)
    of_file = model(path)
    np.save(tmp_path / "8.npy", values)
    for given in (str(path), values, values.astype(np.float64), tmp_path / "8.npy"):
        np.testing.assert_array_equal(model(given).labels, of_file.labels)
    assert of_file.image.shape == (*values.shape[:2], 3)
    assert of_file.overlay().dtype == np.uint8
    # By the model itself.
    net, segments, _ = network.from_run(root / "run")
    logits = segments.apply(net.variables, values[None], train=False)["logits"]
    raw = model.infer(model.read(values).pixels)
    np.testing.assert_allclose(raw.logits, logits, atol=1e-4)
    # With a config that does not know the bands.
    assert network.from_run(root / "run", config)[0].bands == net.bands
    # Without data nothing is said.
    values[:5] = np.nan
    result = model(values)
    assert (result.labels[:5] == 255).all()
    assert (result.plain[:5] == 255).all()
    assert (result.labels[5:] != 255).all()
    refined = model.refine(values, np.zeros((8, 12, 2), np.float32))
    assert (refined.labels[:5] == 255).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"\(8, 8, 3\); this model takes 4 bands"),
        (np.zeros((8, 8), np.float32), "takes 4 bands"),
        (np.full((8, 8, 4), np.inf), "256 values are infinite"),
        (np.zeros((8, 8, 4), "U1"), "numbers of type"),
    ],
)
def test_other_arrays_are_refused(run, given, message):
    with pytest.raises(UserError, match=message):
        predictor.load(run[0] / "run")(given)


def test_a_folder_of_them_is_predicted_whole_and_in_tiles(run, tmp_path):
    root, _ = run
    source = tmp_path / "in"
    values = image("float32", 4, 3, (70, 90))
    values[..., 3] = 1000 * (np.indices((70, 90)).sum(axis=0) // 20 % 2)
    values[60:, :30] = -9999
    transform = rasterio.transform.from_origin(500_000, 4_600_000, 10, 10)
    save(values, source / "a.tif", nodata=-9999.0, transform=transform, crs="EPSG:32632")
    np.save(source / "b.npy", np.where(values == -9999, np.nan, values))
    save(values[..., :3], source / "three.tif")
    (source / "clip.mp4").write_bytes(b"")
    model = predictor.load(root / "run")
    summary = predict_files.predict(model, source, writer.Options(tmp_path / "whole"))
    assert summary.images == 2
    assert "three.tif: 3 bands, and this model takes 4" in str(summary)
    assert "not used: 1 file (clip.mp4)" in str(summary)
    tiled = writer.Options(tmp_path / "tiles", tile=32, margin=32)
    assert predict_files.predict(model, source, tiled).images == 2
    padded = dataclasses.replace(model.network)
    whole = predictor.Predictor(padded, pad=32)(source / "a.tif")
    for name in "ab":
        label = cv2.imread(str(tmp_path / f"whole/labels/{name}.png"), 0)
        assert (label[60:, :30] == 255).all()
        with rasterio.open(tmp_path / f"tiles/labels/{name}.tif") as file:
            np.testing.assert_array_equal(file.read(1), whole.labels)
            if name == "a":
                assert (file.transform, file.crs.to_epsg()) == (transform, 32632)
        assert cv2.imread(str(tmp_path / f"tiles/overlays/{name}.png")).shape == (70, 90, 3)


def test_an_exported_network_takes_bands(run, tmp_path):
    root, _ = run
    net = network.from_run(root / "run")[0]
    metadata = stablehlo.write(net, tmp_path / "net.zip", platforms=("cpu",))
    assert metadata["input"].startswith("images, float32")
    assert metadata["input"].split(":")[0].endswith("4)")
    exported = predictor.load(tmp_path / "net.zip")
    assert exported.network.bands == net.bands
    path = root / "src/val/images/9.tif"
    own = predictor.Predictor(net, pad=64)(path)
    found = predictor.Predictor(exported.network, pad=64)(path)
    np.testing.assert_allclose(found.probs, own.probs, atol=1e-5)
    np.testing.assert_array_equal(found.labels, own.labels)


def test_the_page_shows_bands(run):
    root, _ = run
    model = predictor.load(root / "run")
    viewer = view_page.of_files(model, root / "src/val/images")
    picture, _ = viewer.render(dataclasses.replace(viewer.initial(), layer="image"))
    assert picture.shape == (32, 48, 3)
    of_source = view_page.of_source(model, loaded(root / "data", "validation"))
    np.testing.assert_array_equal(
        of_source.result(of_source.initial()).labels, viewer.result(viewer.initial()).labels
    )


def test_windows_are_parts_of_the_whole(tmp_path):
    about = bands.Bands.of([100] * 5, [20] * 5)
    values = image("float32")
    values[2, 3] = np.nan
    for name in ("a.tif", "a.npy", "a.npz"):
        path = save(values, tmp_path / name)
        with inputs.windows(path, about) as file:
            part, there = file.read((1, 9), (2, 30)), file.is_there((1, 9), (2, 30))
            small = file.small(18)
        expected = np.where(np.isnan(values), 100, values)[1:9, 2:30]
        np.testing.assert_array_equal(part, expected)
        assert not there[1, 1]
        assert there.sum() == there.size - 1
        assert small.shape == (12, 18, 3)
    with pytest.raises(DataError, match=r"a\.tif: 5 bands, and this model takes 2"):
        inputs.windows(tmp_path / "a.tif", bands.Bands.of([0, 0], [1, 1]))


def test_image_folder_points_the_way(tmp_path):
    root = folder(tmp_path / "src", count=6)
    with pytest.raises(DataError, match="band_folder"):
        prepare.prepare("image_folder/set", tmp_path / "data", root, image_folder.FolderOptions())
    assert isinstance(root, pathlib.Path)
