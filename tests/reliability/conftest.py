"""Fixtures of the tests of reliability."""

import tempfile

import pytest

from tests.reliability import runs
from tests.reliability.place import Place

# Kills of a test; `--kills` of them are shared by several.
SHARE = 4


def pytest_generate_tests(metafunc):
    """`kills` of a test: the numbers of its share; of the bucket's, half for each protocol."""
    if "kills" in metafunc.fixturenames:
        number = metafunc.config.getoption("--kills")
        if "place" in metafunc.fixturenames:
            number = -(-number // 2)
        shares = [range(n, min(n + SHARE, number)) for n in range(0, number, SHARE)]
        metafunc.parametrize("kills", shares, ids=[str(s.start) for s in shares])


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
