"""Every config: it builds, its first batch fits, its training step can be traced."""

import collections
import importlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dilaff_jax import objective, optim, settings, step
from dilaff_jax.configs import camvid_ablation, voc2012_refine_mobile_deeplab
from dilaff_jax.data import datasets, pipeline, prepare, voc2012_seg
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import parallel
from tests import data_files, test_volumes
from tests.test_data_sets import (
    write_ade,
    write_camvid,
    write_cityscapes,
    write_voc,
)

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py")
    if path.stem != "__init__"
)
CLASSES = {
    "shapes": 8,
    "shapes/hard": 8,
    "camvid": 11,
    "voc2012_seg": 21,
    "cityscapes": 19,
    "scene_parse150": 150,
    "hippocampus": 3,
}
FACADE = "building,car,door,pavement,road,sky,vegetation,window"
FACADE_SET = "image_folder/labelmefacade"
CLASSES[FACADE_SET] = len(FACADE.split(","))


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All data sets in miniature, from archives of the official layouts."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    data_files.tiny_shapes(target, train=4)
    shutil.copytree(target / "shapes" / "tiny" / "1.0.0", target / "shapes" / "1.0.0")
    (target / "shapes" / "tiny").rename(target / "shapes" / "hard")
    for split in ("train", "val"):
        images, masks = f"{split}/images", f"{split}/labels"
        frames = [f"{sequence}_{split}" for sequence in ("0001TP", "0006R0")]
        write_camvid(source / "camvid", frames, images, masks, 255)
        names = ("spatial_a", "static_b")
        data_files.image_folder(source / "facade", names, split, CLASSES[FACADE_SET])
    prepare.prepare("camvid", target, source / "camvid")
    held_out = [f"{prefix}033" for prefix in voc2012_refine_mobile_deeplab.HELD_OUT]
    options = voc2012_seg.VocOptions(counts=(2 + len(held_out), 2, 2))
    prepare.prepare("voc2012_seg", target, write_voc(source / "voc", held_out), options)
    prepare.prepare("cityscapes", target, write_cityscapes(source / "city"))
    prepare.prepare("scene_parse150", target, write_ade(source / "ade"))
    options = datasets.builder_class("image_folder").options_type(classes=FACADE)
    prepare.prepare(FACADE_SET, target, source / "facade", options)
    test_volumes.folder(source / "hippocampus", 8)
    prepare.prepare("hippocampus", target, source / "hippocampus")
    return target


def test_camvid_is_selected_on_the_sequence_that_shows_every_class(real_data):
    """What `camvid_ablation` and the findings say of the labels of its sequences."""
    images, shown = collections.Counter(), collections.defaultdict(collections.Counter)
    for path in (real_data / "camvid" / "train" / "labels").glob("*.png"):
        sequence = path.name.partition("_")[0]
        images[sequence] += 1
        shown[sequence].update(set(np.unique(np.asarray(PIL.Image.open(path)))) - {255})
    (chosen,) = camvid_ablation.get_config().data.hold_out
    assert images[chosen] == 62
    assert min(shown[chosen][c] / images[chosen] for c in range(11)) > 1 / 5
    bicyclist = 10
    assert (shown["0006R0"][bicyclist], images["0006R0"]) == (14, 101)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_it_is_run_and_passes_all_checks(name):
    module = importlib.import_module(f"configs.{name}")
    assert name == "default" or f"configs/{name}.py" in module.__doc__
    settings.check(module.get_config())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_batch_is_what_the_step_expects(name, data_dir):
    config = get_config(name)
    config.data.update({"data_dir": str(data_dir), "workers": 0})
    source = datasets.load(config.data, config.data.train_split)
    with pipeline.train_batches(config.data, source, batch_size=4, seed=0) as batches:
        batch = next(batches)
    size = tuple(config.data.crop_size)
    assert batch["image"].shape == (4, *size, config.data.bands or 3)
    assert batch["image"].dtype == (np.float32 if config.data.bands else np.uint8)
    assert batch["label"].shape == (4, *size)
    source = datasets.load(config.data, config.data.eval_split)
    assert source.num_classes == CLASSES[config.data.dataset]
    assert set(np.unique(batch["label"])) <= {*range(source.num_classes), 255}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_training_step_keeps_the_form_of_the_state(name):
    config = get_config(name)
    classes = CLASSES[config.data.dataset]
    model = segmenter.build(segmenter.config_of_run(config), classes, axis_name=parallel.AXIS)
    tx, _ = optim.optimiser(config.optim, config.num_steps, model.encoder)
    weighted = objective.with_class_weights(config, np.ones(classes))
    train_step = step.TrainStep(weighted, model, classes, tx)
    size = tuple(config.data.crop_size)
    seed = step.seed_of(config)
    state = jax.eval_shape(lambda: train_step.init((1, *size, model.channels), seed))
    mapped = parallel.Devices("shard_map", 1).map(train_step, out="replicated", shared=1)
    batch = {
        "image": jax.ShapeDtypeStruct((2, *size, model.channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct((2, *size), jnp.uint8),
    }
    after = jax.eval_shape(mapped, state, batch, seed)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_no_config_has_is_refused(name):
    config = get_config(name).lock()
    with pytest.raises(AttributeError, match="learning_rat"):
        config.optim.learning_rat = 0.1
