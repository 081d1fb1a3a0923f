"""Volumes: files, augmentation, networks, figures, training and prediction in three dimensions."""

import dataclasses
import gzip
import itertools
import json
import shutil
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.spatial

from dilaff_jax import affinity, evaluate, losses, metrics, propagate, settings, train
from dilaff_jax.ablation import ablate_config, config_study, fit
from dilaff_jax.ablation import run as ablation_run
from dilaff_jax.configs import default
from dilaff_jax.data import (
    bands,
    contact_sheet,
    data_config,
    datasets,
    hippocampus,
    pipeline,
    prepare,
    volume_folder,
    volumes,
)
from dilaff_jax.data.augment_volume import VolumeAugmentation, intensity, turned
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.export import onnx, saved_model, stablehlo
from dilaff_jax.models import layers, segmenter, test_time
from dilaff_jax.models.cpu import volume_conv
from dilaff_jax.serving import (
    network,
    predict_files,
    predictor,
    view_page,
    volume_slabs,
    writer,
)
from tests import oracles

nibabel = pytest.importorskip("nibabel", reason="needs the extra [volumes]")
tifffile = pytest.importorskip("tifffile", reason="needs the extra [volumes]")

SIZE = (12, 14, 10)


def scene(seed=0, size=SIZE, classes=3):
    """A volume with a box of class 1 beside one of class 2, and its labels."""
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    x, y, z = (int(rng.integers(1, n // 3)) for n in size)
    label[x : x + 5, y : y + 4, z : z + 4] = 1
    label[x : x + 5, y + 4 : y + 8, z : z + 4] = classes - 1
    values = rng.normal(0, 0.3, size) + np.array([0, 2, -2])[label]
    return (100 + 20 * values).astype(np.float32), label


def nifti(path, values, affine=None, codes=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    if codes:
        orientation = nibabel.orientations
        turn = orientation.ornt_transform(
            orientation.io_orientation(image.affine), orientation.axcodes2ornt(codes)
        )
        image = image.as_reoriented(turn)
    nibabel.save(image, path)
    return path


def folder(root, count=8, suffix=".nii.gz", size=SIZE):
    for seed in range(count):
        values, label = scene(seed, size)
        for kind, array in (("images", values), ("labels", label)):
            path = root / kind / f"v{seed}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".npy":
                np.save(path, array)
            elif suffix == ".tif":
                tifffile.imwrite(path, array)
            else:
                nifti(path, array, np.diag([1, 2, 0.5, 1]))
    return root


def prepared(root, data_dir, **options):
    given = volume_folder.VolumeOptions(**{"classes": "back,one,two", "counts": "5,2,1"} | options)
    return prepare.prepare("volume_folder/set", data_dir, root, given)


def loaded(data_dir, split="train", **changes):
    data = data_config.default(dataset="volume_folder/set", data_dir=str(data_dir), **changes)
    return datasets.load(data, split)


# Files.


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".npy", ".tif"])
def test_records_hold_the_volumes_of_the_files(tmp_path, suffix):
    prepared(folder(tmp_path / "src", suffix=suffix), tmp_path / "data")
    parts = [
        loaded(tmp_path / "data", s, normalise="none") for s in ("train", "validation", "test")
    ]
    assert [len(p) for p in parts] == [5, 2, 1]
    names = [name for part in parts for name in part.names]
    assert sorted(names) == [f"v{i}" for i in range(8)]
    for part in parts:
        for index, name in enumerate(part.names):
            values, label = scene(int(name[1:]))
            example = part[index]
            np.testing.assert_array_equal(example["image"][..., 0], values)
            np.testing.assert_array_equal(example["label"], label)
            expected = [1, 2, 0.5] if "nii" in suffix else [1, 1, 1]
            np.testing.assert_allclose(part.spacings[index], expected)
    trained = np.concatenate([scene(int(n[1:]))[0].ravel() for n in parts[0].names])
    assert parts[0].bands.mean[0] == pytest.approx(trained.mean(dtype=np.float64))
    assert contact_sheet.draw(parts[0]).shape[-1] == 3


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLP", "IPR", "ASR"])
def test_any_order_of_axes_is_one_volume(tmp_path, codes):
    values, label = scene()
    affine = np.array([[0.9, 0.1, 0, 5], [-0.1, 1.9, 0, -7], [0, 0, 3, 2], [0, 0, 0, 1]])
    nifti(tmp_path / "a.nii.gz", values, affine, codes)
    nifti(tmp_path / "b.nii.gz", label, affine, codes)
    volume = volumes.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.values[..., 0], values)
    np.testing.assert_allclose(volume.place.affine, affine, atol=1e-6)
    np.testing.assert_allclose(volume.place.spacing, np.linalg.norm(affine[:3, :3], axis=0))
    labels, place = volumes.load_label(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(labels, label)
    volumes.check_same_place(tmp_path, volume.place, tmp_path, place)
    # And back: the file has the axes and the affine of its volume.
    path = volumes.save_label(tmp_path / "out", "a", label, volume.place)
    found, given = nibabel.load(path), nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(found.affine, given.affine)
    assert found.shape == given.shape
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(
        np.asarray(found.dataobj), np.asarray(nibabel.load(tmp_path / "b.nii.gz").dataobj)
    )


def without_spacing(root):
    """The first voxel size is 0 in the header, as some writers leave it."""
    path = root / "images/v3.nii.gz"
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[280:284] = struct.pack("<f", 0)  # srow_x
    path.write_bytes(gzip.compress(bytes(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: (r / "images/v3.nii.gz").write_bytes(b"\x1f\x8b nothing"),
            "v3.nii.gz: no NIfTI",
        ),
        (
            lambda r: (r / "images/v3.nii.gz").write_bytes(
                (r / "images/v3.nii.gz").read_bytes()[:-400]
            ),
            r"v3\.nii\.gz: no NIfTI that can be read \(damaged or cut off\)",
        ),
        (
            lambda r: nifti(r / "labels/v3.nii.gz", scene(3)[1]),
            r"labels/v3\.nii\.gz: its affine differs from that of .*images/v3\.nii\.gz by up to 1,",
        ),
        (
            lambda r: nifti(r / "labels/v3.nii.gz", scene(3)[1][1:], np.diag([1, 2, 0.5, 1])),
            r"the mask is 11 x 14 x 10, its image .* is 12 x 14 x 10 \(voxels\)",
        ),
        (
            lambda r: nifti(
                r / "labels/v3.nii.gz", scene(3)[1] + np.float32(0.5), np.diag([1, 2, 0.5, 1])
            ),
            r"labels/v3\.nii\.gz: values that are not whole numbers",
        ),
        (
            lambda r: nifti(
                r / "labels/v3.nii.gz", scene(3)[1] + np.uint8(3), np.diag([1, 2, 0.5, 1])
            ),
            r"labels/v3\.nii\.gz: value 3 .*outside the classes: allowed are 0\.\.2, 255",
        ),
        (
            lambda r: nifti(
                r / "images/v3.nii.gz", np.stack([scene(3)[0]] * 2, -1), np.diag([1, 2, 0.5, 1])
            ),
            r"images/v3\.nii\.gz: 2 bands of float32, and .* has 1",
        ),
        (
            lambda r: nifti(
                r / "images/v3.nii.gz",
                np.where(scene(3)[1] > 0, np.nan, scene(3)[0]).astype(np.float32),
                np.diag([1, 2, 0.5, 1]),
            ),
            r"images/v3\.nii\.gz: \d+ values are NaN, first in band 1 at \(.*--nan=missing",
        ),
        (without_spacing, r"v3\.nii\.gz: its voxels measure \(0\.0, 2\.0, 0\.5\); expected"),
        (lambda r: (r / "labels/v3.nii.gz").unlink(), "1 of 8 images have no mask: .*v3"),
    ],
    ids=[
        "garbage",
        "cut",
        "affine",
        "size",
        "halves",
        "classes",
        "channels",
        "nan",
        "flat",
        "none",
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, change, message):
    root = folder(tmp_path / "src")
    change(root)
    with pytest.raises(DataError, match=message):
        prepared(root, tmp_path / "data")
    assert not (tmp_path / "data/volume_folder/set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": "5,2"}, "sum to the 8 volumes there are"),
        ({"counts": "a"}, "--counts=a: want numbers"),
        ({"spacing": "1,1"}, "want three sizes above 0"),
        ({"spacing": "1,0,1"}, "want three sizes above 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        prepared(folder(tmp_path / "src", suffix=".npy"), tmp_path / "data", **options)


def test_spacing_is_given_where_no_file_says_it(tmp_path):
    prepared(folder(tmp_path / "src", suffix=".npy"), tmp_path / "data", spacing="4,4,40")
    np.testing.assert_array_equal(loaded(tmp_path / "data").spacings, [[4, 4, 40]] * 5)
    # A NIfTI says its own.
    prepared(folder(tmp_path / "nifti"), tmp_path / "other", spacing="4,4,40")
    np.testing.assert_allclose(loaded(tmp_path / "other").spacings, [[1, 2, 0.5]] * 5)


def test_missing_voxels_take_the_mean_and_are_ignored(tmp_path):
    root = folder(tmp_path / "src", suffix=".npy")
    values, label = scene(0)
    values[:2] = np.nan
    np.save(root / "images/v0.npy", values)
    prepared(root, tmp_path / "data", nan="missing")
    parts = [
        loaded(tmp_path / "data", s, normalise="none") for s in ("train", "validation", "test")
    ]
    (example,) = [p[p.names.index("v0")] for p in parts if "v0" in p.names]
    assert (example["label"][:2] == 255).all()
    np.testing.assert_allclose(example["image"][:2], np.nanmean(values), rtol=1e-5)
    np.testing.assert_array_equal(example["label"][2:], label[2:])


def test_hippocampus_is_known_by_name(tmp_path):
    root = folder(tmp_path / "src", 20)
    (root / "images").rename(root / "imagesTr")
    (root / "labels").rename(root / "labelsTr")
    prepare.prepare("hippocampus", tmp_path / "data", root)
    data = data_config.default(dataset="hippocampus", data_dir=str(tmp_path / "data"))
    parts = [datasets.load(data, s) for s in ("train", "validation", "test")]
    assert [len(p) for p in parts] == [12, 3, 5]
    assert parts[0].class_names == ("background", "anterior", "posterior")
    given = hippocampus.Builder.options_type(counts="10,5,5")
    prepare.prepare("hippocampus", tmp_path / "data", root, given, overwrite=True)
    assert len(datasets.load(data, "train")) == 10


def test_normalisation_is_of_each_volume_and_channel():
    values = np.random.default_rng(0).gamma(2, 50, (6, 7, 8, 2)).astype(np.float32)
    values[..., 1] = 7
    z = volumes.normalised(values, "zscore")
    np.testing.assert_allclose(z[..., 0].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(z[..., 0].std(), 1, rtol=1e-5)
    assert not z[..., 1].any()
    p = volumes.normalised(values, "percentiles")
    low, high = np.percentile(values[..., 0], [0.5, 99.5])
    np.testing.assert_allclose(
        p[..., 0], ((values[..., 0] - low) / (high - low)).clip(0, 1), atol=1e-6
    )
    np.testing.assert_array_equal(volumes.normalised(values, "none"), values)
    assert {x.dtype for x in (z, p)} == {np.dtype(np.float32)}


# Augmentation.


ABOUT = bands.Bands.of([0.0], [1.0])


def marked(size=(20, 22, 18)):
    """A volume whose value is its label, and every voxel's label tells where it is."""
    label = (np.indices(size) // 3 * np.array([1, 7, 49]).reshape(3, 1, 1, 1)).sum(0) % 200
    return label[..., None].astype(np.float32), label.astype(np.uint8)


@pytest.mark.parametrize("crop", [(8, 9, 10), (24, 9, 10), (24, 25, 26)])
def test_patches_are_parts_with_void_around(crop):
    values, label = marked()
    make = VolumeAugmentation(crop, ABOUT, flip=0.5)
    flipped = set()
    for seed in range(12):
        image, mask = make(values, label, np.random.default_rng(seed))
        assert image.shape == (*crop, 1)
        there = mask != 255
        assert there.sum() == np.prod(np.minimum(crop, label.shape))
        np.testing.assert_array_equal(image[there][:, 0], mask[there])
        assert not image[~there].any()
        axes = [a for a in range(3) for m in [np.flip(mask, a)] if (np.diff(m[there]) != 0).any()]
        flipped.add(tuple(axes))


def test_turning_and_scaling_move_voxels_as_their_matrix_says():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (5, 6, 5)).astype(np.uint8)
    label = np.kron(coarse, np.ones((8, 8, 8), np.uint8))
    values = label[..., None].astype(np.float32)
    make = VolumeAugmentation((16, 16, 16), ABOUT, scale_range=(0.7, 1.4), rotation=30.0)
    for seed in range(8):
        image, mask = make(values, label, np.random.default_rng(seed), (1.0, 1.0, 2.0))
        seen = mask != 255
        same = np.isclose(image[..., 0], mask) & seen
        # But where the linear volume mixes two blocks.
        assert same.sum() > 0.35 * seen.sum()
    # The identity, a quarter turn, and a scale, in millimetres.
    np.testing.assert_allclose(turned(1.0, [0, 0, 0], [1, 2, 3]), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(turned(2.0, [0, 0, 0], [1, 2, 3]), np.eye(3) / 2, atol=1e-12)
    quarter = turned(1.0, [0, 0, 90], [1, 2, 3])
    # One voxel along the second axis, 2 mm, is two voxels of 1 mm along the first.
    np.testing.assert_allclose(quarter @ [0, 1, 0], [-2, 0, 0], atol=1e-12)
    length = np.linalg.norm(turned(1.0, [10, 20, 30], [1, 2, 3]) @ [0, 1, 0] * np.array([1, 2, 3]))
    assert length == pytest.approx(2)


def test_rare_classes_are_drawn_as_often_as_is_asked():
    label = np.zeros((40, 40, 40), np.uint8)
    label[3:5, 3:5, 3:5], label[35, 35, 35] = 1, 2
    make = VolumeAugmentation((8, 8, 8), ABOUT, rare=0.5)
    counts = np.zeros(3)
    for seed in range(400):
        first = make.choose(label, np.random.default_rng(seed))
        part = label[tuple(slice(a, a + 8) for a in first)]
        counts += [part.size > 0, (part == 1).any(), (part == 2).any()]
    assert 0.18 < counts[1] / 400 < 0.35
    assert 0.18 < counts[2] / 400 < 0.35


def test_intensity_follows_its_draws():
    image = np.random.default_rng(1).normal(3, 2, (6, 7, 8, 2)).astype(np.float32)
    kinds = set()
    for seed in range(40):
        found = intensity(image, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        use = rng.random(4) < 0.5
        factor, shift, noise, gamma = (
            rng.uniform(a, b) for a, b in ((0.75, 1.25), (-0.25, 0.25), (0, 0.1), (0.7, 1.5))
        )
        expected = image.astype(np.float64)
        mean, std = expected.mean((0, 1, 2)), expected.std((0, 1, 2))
        if use[0]:
            expected = mean + factor * (expected - mean)
        if use[1]:
            expected = expected + shift * std
        if use[2]:
            expected = expected + noise * std * rng.standard_normal(image.shape, np.float32)
        if use[3]:
            low, high = expected.min((0, 1, 2)), expected.max((0, 1, 2))
            expected = low + (high - low) * ((expected - low) / (high - low)) ** gamma
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        kinds.add(tuple(use.tolist()))
    assert len(kinds) > 10


def test_batches_are_of_seed_and_step_alone(tmp_path):
    prepared(folder(tmp_path / "src"), tmp_path / "data")
    data = data_config.default(
        dataset="volume_folder/set",
        data_dir=str(tmp_path / "data"),
        crop_size=(8, 10, 8),
        rotation=20.0,
        rare=0.5,
    )
    source = datasets.load(data, "train")
    batches = []
    for workers in (0, 2):
        data.workers = workers
        with pipeline.train_batches(data, source, batch_size=4, seed=3) as stream:
            batches.append([next(stream) for _ in range(2)])
    for one, other in zip(*batches, strict=True):
        assert one["image"].shape == (4, 8, 10, 8, 1)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    data.crop_size = (8, 10)
    with pytest.raises(UserError, match="holds volumes; give 3 sides"):
        pipeline.train_batches(data, source, batch_size=4, seed=3)
    with pytest.raises(UserError, match=r"config\.data\.resize is 0\.5, and"):
        loaded(tmp_path / "data", resize=0.5)


# Networks.


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 9])
def test_a_convolution_of_volumes_is_torchs(stride, dilation, channels):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 9, 8, channels)).astype(np.float32)
    w = rng.normal(size=(3, 3, 3, channels, 6)).astype(np.float32)

    def ours(x, w):
        pads = [(dilation, dilation)] * 3
        return volume_conv.conv(x, w, (stride,) * 3, pads, rhs_dilation=(dilation,) * 3)

    tx, tw = (torch.tensor(a, requires_grad=True) for a in (x, w))
    y = torch.nn.functional.conv3d(
        tx.permute(0, 4, 1, 2, 3), tw.permute(4, 3, 0, 1, 2), None, stride, dilation, dilation
    ).permute(0, 2, 3, 4, 1)
    given = rng.normal(size=y.shape).astype(np.float32)
    (y * torch.tensor(given)).sum().backward()
    found, pull = jax.vjp(ours, x, w)
    for a, b in zip((found, *pull(jnp.asarray(given))), (y, tx.grad, tw.grad), strict=True):
        expected = b.detach().numpy()
        np.testing.assert_allclose(a, expected, atol=1e-5 * np.abs(expected).max())


def network_of(**changes):
    config = {
        "encoder": "unet",
        "encoder_options": {"widths": (4, 6, 8), "mean": (0.0,), "std": (1.0,)},
        "decoder": "unet",
        "decoder_options": {"widths": (6, 4)},
        "output_stride": 8,
        "ndim": 3,
        "norm": "instance",
        "affinity": {"sources": ("decoder", "stride1", "image"), "stride": 1, "width": 6}
        | {"dilations": (1, 2), "rates": (1,)},
    }
    return segmenter.build(config | changes, 3)


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("decoder", [("unet", {"widths": (6, 4)}), ("fcn", {"width": 4})])
def test_networks_of_volumes_give_maps_of_three_dimensions(norm, decoder):
    model = network_of(norm=norm, decoder=decoder[0], decoder_options=decoder[1])
    x = np.random.default_rng(0).normal(size=(2, 9, 11, 10, 1)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    out = model.apply(variables, x, train=False)
    assert out["logits"].ndim == 5
    assert out["affinity_logits"].shape == (2, 9, 11, 10, 52)
    np.testing.assert_array_equal(model.offsets, affinity.offsets((1, 2), 3))
    # Each volume by itself but for BatchNorm, which is in evaluation.
    alone = model.apply(variables, x[1:], train=False)
    np.testing.assert_allclose(out["logits"][1:], alone["logits"], atol=1e-5)

    def loss(params):
        out, _ = model.apply(
            variables | {"params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        return jnp.sum(out["logits"] ** 2) + jnp.sum(out["affinity_logits"] ** 2)

    for gradient in jax.tree.leaves(jax.grad(loss)(variables["params"])):
        assert np.isfinite(gradient).all()


def test_a_slice_of_a_network_of_volumes_sees_its_neighbours():
    model = network_of()
    x = np.random.default_rng(0).normal(size=(1, 9, 9, 9, 1)).astype(np.float32)
    variables = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    before = model.apply(variables, x, train=False)["affinity_logits"]
    for axis in range(3):
        changed = x.copy()
        changed[(slice(None), *(slice(None),) * axis, 4)] += 1
        after = model.apply(variables, changed, train=False)["affinity_logits"]
        for place in (3, 5):
            at = (slice(None), *(slice(None),) * axis, place)
            assert np.abs(after[at] - before[at]).max() > 1e-6


def test_instance_normalisation_is_of_each_channel():
    class Net(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x):
            return layers.norm(5, layers.Style("instance", ndim=3), False)(x)

    x = np.random.default_rng(0).normal(3, 2, (2, 4, 5, 6, 5)).astype(np.float32)
    y = Net().apply(Net().init(jax.random.key(0), x), x)
    mean, var = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet50", "encoder_options": {}}, "'resnet50' is made for images"),
        ({"decoder": "deeplabv3", "decoder_options": {}}, "'deeplabv3' is made for images"),
        ({"segmentation": {"align_corners": True}}, "align_corners is of images"),
        ({"ndim": 4}, "ndim is 4; expected one of 2, 3"),
    ],
)
def test_networks_that_cannot_be_of_volumes(changes, message):
    with pytest.raises(UserError, match=message):
        network_of(**changes)


def test_images_are_no_volumes():
    model = network_of()
    variables = segmenter.abstract_variables(model)
    with pytest.raises(UserError, match=r"shape \(1, 8, 8, 1\); expected \[B, D, H, W, 1\]"):
        jax.eval_shape(lambda v: model.apply(v, jnp.zeros((1, 8, 8, 1)), train=False), variables)


def test_windows_of_volumes_are_weighted_by_a_gaussian():
    offsets = affinity.offsets((1,), 3)
    x = np.random.default_rng(0).normal(size=(1, 11, 12, 13, 1)).astype(np.float32)

    def apply(x):
        # Differs from window to window, so that weights matter.
        place = x + x.mean(axis=(1, 2, 3), keepdims=True)
        return {"logits": jnp.tile(place, 2), "affinity_logits": jnp.tile(place, 26)}

    config = ml_collections.ConfigDict(
        {"window": (6, 6, 6), "stride": 0.5, "scales": (1.0,), "flip": False}
    )
    logits, edges = test_time.infer(apply, jnp.asarray(x), offsets, config)
    weight = np.ones((6, 6, 6))
    for place in itertools.product(range(6), repeat=3):
        squares = sum(((p - 2.5) / (6 / 8)) ** 2 for p in place)
        weight[place] = max(np.exp(-squares / 2), 1e-3)
    total, weights = np.zeros(x.shape), np.zeros(x.shape)
    for corner in itertools.product(*(test_time.window_starts(n, 6, 0.5, 1) for n in x.shape[1:4])):
        part = (0, *(slice(a, a + 6) for a in corner))
        seen = x[part]
        total[part] += weight[..., None] * (seen + seen.mean())
        weights[part] += weight[..., None]
    np.testing.assert_allclose(logits[..., :1], total / weights, atol=1e-4)
    np.testing.assert_allclose(edges[..., 3:4], total / weights, atol=1e-4)
    config.window = (6, 6)
    with pytest.raises(UserError, match=r"window is \(6, 6\); expected 3 sides"):
        test_time.infer(apply, jnp.asarray(x), offsets, config)


# Figures.


def distances(a, b, spacing):
    """Of the surfaces of two masks, by loops over voxels."""

    def surface(mask):
        found = []
        for place in np.argwhere(mask):
            for axis, step in itertools.product(range(3), (-1, 1)):
                near = place.copy()
                near[axis] += step
                inside = (near >= 0).all() and (near < mask.shape).all()
                if not inside or not mask[tuple(near)]:
                    found.append(place * spacing)
                    break
        return np.array(found)

    table = scipy.spatial.distance.cdist(surface(a), surface(b))
    return np.concatenate([table.min(axis=1), table.min(axis=0)])


@pytest.mark.parametrize("seed", range(4))
def test_surfaces_are_those_of_loops_over_voxels(seed):
    rng = np.random.default_rng(seed)
    spacing = np.array([1.0, 0.7, 2.5])
    true = np.kron(rng.integers(0, 3, (3, 3, 2)), np.ones((3, 3, 4))).astype(np.uint8)
    pred = np.roll(true, 1, axis=seed % 3)
    true[rng.random(true.shape) < 0.05] = 255
    counts = metrics.surfaces(pred, true, 4, spacing, tolerance=1.5)
    pred = np.where(true == 255, 255, pred)
    for c in range(4):
        a, b = pred == c, true == c
        assert counts.volumes[c] == (a.any() or b.any())
        if not a.any() or not b.any():
            continue
        found = distances(a, b, spacing)
        assert counts.dice[c] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert counts.surface_dice[c] == pytest.approx(np.mean(found <= 1.5))
        assert counts.hausdorff[c] == pytest.approx(np.percentile(found, 95))


def test_classes_that_are_missing_are_defined():
    true, pred = np.zeros((4, 5, 6), np.uint8), np.zeros((4, 5, 6), np.uint8)
    true[1, 1, 1] = 1
    pred[2, 2, 2] = 2
    counts = metrics.surfaces(pred, true, 4, (1, 1, 2), 1.0)
    np.testing.assert_array_equal(counts.volumes, [1, 1, 1, 0])
    np.testing.assert_array_equal(counts.dice[1:], 0)
    np.testing.assert_array_equal(counts.surface_dice[1:], 0)
    diagonal = np.linalg.norm([4, 5, 12])
    np.testing.assert_allclose(counts.hausdorff[1:], [diagonal, diagonal, 0])
    whole = metrics.surfaces(true, true, 4, (1, 1, 2), 1.0)
    summary = metrics.surface_summary(metrics.add(counts, whole), list("abcd"))
    assert summary["dice/b"] == 0.5
    assert summary["dice/c"] == 0
    assert np.isnan(summary["dice/d"])
    assert summary["dice"] == 0.25  # without the background
    assert summary["hausdorff/b"] == pytest.approx(diagonal / 2)
    with pytest.raises(UserError, match="expected 3 sizes above 0"):
        metrics.surfaces(pred, true, 4, (1, 1), 1.0)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"embedding": 3, "rates": ()}])
