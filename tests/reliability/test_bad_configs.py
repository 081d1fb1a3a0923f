"""Configs, processes, slices and ports that cannot be are refused before they cost anything."""

import importlib.util
import socket

import jax
import pytest

from dilaff_jax import train
from dilaff_jax.runtime import chips, parallel
from dilaff_jax.serving import view_page
from tests import data_files, tiny_config
from tests.reliability.place import cases, refused

# Configs: `changes` of config.KEY or config.PART.KEY.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=4, validation=2, test=1)


def changed(config, changes):
    for key, value in changes.items():
        *parts, last = key.split(".")
        part = config
        for name in parts:
            part = part[name]
        with part.unlocked(), part.ignore_type():
            part[last] = value
    return config


WHOLE = "; expected a whole number above 0"
CONFIGS = cases(
    ("text for a number", {"num_steps": "many"}, f"config.num_steps is 'many'{WHOLE}"),
    ("switch for a number", {"log_every": False}, f"config.log_every is False{WHOLE}"),
    ("fraction for a number", {"batch_size": 2.5}, f"config.batch_size is 2.5{WHOLE}"),
    ("none kept", {"keep_latest": 0}, "config.keep_latest is 0; expected 1 or more"),
    ("nothing kept", {"keep_latest": None}, "config.keep_latest is None; expected 1 or more"),
    ("negative seed", {"seed": -1}, "config.seed is -1; expected a whole number, 0 or more"),
    (
        "batch for fewer devices",
        {"batch_size": 6},
        "batch_size is 6; 4 devices need a multiple of 4",
    ),
    (
        "unknown metric",
        {"best_metric": "iou"},
        "config.best_metric is 'iou'; expected one of miou, pixel_accuracy, mean_accuracy, "
        "frequency_weighted_iou, boundary_iou, boundary_f, affinity/mean/average_precision, "
        "affinity/mean/f1, dice, surface_dice, or iou/CLASS",
    ),
    (
        "metric that is not taken",
        {"best_metric": "boundary_f", "eval.boundaries": False},
        "config.best_metric is 'boundary_f', and config.eval.boundaries is False; set it to True, "
        "or choose another metric",
    ),
    (
        "profile from the end",
        {"profile_steps": (3, 2)},
        "config.profile_steps is (3, 2); expected (first, last) step, or () for none",
    ),
    (
        "unknown part",
        {"optm": 1},
        "config has no key 'optm' (did you mean 'optim'?); allowed: seed, num_steps, batch_size, "
        "log_every, eval_every, patience, checkpoint_every, best_metric, keep_latest, resume_changed, "
        "profile_steps, data, "
        "model, loss, optim, init, inference, eval, parallel, reporting, refine, ablate",
    ),
    (
        "unknown key of a part",
        {"eval.tolerence": 1.0},
        "config.eval has no key 'tolerence' (did you mean 'tolerance'?); allowed: batch_size, "
        "boundaries, tolerance, surface_tolerance, pictures, predictions",
    ),
    (
        "nan",
        {"optim.learning_rate": float("nan")},
        "config.optim.learning_rate is nan; expected 0 or more",
    ),
    (
        "average of nothing",
        {"optim.ema": 1.0},
        "config.optim.ema is 1.0; expected a number from 0 to below 1",
    ),
    ("no parts", {"optim.accumulate": 0}, f"config.optim.accumulate is 0{WHOLE}"),
    (
        "unknown optimiser",
        {"optim.name": "lion"},
        "config.optim.name is 'lion'; expected one of 'sgd', 'adamw'",
    ),
    (
        "warm-up as long as the run",
        {"optim.warmup_steps": 6},
        "optim.warmup_steps is 6; the run has 6 steps",
    ),
    ("negative loss", {"loss.affinity": -1.0}, "config.loss.affinity is -1.0; expected 0 or more"),
    (
        "unknown loss",
        {"loss.segmentation": "hinge"},
        "config.loss.segmentation is 'hinge'; expected one of 'cross_entropy', 'focal', 'ohem', "
        "'loss_max_pooling', 'dice', 'tversky', 'lovasz_softmax', 'boundary', "
        "'region_mutual_information', or a sum of several "
        "such as 'cross_entropy + 0.5*dice'",
    ),
    (
        "affinity loss without a head",
        {"model.affinity": None},
        "loss.affinity and loss.refined need an affinity head: set model.affinity, {} for its "
        "defaults, or set both to 0 for the plain baseline",
    ),
    (
        "parts of a loss that mines",
        {"optim.accumulate": 2, "loss.segmentation": "ohem"},
        "optim.accumulate is 2 and a loss of ('ohem', 'balanced') mines by the predictions; its "
        "count is not known before all microbatches are seen: use accumulate=1",
    ),
    (
        "window without a step",
        {"inference.stride": 0.0},
        "config.inference.stride is 0.0; expected a share in (0, 1]",
    ),
    (
        "scales without 1",
        {"inference.scales": (0.5,)},
        "config.inference.scales is (0.5,); expected positive numbers, 1 among them",
    ),
    (
        "negative distance",
        {"eval.tolerance": -1.0},
        "config.eval.tolerance is -1.0; expected 0 or more",
    ),
    ("empty batch", {"eval.batch_size": 0}, f"config.eval.batch_size is 0{WHOLE}"),
    (
        "two origins",
        {"init.model": "a.npz", "init.encoder": "b.npz"},
        "config.init has model and encoder; give one of them",
    ),
    (
        "text for patterns",
        {"init.drop": "fc.*"},
        "config.init.drop is 'fc.*'; expected a tuple of patterns, such as ('fc.*',)",
    ),
    (
        "empty crop",
        {"data.crop_size": (0, 32)},
        "config.data.crop_size is (0, 32); expected (height, width) in pixels, such as (512, 512); "
        "of volumes three sides",
    ),
    (
        "scale range from the end",
        {"data.scale_range": (2.0, 0.5)},
        "config.data.scale_range is (2.0, 0.5); expected (lowest, highest), such as (0.5, 2.0)",
    ),
    (
        "unknown data set",
        {"data.dataset": "camvids"},
        "no data set 'camvids'; available: annotation_json, band_folder, camvid, cityscapes, "
        "coco_json, hippocampus, image_folder, scene_parse150, shapes, voc2012_seg, volume_folder",
    ),
    (
        "no data",
        {"data.data_dir": "{AT}/data"},
        "data set 'shapes/tiny' is not prepared in {AT}/data/shapes/tiny/1.0.0; run: python -m "
        "dilaff_jax.data.prepare --dataset shapes --name tiny --data_dir {AT}/data",
    ),
    (
        "unknown split",
        {"data.train_split": "training"},
        "shapes/tiny training: no split 'training'; available: train, validation, test, several "
        "joined by +, or 'held_out' (the examples that hold_out takes from train_split)",
    ),
    (
        "unknown encoder",
        {"model.encoder": "resnet19"},
        "encoder is 'resnet19'; allowed: ...",
    ),
    (
        "number for an encoder",
        {"model.encoder": 18},
        "config.model.encoder is 18; expected a name",
    ),
    (
        "text for a switch",
        {"model.remat": "yes"},
        "config.model.remat is 'yes'; expected True or False",
    ),
    (
        "misspelt option of the head",
        {"model.affinity": {"widht": 8}},
        "affinity has no key 'widht' (did you mean 'width'?); allowed: dilations, symmetric, "
        "spacing, stride, sources, width, rates, embedding",
    ),
    (
        "frozen statistics that do not exist",
        {"model.norm": "group", "model.frozen_norm": True},
        "frozen_norm is set and norm is 'group'; only norm='batch' has statistics to freeze",
    ),
    (
        "unknown mapping",
        {"parallel.mode": "jit"},
        "config.parallel.mode is 'jit'; expected one of 'pmap', 'shard_map', 'fsdp'",
    ),
    (
        "more devices than there are",
        {"parallel.devices": 9},
        "parallel.devices is 9; this process has 4 devices (0 for all)",
    ),
    (
        "unknown operator",
        {"refine.name": "crf"},
        "operator is 'crf'; expected 'identity', 'random_walk', 'signed' or 'module:function'",
    ),
    (
        "number for an operator",
        {"refine.name": 3},
        "operator is 3; expected 'identity', 'random_walk', 'signed' or 'module:function'",
    ),
    (
        "option of another operator",
        {"refine.name": "random_walk"},
        "operator 'random_walk' has no option 'strength'; allowed: bias, keep, steps, sharpness, "
        "threshold, self_weight, restart, order, backend",
    ),
)


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_a_config_that_cannot_be_is_refused_before_anything_is_compiled(
    changes, message, place, data_dir
):
    config = tiny_config.get_config()
    config.data.data_dir = str(data_dir)
    for key, value in changes.items():
        value = value.replace("{AT}", str(place.at)) if isinstance(value, str) else value
        changed(config, {key: value})
    refused(place, lambda: train.train_and_evaluate(config, place.run), message)


