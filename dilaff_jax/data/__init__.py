"""Data: sets prepared as ArrayRecord by tfds builders, read by Grain.

    python -m dilaff_jax.data.prepare --dataset shapes --data_dir data       # once

    from dilaff_jax.data import data_config, datasets, pipeline
    data = data_config.default(dataset="shapes", data_dir="data")
    train = datasets.load(data, "train")          # len, [i], names, sizes, class_names, colors
    validation = datasets.load(data, "validation")
    for batch in pipeline.train_batches(data, train, batch_size=16, seed=0): ...
    for batch in pipeline.eval_batches(data, validation, batch_size=16): ...

What is where:
    data_config.py    every key of `config.data`: default, rule and meaning
    datasets.py       `load`: a prepared data set as a random-access source
    augment.py        joint augmentation of image and label (OpenCV)
    pipeline.py       what is in a batch: order, shards, randomness, padding
    batch_iterator.py iterators: workers, saved position, prefetch to the device
    prepare.py        the command that checks strangers' files and writes ArrayRecord
    contact_sheet.py  pictures of images with their labels
    builder.py        what every data set shares; images.py, folders.py: reading strangers' files
    bands.py          images of other bands than red, green and blue; raster.py: large files
    volumes.py        volumes in files; augment_volume.py: patches of them
    shapes.py, camvid.py, voc2012_seg.py, cityscapes.py, scene_parse150.py, image_folder.py,
    band_folder.py, volume_folder.py, hippocampus.py, coco_json.py, annotation_json.py: one data
                      set each. A new one is one more file with a class `Builder`. outlines.py
                      draws polygons.

Everywhere: images RGB uint8 `[H, W, 3]`, or `[H, W, C]` of any numbers where a data set has bands;
volumes `[D, H, W, C]`; labels uint8 `[H, W]`, 255 = ignored.
"""