def test_the_head_takes_neighbours_by_the_size_of_voxels(options):
    """Channels, targets, loss, bias and propagation agree on what a dilation is."""
    head = {"sources": ("decoder",), "stride": 1, "width": 4, "rates": (1,), "dilations": (1, 4)}
    config = {
        "encoder": "unet",
        "encoder_options": {"widths": (4, 6), "mean": (0.0,), "std": (1.0,)},
        "decoder": "unet",
        "decoder_options": {"widths": (4,)},
        "norm": "instance",
        "ndim": 3,
        "affinity": head | options | {"spacing": (4.0, 1.0, 1.0)},
    }
    model = segmenter.build(config, 3)
    np.testing.assert_array_equal(
        model.offsets, affinity.offsets((1, 4), 3, spacing=(4.0, 1.0, 1.0))
    )
    assert model.offsets[26:].max(axis=0).tolist() == [1, 4, 4]
    image, label = scene(0, (6, 8, 7))
    image, label = image[None, ..., None].astype(np.float32), label[None]
    variables = model.init(jax.random.key(0), image, train=False)
    outputs = model.apply(variables, image, train=False)
    edges = outputs["affinity_logits"]
    assert edges.shape == (1, 6, 8, 7, 52)
    target, valid = affinity.targets(label, model.offsets)
    total = losses.affinity_balanced(edges, target, valid, 2)
    by_hand = [
        [float((v * side).sum()) for side in (t, 1 - t)]
        for t, v in zip(
            np.split(np.asarray(target, np.float32), 2, axis=-1),
            np.split(np.asarray(valid, np.float32), 2, axis=-1),
            strict=True,
        )
    ]
    np.testing.assert_allclose(total.count, by_hand)
    bias = propagate.per_offset(np.array([1.0, 2.0]), model.offsets)
    assert bias.tolist() == [1.0] * 26 + [2.0] * 26
    probs = jax.nn.softmax(outputs["logits"])
    found = propagate.random_walk(probs, jax.nn.sigmoid(edges), model.offsets, steps=2)
    alone = np.asarray(jax.nn.sigmoid(edges))[0]
    expected = oracles.csr_random_walk(np.asarray(probs)[0], alone, model.offsets, steps=2)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


