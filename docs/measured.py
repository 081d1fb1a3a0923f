"""Takes the measured numbers of README.md and docs/ from results/: python docs/measured.py.

A number that was measured is a link by reference, whose definition, at the foot of the page, names
its file and says where in it the number stands:

    propagation takes [75.5 ms][propagation.513.numba]

    [propagation.513.numba]: results/propagation_cpu.json "results > size=513x513x21 > numba"

Each step is a key, an index, or KEY=VALUE[,KEY=VALUE] for the entry of a list; *N multiplies. The
number keeps the decimals and the unit that it is written with. Pages of docs/ write ../results;
their built form, which has no such folder beside it, shows the number alone. A test holds all
pages to the files.
"""

import json
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_NUMBER = re.compile(r"\[([-\d.,]+)([^]]*)\]\[([^]]+)\]")
_DEFINITION = re.compile(
    r'^\[([^]]+)\]: ((?:\.\./)?results/[\w./-]+\.json) "([^"]+)"\n', re.MULTILINE
)


def updated(text: str) -> str:
    """The text with every such number as its file has it.

    Raises:
        LookupError: a file has no such place, or more than one; a number without a definition, or
            a definition that no number uses.
    """
    places = {label: (file, path) for label, file, path in _DEFINITION.findall(text)}
    used = {label for _, _, label in _NUMBER.findall(text)}
    for problem, labels in (
        ("has no definition", used - places.keys()),
        ("is not used", places.keys() - used),
    ):
        if labels:
            raise LookupError(f"[{min(labels)}] {problem}")

    def current(match: re.Match[str]) -> str:
        shown, unit, label = match.groups()
        file, path = places[label]
        content = json.loads((ROOT / file.removeprefix("../")).read_text())
        value = float(_look_up(content, path.split(" > ")))
        decimals = len(shown.partition(".")[2])
        return f"[{value:{',' if ',' in shown else ''}.{decimals}f}{unit}][{label}]"

    return _NUMBER.sub(current, text)


def count(text: str) -> int:
    """How many such numbers there are."""
    return len(_NUMBER.findall(text))


def bare(text: str) -> str:
    """The text with such numbers as plain text, without definitions."""
    return _NUMBER.sub(r"\1\2", _DEFINITION.sub("", text))


def _look_up(value: Any, path: list[str]) -> Any:
    for step in path:
        if step.startswith("*"):
            value = value * float(step[1:])
        elif isinstance(value, list) and "=" in step:
            wanted = [pair.split("=") for pair in step.split(",")]
            found = [x for x in value if all(str(x.get(k)) == v for k, v in wanted)]
            if len(found) != 1:
                raise LookupError(f"{step!r} fits {len(found)} entries; expected 1")
            value = found[0]
        else:
            value = value[int(step)] if isinstance(value, list) else value[step]
    return value


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