COORDINATOR = (
    "; expected HOST:PORT of process 0, such as 10.0.0.2:8476, or 'auto' on a cluster that JAX "
    "knows"
)
INCOMPLETE = (
    "; several processes need all three, with 0 <= process_id < num_processes: set them in "
    "config.parallel, or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    cases(
        ("no port", ("host", 2, 0), f"found coordinator 'host'{COORDINATOR}"),
        ("port in words", ("host:http", 2, 0), f"found coordinator 'host:http'{COORDINATOR}"),
        ("no host", (":8476", 2, 0), f"found coordinator ':8476'{COORDINATOR}"),
        ("port too large", ("host:84760", 2, 0), f"found coordinator 'host:84760'{COORDINATOR}"),
        (
            "nobody to meet",
            ("", 2, 0),
            f"found coordinator '', num_processes 2, process_id 0{INCOMPLETE}",
        ),
        (
            "one too many",
            ("host:8476", 2, 2),
            f"found coordinator 'host:8476', num_processes 2, process_id 2{INCOMPLETE}",
        ),
    ),
)
def test_a_malformed_coordinator_is_refused_before_anyone_waits(
    arguments, message, place, monkeypatch
):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("it would wait"))
    refused(place, lambda: parallel.initialize(*arguments), message)


NO_SLICE = (
    "; expected 'auto' or GENERATION:CHIPSxCHIPS, such as v5e:4x4, v6e:2x2, v4:2x2x4, v5p:2x2x2 "
    "(chips along each side: two for v5e and v6e, three for v4 and v5p)"
)


@pytest.mark.parametrize("name", ["", "v5e", "v5e:4", "v5e:2x2x2", "v9:2x2", "v4:2x2", "v5e:2X2"])
def test_a_topology_that_cannot_be_is_refused_without_the_tpu_compiler(name, place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: pytest.fail("not needed"))
    refused(place, lambda: chips.devices(name), f"--topology={name!r}{NO_SLICE}")


def test_without_the_tpu_compiler_the_message_says_how_to_get_it(place, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused(
        place,
        lambda: chips.devices("v5e:2x2"),
        "--topology=v5e:2x2 needs the TPU compiler, libtpu: pip install 'dilaff-jax[preflight]' "
        "(or: pip install 'jax[tpu]')",
    )


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_cannot_be_is_refused(port, place):
    refused(place, lambda: view_page.check_port(port), f"--port={port}; expected 1 to 65535")


def test_a_port_in_use_is_refused_and_a_free_one_is_not(place):
    with socket.socket() as taken:
        taken.bind((view_page.HOST, 0))
        port = taken.getsockname()[1]
        taken.listen()
        refused(
            place,
            lambda: view_page.check_port(port),
            f"--port={port} cannot be used on 127.0.0.1: Address already in use; give another port",
        )
    view_page.check_port(port)