# A trained network, and what it is for.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    folder(root / "src", 12, size=(16, 18, 14))
    prepared(root / "src", root / "data", counts="8,2,2")
    config = default.get_config()
    config.data.update({"dataset": "volume_folder/set", "data_dir": str(root / "data")})
    config.data.update({"crop_size": (12, 12, 12), "rare": 0.5, "scale_range": (1.0, 1.0)})
    config.model.update({"encoder": "unet", "decoder": "unet", "output_stride": 8})
    config.model.encoder_options = {"widths": (16, 24)}
    config.model.decoder_options = {"widths": (16,), "dropout": 0.0}
    config.model.norm = "instance"
    config.model.affinity = {"sources": ("decoder", "stride1"), "stride": 1, "width": 6}
    config.model.affinity.update({"dilations": (1, 2), "rates": (1,)})
    config.loss.segmentation = "cross_entropy + dice"
    config.optim.update({"name": "adamw", "learning_rate": 5e-3, "warmup_steps": 20})
    config.num_steps, config.batch_size, config.log_every = 200, 4, 20
    config.eval_every = config.checkpoint_every = 200
    config.best_metric = "dice"
    config.eval.update({"batch_size": 4, "pictures": 1, "predictions": True})
    train.train_and_evaluate(config, root / "run")
    return root, config


