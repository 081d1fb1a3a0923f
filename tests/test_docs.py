"""The documentation builds, its code runs, and its tables say what the code and the results say."""

import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import dilaff_jax.data
from dilaff_jax import affinity, objective, propagate, settings
from dilaff_jax.configs import default, shapes_quickstart
from dilaff_jax.data import data_config, datasets, images, prepare
from dilaff_jax.data.class_list import Classes
from dilaff_jax.models import segmenter
from dilaff_jax.serving import network, predictor

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(page):
    """The Python blocks of a page: [(file name or "", code)]."""
    pattern = r'^```python(?: title="(.*?)")?\n(.*?)^```$'
    return re.findall(pattern, (ROOT / page).read_text(), re.M | re.S)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    method = (tmp_path / "method.html").read_text()
    assert "<math" in method
    assert "arithmatex" not in method  # no formula is left as TeX
    reference = "".join(p.read_text() for p in (tmp_path / "reference").glob("*.html"))
    for path in (ROOT / "dilaff_jax").rglob("[a-z]*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f'id="{module}"' in reference, f"{module} is missing from the reference"
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, f"{page.name} loads {loaded} from the network"


def test_the_pictures_are_those_that_the_command_draws():
    figures = script("figures")
    assert (DOCS / "images" / "neighbourhood.svg").read_text() == figures.neighbourhood()
    assert (DOCS / "images" / "rooms.svg").read_text() == figures.rooms()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/at_a_glance.md",
        "docs/findings.md",
        "docs/findings_rounds.md",
        "docs/performance.md",
    ],
)
def test_measured_numbers_are_those_of_their_files(page):
    numbers, text = script("measured"), (ROOT / page).read_text()
    assert ROOT / page in numbers.PAGES
    assert numbers.count(text) > 0
    assert numbers.updated(text) == text, "run: python docs/measured.py"


def test_the_page_on_performance_has_all_rows_of_the_memory_traffic():
    rows = json.loads((ROOT / "results" / "hbm_traffic.json").read_text())["rows"]
    page = script("measured").bare((DOCS / "performance.md").read_text())
    for row in rows:
        numbers = (row[k] for k in ("hbm_gb_per_image", "xla_gb_per_image", "temporaries_gb"))
        cells = [row["part"].replace("_", " "), row["commit"][:7], *(f"{x:.3f}" for x in numbers)]
        assert f"| {' | '.join(cells)} |" in page


def test_a_wrong_number_would_be_found():
    numbers = script("measured")
    path = "results > size=513x513x21 > median_seconds > dilaff_jax > *1000"
    wrong = f'[99999.9 ms][walk]\n\n[walk]: results/propagation_cpu.json "{path}"\n'
    assert numbers.count(wrong) == 1
    assert numbers.updated(wrong) != wrong
    for other in (
        wrong.replace("size=513x513x21", "size=none"),
        wrong.replace("[walk]:", "[step]:"),
        f'{wrong}[unused]: results/propagation_cpu.json "{path}"\n',
    ):
        with pytest.raises(LookupError):
            numbers.updated(other)
    assert numbers.bare(wrong) == "99999.9 ms\n\n"


@pytest.mark.parametrize("page", ["docs/method.md", "docs/torch.md", "docs/use.md"])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What bears a title is a file, tested below or with what it needs.
    untitled = [code for title, code in code_blocks(page) if not title]
    assert untitled
    scope = {}
    for code in untitled:
        exec(compile(code, page, "exec"), scope)


def test_the_table_of_data_sets_names_all_of_them_and_counts_their_classes():
    rows = re.findall(
        r"^\| `(\w+)(?:/NAME)?` \| (\w+) \|", (DOCS / "datasets.md").read_text(), re.M
    )
    found = {name: datasets.builder_class(name) for name in datasets.names()}
    assert {name for name, _ in rows} == found.keys()
    for name, classes in rows:
        if classes != "yours":
            assert len(found[name].class_names) == int(classes), name


def test_the_code_of_the_use_page_runs_on_a_picture(tmp_path, monkeypatch):
    """With a stand-in for the trained network: scores are the colours of every fourth pixel."""
    colours = network.Network(
        apply=lambda _, images: (images[:, ::4, ::4] / 32.0, jnp.zeros((1, 6, 8, 8))),
        variables=(),
        offsets=affinity.offsets((1,)),
        classes=Classes(("red", "green", "blue"), np.eye(3, dtype=np.uint8) * 255),
        refine={"name": "identity"},
    )
    monkeypatch.setattr(predictor, "load", lambda path: predictor.Predictor(colours))
    monkeypatch.chdir(tmp_path)
    image = np.zeros((24, 32, 3), np.uint8)
    image[:, :16, 0] = image[:, 16:, 2] = 255
    pathlib.Path("street.jpg").write_bytes(images.encode_png(image))
    [code] = [code for title, code in code_blocks("docs/use.md") if title == "street.py"]
    scope = {}
    exec(code, scope)
    assert scope["result"].labels[:, [0, 31]].tolist() == [[0, 2]] * 24


