"""Fixtures of the tests of reliability."""

import tempfile

import pytest

from tests.reliability import runs
from tests.reliability.place import Place


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The data of `runs`, prepared once a module."""
    return runs.data(tmp_path_factory)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an empty home, working directory and folder for temporary files."""
    place = Place(tmp_path)
    for name in ("home", "cwd", "tmp", "source"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(place.home))
    monkeypatch.setenv("TMPDIR", str(place.tmp))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(place.cwd)
    return place
