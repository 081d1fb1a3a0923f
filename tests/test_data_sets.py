"""Each data set, from small archives and folders of its official layout."""

import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from dilaff_jax.configs import camvid_deeplabv3plus_lite0
from dilaff_jax.data import (
    builder,
    camvid,
    cityscapes,
    data_config,
    datasets,
    images,
    prepare,
    scene_parse150,
    voc2012_seg,
)
from dilaff_jax.data.images import DataError
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import machine
from tests.data_files import classes_map, image_folder, picture, save, save_palette


def loaded(dataset, data_dir, split="train", **kwargs):
    return datasets.load(
        data_config.default(dataset=dataset, data_dir=str(data_dir), **kwargs), split
    )


def labels(source):
    return {name: source[i]["label"] for i, name in enumerate(source.names)}


def test_names_lists_every_data_set():
    found = set(datasets.names())
    assert found == {
        *("annotation_json", "band_folder", "camvid", "cityscapes", "coco_json", "hippocampus"),
        *("image_folder", "scene_parse150", "shapes", "voc2012_seg", "volume_folder"),
    }


@pytest.mark.parametrize("name", ["camvids", "pipeline", "../shapes", "os", ""])
def test_unknown_data_sets_are_refused_with_the_list(name):
    with pytest.raises(
        ValueError,
        match="available: annotation_json, band_folder, camvid, cityscapes, coco_json, hippocampus",
    ):
        datasets.builder_class(name)


@pytest.mark.parametrize(
    "name", ["camvid", "cityscapes", "scene_parse150", "shapes", "voc2012_seg"]
)
def test_every_class_has_a_name_and_a_colour_of_its_own(name):
    cls = datasets.builder_class(name)
    count = {"camvid": 11, "cityscapes": 19, "scene_parse150": 150, "voc2012_seg": 21, "shapes": 8}
    assert len(cls.class_names) == len(cls.colors) == count[name]
    assert len(set(cls.class_names)) == len(set(cls.colors)) == count[name]


# CamVid.


def write_camvid(root, names, image_dir, label_dir, void):
    for seed, name in enumerate(names):
        label = classes_map(classes=11, seed=seed)
        label[5] = void
        save(picture(seed=seed), root / image_dir / f"{name}.png")
        save(label, root / label_dir / f"{name}.png")


@pytest.mark.parametrize(
    ("layout", "void"),
    [("{0}/images {0}/labels", 255), ("{0} {0}annot", 11)],
    ids=["ours", "segnet"],
)
def test_camvid_from_both_split_layouts(tmp_path, layout, void):
    for split in ("train", "val", "test"):
        write_camvid(tmp_path / "in", [f"0001TP_{split}"], *layout.format(split).split(), void)
    prepare.prepare("camvid", tmp_path / "out", tmp_path / "in")
    for split in ("train", "validation", "test"):
        source = loaded("camvid", tmp_path / "out", split)
        label = source[0]["label"]
        assert len(source) == 1
        assert (label[5] == 255).all()
        assert set(np.unique(label[:5])) == set(range(11))
        np.testing.assert_array_equal(source[0]["image"], picture())


def test_camvid_from_the_original_frames(tmp_path):
    colours = {
        "void": (0, 0, 0),
        "sky": (128, 128, 128),
        "suv": (64, 128, 192),
        "kid": (192, 128, 64),
    }
    rgb = np.zeros((4, 10, 3), np.uint8)
    for row, colour in enumerate(colours.values()):
        rgb[row] = colour
    names = ["0001TP_006690", "0001TP_008550", "0016E5_07959", "0016E5_08160", "Seq05VD_f00000"]
    for name in names:
        save(picture(4, 10), tmp_path / "in/701_StillsRaw_full" / f"{name}.png")
        save(rgb, tmp_path / "in/LabeledApproved_full" / f"{name}_L.png")
    prepare.prepare("camvid", tmp_path / "out", tmp_path / "in")
    found = {s: loaded("camvid", tmp_path / "out", s).names for s in builder.SPLITS}
    assert found["train"] == ["0001TP_006690", "0016E5_08160"]
    assert found["validation"] == ["0016E5_07959"]
    assert found["test"] == ["0001TP_008550", "Seq05VD_f00000"]
    index = camvid.CLASSES.index
    label = loaded("camvid", tmp_path / "out")[0]["label"]
    assert label[:, 0].tolist() == [255, index("sky"), index("car"), index("pedestrian")]