def test_it_learns_volumes(run):
    root, config = run
    results = evaluate.last_results(root / "run")
    assert results.scalars["plain/dice"] > 0.7
    assert results.scalars["refined/surface_dice"] > 0.7
    assert 0 <= results.scalars["refined/hausdorff"] < 20
    # What is counted is what is written, once.
    source = loaded(root / "data", "validation")
    expected = np.zeros((3, 3), np.int64)
    for index, name in enumerate(source.names):
        found = np.load(root / f"run/evaluation/200/predictions/plain/{name}.npy")
        np.add.at(expected, (source[index]["label"].ravel(), found.ravel()), 1)
    ious = np.diag(expected) / (expected.sum(0) + expected.sum(1) - np.diag(expected))
    assert results.scalars["plain/miou"] == pytest.approx(ious.mean())
    again = train.train_and_evaluate(config, root / "run")
    assert again.scalars == results.scalars
    assert list((root / "run/evaluation/200").rglob("*.png"))


def test_files_of_volumes_are_predicted_in_their_place(run, tmp_path):
    root, _ = run
    model = predictor.load(root / "run")
    values, label = scene(3, (15, 17, 13))
    affine = np.array([[0, -1.0, 0, 3], [2.0, 0, 0, 1], [0, 0, 0.5, 9], [0, 0, 0, 1]])
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
    nifti(tmp_path / "in/a.nii.gz", values, affine)
    nifti(tmp_path / "in/sub/b.nii", values, affine, "SPL")
    np.save(tmp_path / "in/c.npy", np.asarray(canonical.dataobj))
    tifffile.imwrite(tmp_path / "in/d.tif", np.asarray(canonical.dataobj))
    (tmp_path / "in/e.nii.gz").write_bytes(b"nothing")
    (tmp_path / "in/notes.txt").write_text("x")
    options = writer.Options(tmp_path / "out", propagation="both", probs=True)
    summary = predict_files.predict(model, tmp_path / "in", options)
    assert summary.images == 4
    assert "e.nii.gz: no NIfTI that can be read" in str(summary)
    assert "not used: 1 file (notes.txt)" in str(summary)
    found = {
        "a": nibabel.load(tmp_path / "out/labels/a.nii.gz"),
        "b": nibabel.load(tmp_path / "out/labels/sub/b.nii"),
    }
    np.testing.assert_allclose(found["a"].affine, affine)
    assert nibabel.aff2axcodes(found["b"].affine) == ("S", "P", "L")
    maps = [np.asarray(nibabel.as_closest_canonical(f).dataobj) for f in found.values()]
    maps += [np.load(tmp_path / "out/labels/c.npy"), tifffile.imread(tmp_path / "out/labels/d.tif")]
    whole = model(np.asarray(canonical.dataobj))
    for labels in maps:
        np.testing.assert_array_equal(labels, whole.labels)
    with np.load(tmp_path / "out/probs/c.npz") as probs:
        assert probs["probs"].shape == (*maps[0].shape, 3)
    assert whole.overlay().shape == (*np.rot90(maps[0][:, :, 0]).shape, 3)
    truth = np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(label, affine)).dataobj)
    assert np.mean(whole.labels == truth) > 0.9


