"""The local page: its layers and weights against arrays, and the page itself in a browser."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

import dilaff_jax
from dilaff_jax import visualize
from dilaff_jax.serving import view_page, view_state
from tests import data_files
from tests import tiny_run as runs

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMAGE = data_files.picture(40, 48)
TRUTH = data_files.classes_map(40, 48)


@pytest.fixture(scope="module")
def viewer(tiny_run):
    model = dilaff_jax.load(tiny_run)
    return view_state.Viewer(
        model, ["one"], lambda i: view_state.Picture("one", IMAGE, TRUTH, IMAGE)
    )


def test_the_page_begins_with_the_refinement_of_the_run(viewer, tiny_run):
    settings = viewer.initial()
    assert settings.refinement() == {"name": "signed", "steps": 5, "strength": 0.1, "bias": 0.0}
    np.testing.assert_array_equal(viewer.result(settings).labels, runs.expected(tiny_run, IMAGE)[0])


def test_sliders_change_the_refinement(viewer):
    settings = view_state.dataclasses.replace(viewer.initial(), operator="identity")
    result = viewer.result(settings)
    np.testing.assert_array_equal(result.labels, result.plain)
    walk = view_state.dataclasses.replace(settings, operator="random_walk", sharpness=4.0, steps=2)
    assert walk.refinement() == {"name": "random_walk", "steps": 2, "sharpness": 4.0, "bias": 0.0}
    assert np.mean(viewer.result(walk).labels != result.plain) > 0


def test_the_page_keeps_the_pixels_that_a_gate_keeps(viewer, tiny_run):
    keep = [0.3] * len(dilaff_jax.load(tiny_run).network.classes.names)
    model = dilaff_jax.load(tiny_run, refine={"name": "signed", "strength": 2.0, "keep": keep})
    gated = view_state.Viewer(
        model, ["one"], lambda i: view_state.Picture("one", IMAGE, TRUTH, IMAGE)
    )
    found = gated.result(gated.initial())
    np.testing.assert_array_equal(found.labels, model(IMAGE).labels)
    strong = view_state.dataclasses.replace(viewer.initial(), strength=2.0)
    assert (found.labels != viewer.result(strong).labels).any()


def test_the_page_begins_with_what_was_fitted(viewer, tiny_run):
    """A bias for each dilation, and options that have no slider."""
    refine = {"name": "signed", "steps": 2, "bias": [0.5, -1.0], "repulsion": 0.25}
    model = dilaff_jax.load(tiny_run, refine=refine)
    fitted = view_state.Viewer(
        model, ["one"], lambda i: view_state.Picture("one", IMAGE, TRUTH, IMAGE)
    )
    settings = fitted.initial()
    assert settings.refinement() == refine | {"strength": 0.1}
    np.testing.assert_array_equal(fitted.result(settings).labels, model(IMAGE).labels)
    moved = view_state.dataclasses.replace(settings, bias=1.5)
    assert moved.refinement()["bias"] == [2.0, 0.5]
    walk = view_state.dataclasses.replace(settings, operator="random_walk")
    assert "repulsion" not in walk.refinement()
    weights = {w.offset: w.affinity for w in fitted.weights(settings, 45, 14)}
    logits = fitted.result(settings).affinity_logits[3, 11]
    for k, offset in enumerate(model.network.offsets.tolist()):
        if tuple(offset) in weights:
            bias = (0.5, -1.0)[k // 8]
            assert weights[tuple(offset)] == pytest.approx(
                1 / (1 + np.exp(bias - logits[k])), abs=1e-5
            )


def test_every_layer_is_a_picture_of_the_image_size(viewer):
    pictures = {}
    for layer in viewer.layers:
        settings = view_state.dataclasses.replace(viewer.initial(), layer=layer, opacity=1.0)
        pictures[layer], text = viewer.render(settings)
        assert pictures[layer].shape == (40, 48, 3)
        assert "right before" in text
    assert viewer.layers[-2:] == ["edges, dilation 1", "edges, dilation 2"]
    np.testing.assert_array_equal(pictures["image"], IMAGE)
    np.testing.assert_array_equal(pictures["truth"], runs.COLORS[TRUTH])
    result = viewer.result(viewer.initial())
    np.testing.assert_array_equal(pictures["after"], runs.COLORS[result.labels])
    better = (result.labels == TRUTH) & (result.plain != TRUTH)
    shown = (pictures["changes"] == visualize.CHANGES["wrong → right"]).all(axis=-1)
    np.testing.assert_array_equal(shown, better)


def test_the_weights_of_a_pixel_are_its_cells_affinities_inside_the_image(viewer):
    result = viewer.result(viewer.initial())
    found = viewer.weights(viewer.initial(), x=4 * 11 + 1, y=4 * 3 + 2)  # cell (3, 11) of (10, 12)
    inside = [k for k, (v, u) in enumerate(result.offsets) if 0 <= 3 + v < 10 and 11 + u < 12]
    assert [w.offset for w in found] == [tuple(result.offsets[k]) for k in inside]
    np.testing.assert_allclose(
        [w.affinity for w in found], result.affinity[3, 11, inside], atol=1e-6
    )
    left = next(w for w in found if w.offset == (0, -2))
    assert (left.x, left.y) == (4 * 9.5, 4 * 3.5)
    shifted = view_state.dataclasses.replace(viewer.initial(), bias=2.0)
    np.testing.assert_allclose(
        [w.affinity for w in viewer.weights(shifted, 45, 14)],
        jax.nn.sigmoid(result.affinity_logits[3, 11, inside] - 2),
        atol=1e-6,
    )
    assert viewer.weights(viewer.initial(), x=-1, y=3) == []
    assert view_page.table(found).count("<table>") == 2


def test_a_model_without_affinities_shows_what_there_is(tiny_plain_run):
    model = dilaff_jax.load(tiny_plain_run)
    plain = view_state.Viewer(
        model, ["one"], lambda i: view_state.Picture("one", IMAGE, None, IMAGE)
    )
    assert plain.layers == ["image", "truth", "before"]
    assert plain.initial().layer == "before"
    assert plain.render(plain.initial())[1] == "0.0% of the pixels changed"
    assert plain.weights(plain.initial(), 3, 3) == []


# The page in a browser.


@contextlib.contextmanager
def served(workdir, folder, log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dilaff_jax.main", "--mode=view", f"--workdir={workdir}"]
    # NiceGUI looks for these, and then behaves as in its own tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    with log.open("w") as said:
        server = subprocess.Popen(
            [*command, f"--input={folder}", f"--port={port}"],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield port
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_a_visitor_browses_moves_a_slider_and_clicks_a_pixel(tiny_run, tmp_path):
    pytest.importorskip("nicegui", reason="the page needs the extra [view]")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs a Chromium (apt-get install chromium)")
    for seed, name in enumerate(("a", "b")):
        data_files.save(data_files.picture(40, 48, seed), tmp_path / "in" / f"{name}.png")
    with (
        served(tiny_run, tmp_path / "in", tmp_path / "log") as port,
        sync_api.sync_playwright() as p,
    ):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/", headers={"Host": "evil.example"}
        )
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        errors = []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(f"http://127.0.0.1:{port}/")
        figures = page.get_by_text("of the pixels changed")
        figures.wait_for(timeout=60_000)
        assert page.get_by_text("1 of 2: a").is_visible()
        assert figures.text_content() != "0.0% of the pixels changed"
        track = page.locator("[aria-label=steps]").bounding_box()
        page.mouse.click(track["x"] + 1, track["y"] + track["height"] / 2)  # no steps, no change
        page.get_by_text("0.0% of the pixels changed", exact=True).wait_for()
        page.get_by_text("next", exact=True).click()
        page.get_by_text("2 of 2: b").wait_for()
        box = page.locator(".picture img").bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.locator("table").nth(1).wait_for()
        assert page.locator(".picture circle").count() == 16
        assert len(page.locator("table").all()) == 2
        assert errors == []
        browser.close()


def test_without_the_library_the_message_says_how_to_get_it(viewer, monkeypatch):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[view\]'"):
        view_page.serve(viewer)