def test_the_quickstarts_network_is_as_large_as_the_pages_say():
    config = shapes_quickstart.get_config()
    variables = segmenter.abstract_variables(segmenter.build(config.model, 8))
    millions = sum(x.size for x in jax.tree.leaves(variables["params"])) / 1e6
    for page in ("README.md", "docs/tutorial.md", "docs/at_a_glance.md"):
        text = " ".join((ROOT / page).read_text().split())
        assert f"plain U-Net of {millions:.1f} million parameters" in text, page


def test_the_losses_of_the_method_page_are_losses():
    [code] = [code for title, code in code_blocks("docs/method.md") if title == "losses.py"]
    scope = {}
    exec(code, scope)
    config = scope["get_config"]()
    settings.check(config)
    config = objective.with_class_weights(config, np.array([3, 1, 1]))
    model = segmenter.build(config.model, 3)
    weights = objective.Objective(config, model, 3).weights
    assert weights == {"cross_entropy": 1.0, "dice": 0.5, "affinity": 1.0}
    page = (ROOT / "docs/method.md").read_text().split("## Which loss")[1].split("\n## ")[0]
    named = {
        n
        for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for n in re.findall(r"\w+", row)
    }
    assert named == set(objective.SEGMENTATION_LOSSES)


def test_the_code_of_the_readme_is_that_of_the_use_page():
    assert code_blocks("README.md") == [
        block for block in code_blocks("docs/use.md") if block[0] == "street.py"
    ]


# Your own parts


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The files of docs/extend.md, importable; the data set as if it lay in the package."""
    for title, code in code_blocks("docs/extend.md"):
        file = tmp_path / pathlib.Path(title).name
        file.write_text(code)
        # Another test may have imported a file of the same name.
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dilaff_jax.data, "__path__", [*dilaff_jax.data.__path__, str(tmp_path)])
    return tmp_path


def test_the_data_set_of_the_page_is_prepared_and_read(own_files):
    prepare.prepare("dominoes", own_files / "data")
    config = data_config.default(dataset="dominoes", data_dir=str(own_files / "data"))
    source = datasets.load(config, "train")
    assert len(source) == 4
    assert source.class_names == ("left", "right")
    assert source[1]["label"][0].tolist() == [0] * 16 + [1] * 16
    assert source[1]["image"][0, 0].tolist() == [1, 1, 1]


@pytest.mark.usefixtures("own_files")
def test_the_encoder_and_the_decoder_of_the_page_make_a_network():
    own = {"encoder": "my_encoder:Five", "decoder": "my_decoder:Fine", "output_stride": 16}
    config = own | {
        "encoder_options": {"width": 8},
        "decoder_options": {"width": 8},
        "affinity": {},
    }
    model = segmenter.build(config, 3)
    pixels = jnp.zeros((1, 64, 96, 3))
    shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), pixels, train=False)[0]
    )
    assert shapes["logits"].shape == (1, 16, 24, 3)
    assert shapes["affinity_logits"].shape == (1, 16, 24, 32)


@pytest.mark.usefixtures("own_files")
def test_the_operator_of_the_page_refines():
    refine = propagate.operator("my_operator:gated", steps=2, bias=0.5)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), (1, 8, 8)).astype(np.float32)
    offsets = affinity.offsets((1,))
    edges = rng.normal(size=(1, 8, 8, 8)).astype(np.float32)
    found = np.asarray(refine(probs, edges, offsets))
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert np.abs(found - probs).max() > 0.01
    # A pixel with no open edge keeps its value.
    np.testing.assert_allclose(refine(probs, np.zeros_like(edges), offsets), probs, rtol=1e-6)


# Configs


def test_the_tables_of_the_configs_page_are_those_of_the_package():
    tables, text = script("config_tables"), (DOCS / "configs.md").read_text()
    assert set(tables.sections(text)) == {
        *("run", "model.affinity", "ablate"),
        *settings.SECTIONS,
    }
    assert tables.updated(text) == text, "run: python docs/config_tables.py"


def test_every_key_of_the_default_config_is_on_the_configs_page():
    rows = re.findall(r"^\| `([\w.]+)` \| ", (DOCS / "configs.md").read_text(), re.M)
    config = default.get_config().to_dict()
    sections = {k: v for k, v in config.items() if isinstance(v, dict)}
    keys = {f"{s}.{k}" for s, section in sections.items() for k in section}
    assert (config.keys() - sections.keys()) | keys <= set(rows)
    assert len(rows) == len(set(rows))


def test_the_config_of_the_page_runs():
    [(_, code)] = code_blocks("docs/configs.md")
    scope = {}
    exec(code, scope)
    assert scope["get_config"]().data.crop_size == (256, 256)


def test_the_citation_file_has_what_its_schema_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == dilaff_jax.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{dilaff_jax.__version__}]" in changelog