def test_camvid_names_a_colour_it_does_not_know(tmp_path):
    rgb = np.full((4, 10, 3), (1, 2, 3), np.uint8)
    save(picture(4, 10), tmp_path / "in/701_StillsRaw_full/0001TP_006690.png")
    save(rgb, tmp_path / "in/LabeledApproved_full/0001TP_006690_L.png")
    with pytest.raises(DataError, match=r"_L\.png: colour #010203 \(40 pixels\).*--other_colors"):
        prepare.prepare("camvid", tmp_path / "out", tmp_path / "in")
    options = camvid.CamvidOptions(other_colors="ignore")
    prepare.prepare("camvid", tmp_path / "out", tmp_path / "in", options)
    assert (loaded("camvid", tmp_path / "out")[0]["label"] == 255).all()


def test_camvid_frames_fall_into_the_customary_splits(real_data):
    for folder, split in (("train", "train"), ("val", "validation")):
        names = [p.stem for p in (real_data / "camvid" / folder / "images").iterdir()]
        assert {camvid.split_of(name) for name in names} == {split}


def test_real_camvid_is_read_exactly(real_data, tmp_path):
    prepare.prepare("camvid", tmp_path, real_data / "camvid")
    train, validation = (loaded("camvid", tmp_path, s) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (367, 101)
    assert {tuple(size) for size in train.sizes} == {(360, 480)}
    for i in (0, 100, 366):
        file = real_data / "camvid/train/labels" / f"{train.names[i]}.png"
        np.testing.assert_array_equal(train[i]["label"], np.asarray(Image.open(file)))
    share = 100 * train.class_pixels / train.class_pixels.sum()
    want = [17.5, 24.2, 1.0, 33.0, 4.7, 10.1, 1.2, 1.2, 6.1, 0.7, 0.3]
    np.testing.assert_allclose(share, want, atol=0.06)
    weights = np.sqrt(np.median(share) / share)
    np.testing.assert_allclose(camvid_deeplabv3plus_lite0.CLASS_WEIGHTS, weights, atol=0.0051)


def test_real_labelmefacade_is_an_image_folder(real_data, tmp_path):
    names = "building,car,door,pavement,road,sky,vegetation,window"
    options = datasets.builder_class("image_folder").options_type(classes=names)
    dataset = "image_folder/labelmefacade"
    prepare.prepare(dataset, tmp_path, real_data / "labelmefacade", options)
    source = loaded(dataset, tmp_path, "validation")
    assert source.class_names == tuple(names.split(","))
    assert len(loaded(dataset, tmp_path)) == 500
    assert len(source) == 100
    assert len({tuple(size) for size in source.sizes}) == 5
    for i in range(0, 100, 9):
        file = real_data / "labelmefacade/val/labels" / f"{source.names[i]}.png"
        np.testing.assert_array_equal(source[i]["label"], np.asarray(Image.open(file)))
        assert source[i]["image"].shape[:2] == tuple(source.sizes[i])


# PASCAL VOC.


def write_voc(root, more=()):
    """Both official archives in miniature: 2 train and `more`, 2 val, 4 SBD, one of each of them."""
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (sbd / "cls").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(("2007_1", "2007_2", *more)))
    (voc / "ImageSets/Segmentation/val.txt").write_text("2007_3\n2007_4\n")
    (sbd / "train.txt").write_text("2007_2\n2008_5\n2008_6\n")
    (sbd / "val.txt").write_text("2007_3\n")
    for n in (1, 2, 3, 4, 5, 6):
        name = f"200{7 if n < 5 else 8}_{n}"
        save(picture(seed=n), voc / "JPEGImages" / f"{name}.jpg", quality=95)
        label = classes_map(classes=21, seed=n)
        label[2] = 255
        if n < 5:
            save_palette(label, voc / "SegmentationClass" / f"{name}.png")
        if n in (2, 3, 5, 6):
            struct = np.zeros((1, 1), [("Segmentation", "O"), ("Boundaries", "O")])
            struct["Segmentation"][0, 0] = np.where(label == 255, 0, label)
            struct["Boundaries"][0, 0] = np.zeros((1, 1))
            scipy.io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": struct})
    for n, name in enumerate(more, start=7):
        save(picture(seed=n), voc / "JPEGImages" / f"{name}.jpg", quality=95)
        save_palette(classes_map(classes=21, seed=n), voc / "SegmentationClass" / f"{name}.png")
    return root


