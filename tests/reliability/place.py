"""Where one case of bad input happens, and how a refusal is held to its words."""

import dataclasses
import hashlib
import pathlib

import pytest


@dataclasses.dataclass
class Place:
    """Where one case happens; only `data` and `run` may be written to."""

    at: pathlib.Path

    def __getattr__(self, name):
        return self.at / name


def contents(place):
    """Every file, folder and link outside `data` and `run`, with what is in it."""
    found = {}
    for path in sorted(place.at.rglob("*")):
        name = path.relative_to(place.at)
        if name.parts[0] in ("data", "run"):
            continue
        is_file = path.is_file() and not path.is_symlink()
        found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
    return found


def refused(place, act, message, error=ValueError):
    """Holds an error to its whole message; "..." stands for the words of another library.

    {AT} is the place's folder.
    """
    before = contents(place)
    with pytest.raises(error) as caught:
        act()
    found, wanted = str(caught.value), message.replace("{AT}", str(place.at))
    own = wanted.removesuffix("...")
    assert (found.startswith(own) and found != own) if own != wanted else found == wanted, found
    assert contents(place) == before


def cases(*table):
    """Parameters of a test from rows that begin with their name."""
    return [pytest.param(*rest, id=name) for name, *rest in table]