def test_an_exported_network_takes_volumes(run, tmp_path):
    root, _ = run
    net = network.from_run(root / "run")[0]
    metadata = stablehlo.write(net, tmp_path / "net.zip", platforms=("cpu",))
    assert metadata["ndim"] == 3
    exported = predictor.load(tmp_path / "net.zip")
    values, _ = scene(5, (16, 14, 12))
    own, found = (
        predictor.Predictor(net, pad=32)(values),
        predictor.Predictor(exported.network, pad=32)(values),
    )
    np.testing.assert_allclose(found.probs, own.probs, atol=1e-5)
    np.testing.assert_array_equal(found.labels, own.labels)
    with pytest.raises(UserError, match="--size has 2 sides; this model needs 3"):
        stablehlo.write(net, tmp_path / "b.zip", size=(8, 8))
    with pytest.raises(UserError, match="a refiner is of images"):
        stablehlo.write(net, tmp_path / "b.zip", refiner=3)
    with pytest.raises(UserError, match="ONNX files are of images"):
        onnx.write(net, tmp_path / "b.onnx", (8, 8, 8))
    with pytest.raises(UserError, match="SavedModels are of images"):
        saved_model.write(net, tmp_path / "b")


@pytest.mark.parametrize("mode", ["shard_map", "fsdp"])
def test_all_ways_to_spread_a_batch_give_one_run(run, tmp_path, mode):
    _, config = run
    losses = []
    for name, devices in (("pmap", 1), (mode, 4)):
        changed = config.copy_and_resolve_references()
        changed.num_steps, changed.log_every, changed.eval_every = 3, 1, 3
        changed.optim.warmup_steps, changed.eval.predictions = 0, False
        changed.parallel.mode, changed.parallel.devices = name, devices
        train.train_and_evaluate(changed, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses.append([line["train/loss"] for line in found if "train/loss" in line])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8), np.float32), r"shape \(8, 8\); expected a volume"),
        (np.zeros((8, 8, 8, 2), np.float32), "2 bands, and this model takes 1"),
        (np.full((8, 8, 8), np.inf), "512 values are infinite"),
    ],
)
def test_other_arrays_are_refused(run, given, message):
    with pytest.raises(UserError, match=message):
        predictor.load(run[0] / "run")(given)


