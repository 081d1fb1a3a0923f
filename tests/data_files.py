"""Small data sets on disk, for the tests of the data room."""

import pathlib

import numpy as np
from PIL import Image

from dilaff_jax.data import prepare, shapes


def picture(height=20, width=30, seed=0):
    """A random RGB image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def classes_map(height=20, width=30, classes=3, seed=0):
    """A random label map that holds every class."""
    label = np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)
    label[0, :classes] = range(classes)
    return label


def save(array, path, **kwargs):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kwargs)
    return path


def save_palette(label, path):
    """A palette PNG, with colours that are far from the indices."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    image.putpalette([(37 * i + 11) % 256 for i in range(768)])
    image.save(path)
    return path


def image_folder(root, names=("a", "b", "c"), split="train", classes=3, size=(20, 30)):
    """`root/split/images/*.jpg`, `root/split/labels/*.png` (palette) and `root/classes.txt`."""
    for seed, name in enumerate(names):
        save(picture(*size, seed), root / split / "images" / f"{name}.jpg", quality=95)
        save_palette(classes_map(*size, classes, seed), root / split / "labels" / f"{name}.png")
    (root / "classes.txt").write_text("".join(f"class{i}\n" for i in range(classes)))
    return root


def tiny_shapes(data_dir, size=32, train=10, validation=7, test=2, seed=0):
    """Prepares `shapes/tiny`, as drawn when the runs of fixtures/ were trained."""
    options = shapes.ShapesOptions(
        size=size,
        train=train,
        validation=validation,
        test=test,
        generator_seed=seed,
        object_scale=100,
        tint=0,
    )
    prepare.prepare("shapes/tiny", data_dir, options=options)
    return data_dir