def archive_voc(root, target):
    target.mkdir()
    with tarfile.open(target / "VOCtrainval_11-May-2012.tar", "w") as tar:
        tar.add(root / "VOCdevkit", "VOCdevkit")
    with tarfile.open(target / "benchmark.tgz", "w:gz") as tar:
        tar.add(root / "benchmark_RELEASE", "benchmark_RELEASE")
    return target


SMALL_VOC = voc2012_seg.VocOptions(counts=(2, 2, 2))


@pytest.mark.parametrize("archived", [True, False])
def test_voc_and_sbd_become_trainaug_without_validation_images(tmp_path, archived):
    source = write_voc(tmp_path / "in")
    if archived:
        source = archive_voc(source, tmp_path / "archives")
    prepare.prepare("voc2012_seg", tmp_path / "out", source, SMALL_VOC)
    train = loaded("voc2012_seg", tmp_path / "out", "train+aug")
    validation = loaded("voc2012_seg", tmp_path / "out", "validation")
    assert train.names == ["2007_1", "2007_2", "2008_5", "2008_6"]
    assert validation.names == ["2007_3", "2007_4"]
    assert not list((tmp_path / "out").rglob("*.jpg")), "unpacked files are left behind"
    # VOC's own mask wins over SBD's, which has no ignored contour; SBD's fills the rest.
    assert (labels(train)["2007_2"][2] == 255).all()
    want = classes_map(classes=21, seed=5)
    want[2] = 0
    np.testing.assert_array_equal(labels(train)["2008_5"], want)


@pytest.mark.parametrize("archived", [True, False])
def test_a_voc_that_has_changed_is_not_ready(archived, tmp_path):
    """Only what the set is made of counts; what else lies beside it does not."""
    source = write_voc(tmp_path / "in")
    if archived:
        source = archive_voc(source, tmp_path / "archives")
    options = SMALL_VOC
    target = prepare.prepare("voc2012_seg", tmp_path / "data", source, options)
    (source / "holiday.zip").write_bytes(b"of no concern")
    assert prepare.prepare("voc2012_seg", tmp_path / "data", source, options) == target
    listed = json.loads((target / "source_files.json").read_text())["files"]
    if archived:
        assert set(listed) == {"VOCtrainval_11-May-2012.tar", "benchmark.tgz"}
        changed = source / "benchmark.tgz"
    else:
        assert len(listed) > 2
        changed = next(source.rglob("SegmentationClass/*.png"))
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(UserError, match=rf"{changed.name}\) changed: use --overwrite"):
        prepare.prepare("voc2012_seg", tmp_path / "data", source, options)


def test_voc_alone_needs_nothing_of_sbd(tmp_path):
    """Also where the folder of the year is given without the one around it."""
    source = write_voc(tmp_path / "in")
    (source / "VOCdevkit/VOC2012").rename(source / "VOC2012")
    shutil.rmtree(source / "benchmark_RELEASE")
    with pytest.raises(DataError, match="benchmark_RELEASE/dataset"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source)
    options = voc2012_seg.VocOptions(counts=(2, 0, 2))
    prepare.prepare("voc2012_seg", tmp_path / "out", source, options)
    assert loaded("voc2012_seg", tmp_path / "out", "train").names == ["2007_1", "2007_2"]
    with pytest.raises(UserError, match="aug"):
        loaded("voc2012_seg", tmp_path / "out", "train+aug")


def test_voc_counts_are_checked(tmp_path):
    source = write_voc(tmp_path / "in")
    with pytest.raises(DataError, match=r"have \(2, 2, 2\) examples.*--counts 2,2,2 accepts"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source)


def test_voc_names_what_is_missing(tmp_path):
    source = write_voc(tmp_path / "in")
    mask = source / "VOCdevkit/VOC2012/SegmentationClass/2007_1.png"
    mask.rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"2007_1\.png: this mask is missing"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source, SMALL_VOC)
    (tmp_path / "away").rename(mask)
    (source / "VOCdevkit/VOC2012/JPEGImages/2008_5.jpg").unlink()
    with pytest.raises(DataError, match="2008_5: no image"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source, SMALL_VOC)


