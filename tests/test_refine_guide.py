"""The code of docs/refine_your_model.md runs, with random weights in place of downloads."""

import pathlib

import numpy as np
import pytest

import dilaff_jax
from dilaff_jax.serving import foreign_files, refine_files, writer
from tests import data_files, tiny_run
from tests.test_docs import code_blocks

PAGE = "docs/refine_your_model.md"
SIZE = (64, 96)
SEGFORMER = """SegformerForSemanticSegmentation(
    __import__("transformers").SegformerConfig(
        num_labels=19, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16
    )
)"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that the page speaks of: images, and the workdir of an affinity network."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("street", "square")):
        coarse = data_files.picture(8, 12, seed)
        picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
        data_files.save(picture, pathlib.Path("images") / f"{name}.jpg")
    tiny_run.write(tmp_path / "workdirs" / "affinity", segmentation=None)
    return tmp_path


def run(title, *changes):
    [code] = [code for name, code in code_blocks(PAGE) if name == title]
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    scope = {}
    exec(compile(code, f"{PAGE}: {title}", "exec"), scope)
    return scope


def refined(place, **form):
    return refine_files.refine(
        dilaff_jax.load(place / "workdirs" / "affinity"),
        place / "images",
        place / "results",
        writer.Options(place / "refined"),
        foreign_files.Form(**form),
    )


def test_logits_of_torchvision_are_refined(place):
    pytest.importorskip("torch")
    from dilaff_jax.interop import torchvision_import

    torchvision_import.torchvision()
    run("torchvision_logits.py", ('weights="DEFAULT"', "weights=None, weights_backbone=None"))
    assert np.load("results/street.npy").shape == (21, *SIZE)
    assert refined(place, layout="chw").images == 2
    result = run("refine.py")["result"]
    assert result.labels.shape == SIZE
    assert len(result.classes.names) == 21


def test_logits_of_a_segformer_are_refined(place):
    pytest.importorskip("transformers", reason="needs the extra [huggingface]")
    call = "SegformerForSemanticSegmentation.from_pretrained(name)"
    run("segformer_logits.py", (call, SEGFORMER))
    assert np.load("results/street.npy").shape == (19, SIZE[0] // 4, SIZE[1] // 4)
    assert refined(place, layout="chw").images == 2
    assert run("refine.py")["result"].labels.shape == SIZE


def test_label_maps_are_refined(place):
    for seed, name in enumerate(("street", "square")):
        labels = np.random.default_rng(seed).integers(0, 5, SIZE).astype(np.uint8)
        data_files.save(labels, place / "results" / f"{name}.png")
    summary = refined(place, confidence=0.6)
    assert summary.images == 2
    assert summary.changed > 0
