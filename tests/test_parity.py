"""The parity report: that it passes, and that it would not pass anything."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from dilaff_jax import losses, propagate
from dilaff_jax.interop import parity, parity_method, report, torch_models


def command(*arguments):
    """The command as users run it: compiled at the level of optimisation that they have."""
    done = subprocess.run(
        [sys.executable, "-m", "dilaff_jax.interop.parity", *arguments],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_the_command_finds_networks_equal_to_torchvisions():
    networks = ("deeplabv3_resnet50", "resnet18", "mobilenet_v2")
    done = command("--size", "65x65", "--model", *networks)
    for name in networks:
        assert f"{name} at 65x65, batch 4" in done.stdout
    assert "42,004,074" in done.stdout
    assert " 0 beyond their bound" in done.stdout
    for kind in ("eval stage: 141", "eval gradient: 187", "train output: 2", "losses: 10"):
        assert kind in done.stdout


METHOD = report.compare("targets", "stands for all", np.zeros(1), np.zeros(1), 0.0)


@pytest.fixture
def networks_alone(monkeypatch):
    """Without the comparison of the method, which has tests of its own below."""
    monkeypatch.setattr(parity_method, "rows", lambda seed: [METHOD])


@pytest.mark.slow
def test_fcn_resnet50_is_equal_to_torchvisions(networks_alone, capsys):
    assert parity.main(["--model", "fcn_resnet50", "--size", "65x65"]) == 0
    assert "35,322,218" in capsys.readouterr().out


FAMILIES = {
    "segformer_b0": ("3,719,541", 119, 205),
    "convnext_tiny": (None, 130, 229),
    "dinov2_vits14": ("22,091,541", 124, 226),
    "dinov2_vits14_reg": ("22,093,077", 124, 227),
    "dinov3_vits16": ("21,631,509", 124, 214),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_are_equal_to_hugging_faces(name, networks_alone, capsys):
    """Every layer and every gradient, at a size that no patch divides."""
    pytest.importorskip("transformers", reason="needs the extra [huggingface]")
    assert parity.main(["--model", name, "--size", "65x97", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    parameters, stages, gradients = FAMILIES[name]
    assert parameters is None or parameters in out
    assert f"train stage: {stages}" in out
    assert f"train gradient: {gradients}" in out


def test_a_mistake_in_a_transformer_fails_the_report(networks_alone, monkeypatch, capsys):
    """The same weights and one LayerNorm's epsilon 1e-3 for 1e-6 in one block of twelve."""
    pytest.importorskip("transformers", reason="needs the extra [huggingface]")
    from dilaff_jax.models import transformer

    honest = transformer.layer_norm

    def layer_norm(style, name, epsilon):
        return honest(style, name, 1e-3 if name == "norm2" else epsilon)

    monkeypatch.setattr(transformer, "layer_norm", layer_norm)
    assert parity.main(["--model", "dinov2_vits14", "--size", "28x28", "--batch", "2"]) == 1
    assert "BEYOND" in capsys.readouterr().out


def test_rounding_does_not_fail_and_does_not_hide_a_mistake():
    """A gradient that is nearly nothing: rounding on both sides, far beyond any relative bound."""
    exact = np.array([1e-9, -2e-9])
    theirs = exact + np.array([3e-7, -1e-7])
    rounded = exact + np.array([-5e-7, 2e-7])

    def passed(ours, **options):
        row = report.compare("gradient", "x", ours, theirs, report.GRADIENT_BOUND, 1e-5, **options)
        return row.passed

    assert not passed(rounded)  # what failed on machines whose products round otherwise
    assert passed(rounded, exact=exact)
    assert not passed(exact + np.array([2e-6, 0]), exact=exact)
    # Where torch rounds finely a mistake of a part in three hundred is one.
    exact = np.array([1.0, 2.0])
    theirs = exact + 1e-7
    row = report.compare("gradient", "x", exact * 1.003, theirs, report.GRADIENT_BOUND, exact=exact)
    assert not row.passed


def test_another_dilation_fails_the_report(networks_alone, monkeypatch, capsys):
    """The same weights in a network that differs in one thing only."""
    honest = torch_models.pair

    def pair(name, seed):
        ours, theirs = honest(name, seed)
        return ours.clone(encoder=ours.encoder.clone(multi_grid=(1, 2))), theirs

    monkeypatch.setattr(torch_models, "pair", pair)
    assert parity.main(["--model", "resnet18", "--size", "33x33"]) == 1
    out = capsys.readouterr().out
    assert "layer4.1.conv2" in out
    assert "BEYOND" in out


def test_a_layer_without_comparison_fails_the_report(monkeypatch):
    honest = parity.module_outputs

    def stages(model, intermediates):
        found = honest(model, intermediates)
        del found["layer2.0.bn1"]
        return found

    monkeypatch.setattr(parity, "module_outputs", stages)
    with pytest.raises(ValueError, match=r"one side only: \['layer2\.0\.bn1'\]"):
        parity.network_rows("resnet18", (33, 33), batch=2, seed=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_targets_propagation_and_losses_equal_plain_torch(seed):
    rows = parity_method.rows(seed)
    assert len(rows) == 28
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]


def test_another_formula_fails_the_report(monkeypatch):
    walk, loss = propagate.random_walk, losses.affinity_bce
    monkeypatch.setattr(
        propagate, "random_walk", lambda *a, **k: walk(*a, **(k | {"sharpness": 4.1}))
    )
    monkeypatch.setattr(losses, "affinity_bce", lambda x, t, v, n: loss(x, t, t | True, n))
    failed = {r.name for r in parity_method.rows(0) if not r.passed}
    assert failed == {"random_walk", "affinity_bce"}


def test_nan_is_beyond_every_bound():
    row = report.compare("stage", "x", np.array([np.nan]), np.array([1.0]), 1e9)
    assert not row.passed