def test_an_operator_is_chosen_for_volumes_and_evaluation_takes_it(run, tmp_path):
    """Its figures are those of an evaluation, by other code."""
    root, config = run
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.ablate = ablate_config.default()
        config.ablate.criterion = "boundary_f"
        config.ablate.grid = {
            "signed": {"steps": (2,), "strength": (0.02, 0.3), "bias": ("fitted", 0.0)}
        }
    content = fit.fit_run(config, workdir)
    assert len(content["candidates"]) == 5
    assert list(content["bias"]) == ["1", "2"]
    assert content["after"]["boundary_f"] >= content["before"]["boundary_f"]
    results = evaluate.evaluate_run(network.read_config(workdir), workdir)
    for figure in ("miou", "boundary_f"):
        for kind, when in (("plain", "before"), ("refined", "after")):
            found = results.scalars[f"{kind}/{figure}"]
            assert found == pytest.approx(content[when][figure], abs=2e-3), (kind, figure)


@pytest.fixture(scope="module")
def windowed(run):
    """The network, which sees windows of 12³ of what is larger."""
    root, _ = run
    config = network.read_config(root / "run")
    config.inference.window, config.inference.stride = (12, 12, 12), 0.5
    return predictor.load(root / "run", config=config)


LONG = np.random.default_rng(5).normal(size=(70, 20, 15)).astype(np.float32)