def test_voc_names_a_damaged_mat_file(tmp_path):
    source = write_voc(tmp_path / "in")
    path = source / "benchmark_RELEASE/dataset/cls/2008_6.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"2008_6\.mat: not an SBD annotation"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source, SMALL_VOC)
    scipy.io.savemat(path, {"other": np.zeros(3)})
    with pytest.raises(DataError, match=r"2008_6\.mat: not an SBD annotation"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source, SMALL_VOC)


def test_voc_links_that_leave_are_refused(tmp_path):
    source = write_voc(tmp_path / "in")
    image = source / "VOCdevkit/VOC2012/JPEGImages/2007_1.jpg"
    image.rename(tmp_path / "outside.jpg")
    image.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(DataError, match="symbolic link, or behind one, that leaves"):
        prepare.prepare("voc2012_seg", tmp_path / "out", source, SMALL_VOC)


# Cityscapes and SceneParse150: the layout of tfds.


def write_cityscapes(root):
    for split, city in (("train", "aachen"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        label = np.arange(34, dtype=np.uint8).reshape(2, 17).repeat(2, 0)
        save(picture(4, 17), root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        save(label, root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png")
        save(label, root / f"gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png")
    return root


TRAIN_IDS = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33"


def cityscapes_train_ids(label_ids):
    table = np.full(256, 255, np.uint8)
    table[[int(i) for i in TRAIN_IDS.split()]] = range(19)
    return table[label_ids]


@pytest.mark.parametrize("zipped", [True, False])
def test_cityscapes_keeps_label_ids_and_gives_train_ids(tmp_path, zipped):
    source = write_cityscapes(tmp_path / "in")
    if zipped:
        (tmp_path / "zips").mkdir()
        for name in ("leftImg8bit", "gtFine"):
            with zipfile.ZipFile(tmp_path / f"zips/{name}_trainvaltest.zip", "w") as file:
                for path in (source / name).rglob("*.png"):
                    file.write(path, path.relative_to(source))
        source = tmp_path / "zips"
    prepare.prepare("cityscapes", tmp_path / "out", source)
    found = loaded("cityscapes", tmp_path / "out", "validation")
    assert found.names == ["lindau_000000_000019"]
    want = cityscapes_train_ids(np.arange(34).reshape(2, 17).repeat(2, 0))
    np.testing.assert_array_equal(found[0]["label"], want)
    stored = tfds.builder_from_directory(
        str(tmp_path / "out/cityscapes/semantic_segmentation/1.0.0")
    ).as_data_source("train", decoders={"image_left": tfds.decode.SkipDecoding()})
    assert stored[0]["segmentation_label"].max() == 33


@pytest.mark.parametrize("cls", [cityscapes.Builder, scene_parse150.Builder])
def test_features_are_those_of_tfds_own_builder(tmp_path, cls):
    module = f"tensorflow_datasets.datasets.{cls.name}.{cls.name}_dataset_builder"
    their = importlib.import_module(module).Builder(data_dir=str(tmp_path))
    own = cls(data_dir=str(tmp_path), config_name=cls.config_name)
    assert own.info.full_name == their.info.full_name
    assert own.info.features.to_json() == their.info.features.to_json()


class TheirCityscapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Records as tfds's own builder writes them: its features, hashed order, no metadata."""

    name = "cityscapes"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image_id": tfds.features.Text(),
                "image_left": tfds.features.Image(shape=(4, 17, 3), encoding_format="png"),
                "segmentation_label": tfds.features.Image(
                    shape=(4, 17, 1), encoding_format="png", use_colormap=True
                ),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    url_infos = None

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            label = np.full((4, 17), 7 + i, np.uint8)
            yield (
                f"city_{i}",
                {
                    "image_id": f"city_{i}",
                    "image_left": images.encode_png(picture(4, 17, i)),
                    "segmentation_label": images.encode_png(label),
                },
            )


def test_cityscapes_that_tfds_prepared_is_read(tmp_path):
    TheirCityscapes(
        data_dir=str(tmp_path),
        config=tfds.core.BuilderConfig(name="semantic_segmentation", version="1.0.0"),
        file_format="array_record",
    ).download_and_prepare()
    source = loaded("cityscapes", tmp_path)
    assert sorted(source.names) == ["city_0", "city_1", "city_2"]
    assert source.sizes.tolist() == [[4, 17]] * 3
    assert source.class_pixels is None
    assert source.num_classes == 19
    for name, label in labels(source).items():
        assert (label == {"city_0": 0, "city_1": 1, "city_2": 255}[name]).all()


def write_ade(root):
    for split, code in (("training", "train"), ("validation", "val")):
        label = np.arange(151, dtype=np.uint8)[None].repeat(3, 0)
        name = f"ADE_{code}_00000001"
        save(picture(3, 151), root / f"ADEChallengeData2016/images/{split}/{name}.jpg")
        save(label, root / f"ADEChallengeData2016/annotations/{split}/{name}.png")
    return root


def test_scene_parse150_ignores_0_and_shifts_the_rest(tmp_path):
    prepare.prepare("scene_parse150", tmp_path / "out", write_ade(tmp_path / "in"))
    source = loaded("scene_parse150", tmp_path / "out", "validation")
    assert len(source) == 1
    assert source[0]["label"][0].tolist() == [255, *range(150)]
    assert source.class_names[0] == "wall"
    assert source.class_names[149] == "flag"


def test_scene_parse150_refuses_the_instance_annotations_that_tfds_downloads(tmp_path):
    source = write_ade(tmp_path / "in")
    path = source / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    save(picture(3, 151), path)
    with pytest.raises(DataError, match="not a label map"):
        prepare.prepare("scene_parse150", tmp_path / "out", source)
    save(np.arange(151, dtype=np.uint8)[None].repeat(3, 0), path)
    prepare.prepare("scene_parse150", tmp_path / "out", source)
    found = loaded("scene_parse150", tmp_path / "out")
    found.records = [
        {"image": images.encode_png(picture()), "annotation": images.encode_png(picture())}
    ]
    with pytest.raises(DataError, match=r"scene_parse150 train, example .*want uint8 \[H, W\]"):
        found[0]


# image_folder.


def folder_options(**kwargs):
    return datasets.builder_class("image_folder").options_type(**kwargs)


def prepared_folder(tmp_path, **kwargs):
    options = folder_options(**kwargs)
    prepare.prepare("image_folder/x", tmp_path / "out", tmp_path / "in", options)
    return loaded("image_folder/x", tmp_path / "out")


def test_val_is_stored_as_validation(tmp_path):
    image_folder(tmp_path / "in")
    image_folder(tmp_path / "in", ("z",), split="val")
    prepared_folder(tmp_path)
    assert loaded("image_folder/x", tmp_path / "out", "validation").names == ["z"]


def test_other_layouts_by_pattern(tmp_path):
    for split in ("training", "validation"):
        save(picture(), tmp_path / f"in/img/{split}/a.png")
        save(classes_map(), tmp_path / f"in/ann/{split}/a_mask.png")
    options = {"images": "img/{split}", "masks": "ann/{split}", "mask_suffix": "_mask"}
    prepare.prepare(
        "image_folder/x",
        tmp_path / "out",
        tmp_path / "in",
        folder_options(classes="a,b,c", **options),
    )
    source = loaded("image_folder/x", tmp_path / "out", "training")
    np.testing.assert_array_equal(source[0]["label"], classes_map())


def test_one_folder_is_divided_by_name(tmp_path):
    for i in range(40):
        save(picture(8, 8, i), tmp_path / f"in/images/{i:03d}.png")
        save(classes_map(8, 8), tmp_path / f"in/masks/{i:03d}.png")
    train = prepared_folder(tmp_path, classes="a,b,c", validation_share=0.25)
    held = loaded("image_folder/x", tmp_path / "out", "validation").names
    assert not set(held) & set(train.names)
    assert len(held) + len(train) == 40
    assert 4 <= len(held) <= 16
    save(picture(8, 8), tmp_path / "in/images/new.png")
    save(classes_map(8, 8), tmp_path / "in/masks/new.png")
    options = folder_options(classes="a,b,c", validation_share=0.25)
    prepare.prepare("image_folder/x", tmp_path / "out", tmp_path / "in", options, overwrite=True)
    assert set(loaded("image_folder/x", tmp_path / "out", "validation").names) - {"new"} == set(
        held
    )


def write_binary(root):
    for i in range(2):
        label = np.zeros((6, 8), np.uint8)
        label[:, i:5] = 255
        save(picture(6, 8, i), root / f"train/images/{i}.png")
        save(label, root / f"train/labels/{i}.png")


def test_binary_masks_are_not_silently_ignored(tmp_path):
    write_binary(tmp_path / "in")
    with pytest.raises(DataError, match=r"hold only the values 0 and 255.*--mask_values 0:0,255:1"):
        prepared_folder(tmp_path, classes="background,cat")
    source = prepared_folder(tmp_path, classes="background,cat", mask_values="0:0,255:1")
    assert source[1]["label"][0].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_255_can_really_mean_ignore(tmp_path):
    write_binary(tmp_path / "in")
    source = prepared_folder(tmp_path, classes="background,cat", mask_values="255:255")
    assert source[1]["label"][0].tolist() == [0, 255, 255, 255, 255, 0, 0, 0]


def test_16_bit_values_can_be_mapped(tmp_path):
    label = np.array([[1000, 40000]], np.uint16).repeat(4, 0)
    save(picture(4, 2), tmp_path / "in/train/images/a.png")
    save(label, tmp_path / "in/train/labels/a.png")
    with pytest.raises(
        DataError, match=r"value 1000 \(4 pixels\), value 40000 \(4 pixels\) outside"
    ):
        prepared_folder(tmp_path, classes="a,b")
    source = prepared_folder(tmp_path, classes="a,b", mask_values="1000:0,40000:1")
    assert source[0]["label"][0].tolist() == [0, 1]


def test_colour_masks_by_the_class_list(tmp_path):
    rgb = np.zeros((2, 3, 3), np.uint8)
    rgb[0, 1], rgb[1, 2] = (200, 0, 0), (9, 9, 9)
    save(picture(2, 3), tmp_path / "in/train/images/a.png")
    save(rgb, tmp_path / "in/train/labels/a.png")
    (tmp_path / "in/classes.txt").write_text(
        "# colours as in our tool\nfree space 0 0 0\nstop sign 200 0 0\nignore 9 9 9\n"
    )
    source = prepared_folder(tmp_path, color_masks=True)
    assert source.class_names == ("free space", "stop sign")
    assert source.colors.tolist() == [[0, 0, 0], [200, 0, 0]]
    assert source[0]["label"].tolist() == [[0, 1, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "want one line for each class"), ("a\nb\na\n", "each once"), ("a 1 2 300\n", "0..255")],
)
def test_bad_class_lists_are_refused(tmp_path, text, message):
    image_folder(tmp_path / "in")
    (tmp_path / "in/classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        prepared_folder(tmp_path)


def test_a_missing_class_list_is_asked_for(tmp_path):
    image_folder(tmp_path / "in")
    (tmp_path / "in/classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes\.txt: no class list; write one class a line"):
        prepared_folder(tmp_path)


def test_a_folder_of_another_layout_is_refused_with_the_options(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/classes.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"--images '\{split\}/images' --masks"):
        prepared_folder(tmp_path)


# Sources.


def test_an_unprepared_data_set_names_the_command(tmp_path):
    with pytest.raises(
        ValueError, match=r"run: python -m dilaff_jax.data.prepare --dataset camvid"
    ):
        loaded("camvid", tmp_path)


def test_an_unknown_split_lists_those_there_are(tmp_path):
    image_folder(tmp_path / "in")
    prepared_folder(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; available: train, several joined by"):
        loaded("image_folder/x", tmp_path / "out", "test")


def test_fewer_training_images_are_chosen_by_name_and_the_fewer_are_among_the_more(tmp_path):
    image_folder(tmp_path / "in", tuple(f"s{i}_a" for i in range(8)))
    prepared_folder(tmp_path)
    where = ("image_folder/x", tmp_path / "out")
    every = loaded(*where)
    chosen = {n: loaded(*where, train_images=n) for n in (1, 3, 5, 8)}
    by_hash = sorted(every.names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    for count, source in chosen.items():
        assert source.names == sorted(by_hash[:count])
    assert chosen[8].names == every.names
    at = every.names.index(chosen[1].names[0])
    np.testing.assert_array_equal(chosen[1][0]["label"], every[at]["label"])
    held = loaded(*where, train_images=3, hold_out=tuple(chosen[3].names))
    assert len(held.names) == 3
    assert not set(held.names) & set(chosen[3].names)
    with pytest.raises(ValueError, match=r"train_images is 9, and .* has 8 to train on"):
        loaded(*where, train_images=9)


def test_holding_out_sequences(tmp_path):
    image_folder(tmp_path / "in", ("s1_a", "s1_b", "s2_a", "s3_a"))
    prepared_folder(tmp_path)
    where = ("image_folder/x", tmp_path / "out")
    assert loaded(*where, hold_out=("s1", "s3")).names == ["s2_a"]
    held = loaded(*where, "held_out", hold_out=("s1", "s3"))
    assert held.names == ["s1_a", "s1_b", "s3_a"]
    whole = loaded(*where)
    np.testing.assert_array_equal(held[2]["label"], whole[3]["label"])
    np.testing.assert_array_equal(held.sizes, whole.sizes[[0, 1, 3]])
    for wrong in (("s4",), ("s1", "s2", "s3"), ("s1", "s4")):
        with pytest.raises(ValueError, match="names in 'train' start with s1, s2, s3"):
            loaded(*where, hold_out=wrong)
    with pytest.raises(ValueError, match="leaves 0 examples for 'held_out'"):
        loaded(*where, "held_out")


def test_resize_halves_images_by_area_and_labels_by_nearest(tmp_path):
    image_folder(tmp_path / "in", size=(20, 30))
    whole = prepared_folder(tmp_path)
    half = loaded("image_folder/x", tmp_path / "out", resize=0.5)
    assert half.sizes.tolist() == [[10, 15]] * 3
    image, label = whole[1]["image"].astype(float), whole[1]["label"]
    means = image.reshape(10, 2, 15, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(half[1]["image"], means, atol=0.51)
    assert half[1]["label"].shape == (10, 15)
    blocks = label.reshape(10, 2, 15, 2).transpose(0, 2, 1, 3).reshape(10, 15, 4)
    assert (half[1]["label"][..., None] == blocks).any(-1).all()


def test_cache_changes_nothing_and_reads_once(tmp_path):
    image_folder(tmp_path / "in")
    plain = prepared_folder(tmp_path)
    cached = loaded("image_folder/x", tmp_path / "out", cache=True)
    first = cached[1]
    cached.records = None  # a second read would fail
    np.testing.assert_array_equal(cached[1]["image"], plain[1]["image"])
    assert cached[1] is first


def test_a_cache_larger_than_memory_is_refused(tmp_path, monkeypatch):
    image_folder(tmp_path / "in")
    prepared_folder(tmp_path)
    monkeypatch.setattr(machine, "memory", lambda: 1000)
    with pytest.raises(ValueError, match="cache=True needs"):
        loaded("image_folder/x", tmp_path / "out", cache=True)


def test_a_damaged_record_names_the_example(tmp_path):
    image_folder(tmp_path / "in")
    source = prepared_folder(tmp_path)
    source.records = [source.records[0] | {"image": b"\xff\xd8 broken"}]
    with pytest.raises(DataError, match=r"image_folder/x train, example 'a': damaged record"):
        source[0]


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    image_folder(tmp_path / "in")
    code = f"""
import sys
from dilaff_jax.data import batch_iterator, data_config, contact_sheet, datasets, pipeline, prepare
assert datasets.names()
prepare.prepare("image_folder/x", {str(tmp_path / "out")!r}, {str(tmp_path / "in")!r})
data = data_config.default(dataset="image_folder/x", data_dir={str(tmp_path / "out")!r})
next(pipeline.train_batches(data, datasets.load(data, 'train'), batch_size=2, seed=0))
assert not {{"tensorflow", "torch"}} & set(sys.modules), "heavy imports"
print("clean")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("clean\n"), done.stderr


def test_sources_are_not_written_to(tmp_path):
    root = image_folder(tmp_path / "in")
    before = {p: p.stat().st_mtime_ns for p in sorted(root.rglob("*"))}
    prepared_folder(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in sorted(root.rglob("*"))} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    shutil.rmtree(root)
    assert len(loaded("image_folder/x", tmp_path / "out")) == 3, "records stand on their own"
