"""Fixtures of the tests of reliability."""

import tempfile

import pytest

from tests.reliability.place import Place


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