@pytest.mark.parametrize(
    "refine",
    [
        {"name": "signed", "steps": 3, "bias": (0.5, -0.25)},
        {"name": "random_walk", "steps": 2, "order": "coarse_to_fine"},
        {"name": "identity"},
    ],
)
def test_slabs_give_what_the_whole_volume_gives(windowed, monkeypatch, refine):
    model = predictor.Predictor(dataclasses.replace(windowed.network, refine=refine))
    whole = model(LONG)
    assert whole.affinity_logits is not None
    monkeypatch.setattr(volume_slabs, "LARGE", 10**6)
    assert volume_slabs.are_needed(model.network, LONG.shape)
    slabs = model(LONG)
    np.testing.assert_allclose(slabs.probs, whole.probs, atol=2e-5)
    for found, expected in ((slabs.labels, whole.labels), (slabs.plain, whole.plain)):
        assert (found != expected).mean() < 1e-3  # ties
    assert slabs.affinity_logits is None
    assert slabs.edges is None
    assert slabs.overlay().shape == whole.overlay().shape
    without = model(LONG, refine=False)
    np.testing.assert_array_equal(without.labels, without.plain)


def test_slabs_follow_one_another_and_hold_no_more_of_a_deeper_volume(windowed):
    """What NumPy holds at most, beside the volume and its result."""
    peaks = []
    for depth in (60, 240):
        pixels = np.zeros((depth, 14, 14, 1), np.float32)
        pixels[..., 0] = np.random.default_rng(0).normal(size=pixels.shape[:-1])
        at = 0
        tracemalloc.start()
        for slab in volume_slabs.slabs(windowed.network, pixels, windowed.network.refine):
            assert slab.start == at < slab.stop
            assert slab.labels.shape == (slab.stop - slab.start, 14, 14)
            at = slab.stop
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert at == depth
    affinities = 4 * 240 * 14 * 14 * 52
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 0.6 * affinities


