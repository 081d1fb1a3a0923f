"""The page of an ablation whose networks are planted: complete, valid, self-contained."""

import html.parser
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from dilaff_jax.ablation import arms, network_outputs, report, run
from dilaff_jax.ablation.report import content, diagram
from dilaff_jax.report import __main__ as command
from tests import data_files, planted
from tests.test_ablate import make_config

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

VOID = {"br", "img", "meta", "link", "hr", "input"}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    """The workdir of an ablation over two seeds, with one rival of each kind."""
    folder = tmp_path_factory.mktemp("report")
    data = data_files.tiny_shapes(folder / "data", train=3, validation=4, test=5)
    config = make_config(data, seeds=(0, 1))
    with config.ignore_type():
        config.ablate.rivals = {
            "dense_crf": {"steps": (2,), "bilateral_sigma": (5.0,)},
            "pamr": {"steps": (1,)},
        }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_outputs, "compute", planted.compute)
        patch.setattr(arms, "train_all", lambda *_: None)
        run.ablate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def result(ablation):
    return json.loads((ablation / "ablation.json").read_text())


@pytest.fixture(scope="module")
def page(ablation):
    return (ablation / "ablation.html").read_text()


class Checked(html.parser.HTMLParser):
    """Tags in balance, identifiers once, and whatever an attribute would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.fetched, self.faults = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if len(attributes) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        self.ids += [attributes["id"]] if "id" in attributes else []
        names = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.fetched += [attributes[n] for n in names if n in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another tag at {self.getpos()}")


def checked(text):
    parser = Checked()
    parser.feed(text)
    parser.close()
    return parser


def test_the_page_is_well_formed_html(page):
    found = checked(page)
    assert page.startswith("<!doctype html>")
    assert found.faults == []
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        xml.etree.ElementTree.fromstring(svg)


def test_the_page_needs_no_network(page):
    fetched = checked(page).fetched
    assert fetched
    assert all(x.startswith(("#", "data:image/")) for x in fetched)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "<script" not in page
    references = set(re.findall(r"url\(#([^)]+)\)", page)) | {x[1:] for x in fetched if x[0] == "#"}
    assert references <= set(checked(page).ids)


def test_the_page_shows_everything_the_referee_asked_for(page, result):
    for name in ("answers", "arms", "affinity", "propagation", "images", "cost", "definition"):
        assert f'<section id="{name}">' in page, name
    for title in (v["title"] for v in result["variants"].values()):
        assert title in page
    assert page.count('class="plot"') == 8
    ranks = re.findall(r"<b>(best|median|worst)</b>", page)
    assert ranks == ["best", "median", "worst"]
    assert page.count("data:image/") == 6 * len(ranks)
    for tile in ("truth", "before", "after", "changes", "edges"):
        assert page.count(f"<span>{tile}</span>") == len(ranks)


def test_numbers_on_the_page_are_those_of_the_file(page, result):
    for name in ("baseline", "joint", "refined", "aaf"):
        assert content.spread(result["variants"][name]["figures"]["miou"]) in page
    figures = content.difference(result, "refined", "baseline")
    assert content.interval(figures["miou"]["over_seeds"]) in page
    assert content.interval(figures["boundary_f"]["over_images"]) in page


def test_the_page_from_the_file_alone_is_the_same_without_pictures(ablation, page, tmp_path):
    copy = tmp_path / "results" / "study.json"
    copy.parent.mkdir()
    copy.write_bytes((ablation / "ablation.json").read_bytes())
    assert command.main([str(copy)]) == 0
    alone = (tmp_path / "results" / "study.html").read_text()
    begin = page.index('<section id="images">')
    end = page.index("</section>", begin) + len("</section>")
    assert "data:image" not in alone
    assert alone.split() == (page[:begin] + page[end:]).split()
    again = tmp_path / "again.html"
    assert command.main([str(ablation), "--output", str(again)]) == 0
    assert again.read_text() == page


def test_the_file_is_small_and_holds_what_the_page_needs(ablation, result):
    assert (ablation / "ablation.json").stat().st_size < 2**20
    assert set(result["variants"]) >= {"baseline", "joint", "refined", "aaf"}
    assert result["splits"]["report"]["images"] == 5
    assert result["splits"]["selection"]["images"] == 4
    assert result["provenance"]["versions"]["jax"]
    assert set(result["affinity"]["head"]) >= {"d1/precision", "d2/recall", "d1/average_precision"}
    crf = result["selection"]["missing"].get("dense_crf")
    assert crf or {"baseline+dense_crf", "joint+dense_crf"} <= set(result["variants"])
    assert {"baseline+pamr", "joint+pamr"} <= set(result["variants"])
    assert (
        result["cost"]["networks"]["joint"]["parameters"]
        > result["cost"]["networks"]["baseline"]["parameters"]
    )
    assert result["cost"]["milliseconds"]["propagation"] > 0


def test_transitions_add_to_the_change_of_pixel_accuracy(result):
    gain = result["transitions"]["refined"]["figures"]["gain"]["values"]
    change = content.difference(result, "refined", "joint")["pixel_accuracy"]["values"]
    assert gain == pytest.approx(change, abs=1e-5)
    assert result["transitions"]["refined"]["figures"]["changed"]["mean"] > 0


def test_pictures_are_of_the_best_median_and_worst_images(result):
    shown = {p["rank"]: p["gain"] for p in result["pictures"]}
    assert shown["best"] >= shown["median"] >= shown["worst"]
    assert len({p["name"] for p in result["pictures"]}) == 3


def test_one_arm_alone_with_one_seed_has_a_page_that_claims_nothing(result):
    alone = result | {"seeds": [0], "arms": ["baseline"], "differences": [], "affinity": None}
    alone |= {"transitions": {}, "per_image": None, "pictures": []}
    alone |= {"selection": result["selection"] | {"choices": {}}}
    spread = {k: {"values": [v["mean"]], "mean": v["mean"], "std": None}
              for k, v in result["variants"]["baseline"]["figures"].items()}  # fmt: skip
    alone["variants"] = {"baseline": result["variants"]["baseline"] | {"figures": spread}}
    cost = {"networks": {"baseline": result["cost"]["networks"]["baseline"]}}
    times = {k: result["cost"]["milliseconds"][k] for k in ("baseline", "resizing")}
    alone["cost"] = result["cost"] | cost | {"milliseconds": times}
    text = report.render(alone, report.pathlib.Path())
    assert checked(text).faults == []
    assert "nothing to compare with" in text
    assert "one seed: no deviation" in text


@pytest.mark.parametrize(
    ("seeds", "images", "values", "said"),
    [
        ([0.01, 0.03], [0.01, 0.03], [0.02, 0.02], "higher"),
        ([-0.03, -0.01], [0.0, 0.0], [-0.02, -0.02], "lower"),
        ([-0.01, 0.03], [0.01, 0.02], [0.0, 0.02], "undecided: interval includes zero"),
        (None, [0.01, 0.02], [0.02], "higher in the one run made"),
        (None, [-0.01, 0.02], [0.02], "undecided, one run"),
        (None, [0.0, 0.0], [0.0], "no change"),
    ],
)
def test_what_is_said_follows_the_interval_over_seeds(seeds, images, values, said):
    found = {"values": values, "mean": np.mean(values), "over_seeds": seeds, "over_images": images}
    assert content.verdict({"miou": found}) == said


@pytest.mark.parametrize("dilations", [(1,), (1, 2), (1, 2, 4, 8), (3, 16), (12, 24)])
def test_the_diagram_shows_every_neighbour_that_fits(dilations):
    tree = xml.etree.ElementTree.fromstring(diagram.neighbourhood(dilations))
    drawn = [d for d in dilations if d <= 8] or dilations[:1]
    assert len(tree.findall("line")) == 8 * len(drawn)
    assert len(tree.findall("rect")) == 8 * len(drawn) + 1 + len(drawn)


def test_what_is_no_ablation_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--mode ablate writes it"):
        report.write(tmp_path)
    (tmp_path / "ablation.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        report.write(tmp_path)
    (tmp_path / "ablation.json").write_text("[1")
    with pytest.raises(SystemExit, match="is no ablation"):
        command.main([str(tmp_path)])
