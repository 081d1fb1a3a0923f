"""The notebooks run from start to end, in a kernel of their own, on little data and tiny networks."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "launch" / "colab"
NOTEBOOKS = sorted(p.name for p in FOLDER.glob("*.ipynb"))

# In place of each notebook's own parameters, and after the cell that makes the config.
LITTLE = {
    "train_shapes.ipynb": """
STEPS, WORKDIR, DATA_DIR = 3, "work", "data"
OPTIONS = {"size": 32, "train": 16, "validation": 3, "test": 1}
""",
    "your_images.ipynb": """
STEPS, WORKDIR, DATA_DIR = 3, "work", "data"
SOURCE, NAME, CROP, EXAMPLES = "", "mine", (32, 32), 12
""",
    "refine_your_model.ipynb": """
STEPS, WORKDIR, DATA_DIR = 3, "work", "data"
OPTIONS = {"size": 32, "train": 16, "validation": 6, "test": 1}
""",
    "jax_and_torch.ipynb": "SIZE, BATCH = (33, 33), 2",
    "volumes.ipynb": """
SOURCE, NAME, WORKDIR, DATA_DIR, EXAMPLES = "", "scans", "work", "data", 10
CLASSES = ("background", "anterior", "posterior")
STEPS, BATCH, PATCH = 3, 4, (16, 16, 16)
""",
}
TINY = """
from tests import tiny

config.model.encoder_options = {}
config.model.decoder_options = {}
tiny.model_config(config)
config.batch_size, config.data.crop_size, PRETRAINED = 4, (32, 32), ""
config.data.scale_range = (1.0, 1.5)
"""


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def test_each_has_little_to_do_here():
    assert set(NOTEBOOKS) == set(LITTLE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_is_kept_that_no_run_made(name):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_from_start_to_end(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = read(name)
    made = [i for i, cell in enumerate(notebook.cells) if "get_config()" in cell.source]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags:
            cell.source = LITTLE[name]
        if "pretrained" in tags:
            cell.source = 'PRETRAINED = ""'
    for i in made if name != "volumes.ipynb" else ():  # it has no network of images
        notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(TINY))
    # The kernel runs in an empty folder, where everything that it writes must stay.
    root = tmp_path / "elsewhere"
    root.mkdir()
    (root / "configs").symlink_to(FOLDER.parents[1] / "configs")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(root)}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    expected = "bit for bit: True" if name == "jax_and_torch.ipynb" else "mean IoU"
    assert expected in printed
    *_, last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for output in last.outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_code_installs_and_nothing_before_it_needs_the_package(name):
    first = next(cell for cell in read(name).cells if cell.cell_type == "code")
    assert "%pip install" in first.source
    assert "dilaff_jax." not in first.source