def test_what_is_seen_whole_has_no_slabs(run, windowed, monkeypatch):
    root, _ = run
    monkeypatch.setattr(volume_slabs, "LARGE", 0)
    assert not volume_slabs.are_needed(windowed.network, (12, 12, 12))
    assert volume_slabs.are_needed(windowed.network, (12, 12, 13))
    assert not volume_slabs.are_needed(predictor.load(root / "run").network, (90, 90, 90))
    config = network.read_config(root / "run")
    config.inference.window, config.inference.flip = (12, 12, 12), True
    assert predictor.load(root / "run", config=config).network.windows is None


def test_the_page_shows_slices_across_any_axis_as_long_as_they_are(run):
    root, _ = run
    model = predictor.load(root / "run")
    source = loaded(root / "data", "validation")
    viewer = view_page.of_source(model, source)
    assert viewer.is_of_volumes
    label, spacing = source[0]["label"], source.spacings[0]
    result = viewer.result(viewer.initial())
    change = model.correction(model.infer(source[0]["image"]), model.operator)
    whole = model.finish(np.zeros(()), model.infer(source[0]["image"]), change)
    np.testing.assert_array_equal(result.labels, whole.labels)
    for axis, position in itertools.product(range(3), (0.0, 0.4, 1.0)):
        index = min(int(position * label.shape[axis]), label.shape[axis] - 1)
        look = {"axis": axis, "position": position, "opacity": 1.0}
        for layer, maps in (("truth", label), ("after", whole.labels), ("before", whole.plain)):
            settings = dataclasses.replace(viewer.initial(), layer=layer, **look)
            shown, text = viewer.render(settings)
            first, second = (a for a in range(3) if a != axis)
            least = min(spacing[first], spacing[second])
            size = [round(label.shape[a] * spacing[a] / least) for a in (second, first)]
            assert shown.shape == (*size, 3)
            flat = maps.take(index, axis=axis).T[::-1]
            if size == list(flat.shape):
                np.testing.assert_array_equal(shown, source.colors[flat])
            assert "right before" in text
    edges = dataclasses.replace(viewer.initial(), layer="edges, dilation 2", axis=0)
    assert viewer.render(edges)[0].ndim == 3
    of_files = view_page.of_files(model, root / "src/images")
    assert len(of_files.names) == 12
    assert of_files.render(of_files.initial())[0].ndim == 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_click_in_a_slice_shows_the_neighbours_within_it(run, axis):
    """By a loop over offsets; a cell is a voxel here."""
    root, _ = run
    model = predictor.load(root / "run")
    source = loaded(root / "data", "validation")
    viewer = view_page.of_source(model, source)
    settings = dataclasses.replace(viewer.initial(), axis=axis, position=0.5)
    shape = source[0]["label"].shape
    first, second = (a for a in range(3) if a != axis)
    own = [3, 3, 3]
    own[axis] = int(0.5 * shape[axis])
    height, width = viewer.render(settings)[0].shape[:2]
    x = (own[first] + 0.5) * width / shape[first]
    y = (shape[second] - 1 - own[second] + 0.5) * height / shape[second]
    found = {w.offset: w for w in viewer.weights(settings, x, y)}
    result = viewer.result(settings)
    expected = {}
    for k, o in enumerate(result.offsets.tolist()):
        there = [a + b for a, b in zip(own, o, strict=True)]
        if o[axis] == 0 and all(0 <= t < n for t, n in zip(there, shape, strict=True)):
            expected[tuple(o)] = (result.affinity[(*own, k)], there)
    assert found.keys() == expected.keys()
    assert len(found) >= 8
    for offset, (affinity_, there) in expected.items():
        weight = found[offset]
        assert weight.affinity == pytest.approx(affinity_, abs=1e-6)
        assert weight.x == pytest.approx((there[first] + 0.5) * width / shape[first])
        assert weight.step == (-np.sign(offset[second]), np.sign(offset[first]))
        assert weight.dilation == max(map(abs, offset))


def test_what_is_of_images_alone_says_so(run, tmp_path):
    root, config = run
    model = predictor.load(root / "run")
    with pytest.raises(UserError, match="others' results are not refined"):
        model.refine(np.zeros((8, 8, 8)), np.zeros((8, 8, 8, 3)))
    for changes in ({"tile": 64}, {"edges": True}):
        with pytest.raises(UserError, match="tile and edges are of images"):
            predict_files.predict(model, root / "src/images", writer.Options(tmp_path, **changes))
    with pytest.raises(UserError, match="volumes are not scaled"):
        predictor.Predictor(model.network, resize=0.5)(np.zeros((8, 8, 8)))
    for mode in (ablation_run.ablate, config_study.study):
        with pytest.raises(
            UserError, match=r"holds volumes, and an ablation .* is of images; --mo"
        ):
            mode(config, tmp_path / "none")
    images = segmenter.build({"encoder": "unet", "decoder": "unet", "output_stride": 32}, 2)
    with pytest.raises(UserError, match="is of volumes, and this data set holds images"):
        settings.check_best_metric("dice", ("a", "b"), images)
