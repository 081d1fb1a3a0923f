"""The report of these tests: every case counted once, whichever process ran it."""

import json

import pytest

from tests.reliability.report import FOLDER

ROOT = FOLDER.parents[1]
pytest_plugins = ["pytester"]

MODULE = '''
"""A title.

More."""
import pytest

def test_good(record_property):
    record_property("steps", 3)

@pytest.mark.parametrize("n", [1, 2])
def test_bad(n):
    assert n == 1

@pytest.fixture
def broken():
    raise OSError

def test_set_up(broken):
    pass

def test_elsewhere():
    pytest.skip("no such machine")
'''
PLUGIN = """
import pathlib
from tests.reliability.report import Report

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        here = pathlib.Path(__file__).parent
        config.pluginmanager.register(Report(here / "out" / "r.json", here / "hard"))
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_every_case_is_counted_once(pytester, monkeypatch, processes):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(PLUGIN)
    pytester.mkpydir("hard").joinpath("test_a.py").write_text(MODULE)
    pytester.path.joinpath("hard/test_c.py").write_text("import nothing_of_that_name")
    pytester.path.joinpath("test_b.py").write_text("def test_not_ours():\n    pass\n")
    options = ["-n", str(processes), "--continue-on-collection-errors"]
    pytester.runpytest_subprocess(*options, "-p", "no:cacheprovider")
    report = json.loads(pytester.path.joinpath("out/r.json").read_text())
    assert report["versions"].keys() == {"jax", "jaxlib", "numpy"}
    assert {"date", "python", "cores", "commit", "processor"} <= report.keys()
    assert report["modules"].keys() == {"hard/test_a.py", "hard/test_c.py"}
    module = report["modules"]["hard/test_a.py"]
    assert module.pop("seconds") >= 0
    module["lost_cases"].sort()  # workers finish in any order
    assert module == {
        "title": "A title.",
        "tried": 4,
        "survived": 2,
        "lost": 2,
        "lost_cases": ["test_bad[2]", "test_set_up"],
        "skipped": {"test_elsewhere": "no such machine"},
        "recorded": {"test_good": {"steps": 3}},
    }
    assert report["modules"]["hard/test_c.py"]["lost"] == 1
