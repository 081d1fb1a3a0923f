"""Writes the tables of docs/configs.md from the package: python docs/config_tables.py.

A table follows a line `<!-- keys: SECTION -->`; what stands there is replaced. The rows are the
`KEYS` of the section, see `dilaff_jax.settings`; those of the affinity head are the attributes in
its docstring. A test holds the page to the package.
"""

import inspect
import pathlib
import re

from dilaff_jax import schema, settings
from dilaff_jax.ablation import ablate_config
from dilaff_jax.configs import default
from dilaff_jax.models import affinity_head, module_options

PAGE = pathlib.Path(__file__).resolve().parent / "configs.md"
_HEAD = "| key | default | meaning |\n|---|---|---|\n"
_TABLE = re.compile(r"(<!-- keys: ([\w.]+) -->\n\n)(?:\|.*\n)*")


def updated(text: str) -> str:
    """The page with every table as the package has it."""
    return _TABLE.sub(lambda match: match[1] + table(match[2]), text)


def table(section: str) -> str:
    """The rows of one section, in alphabetical order."""
    rows = {"run": _run, "model.affinity": _affinity_head}.get(section, lambda: _keys(section))()
    return _HEAD + "".join(
        f"| `{key}` | `{_shown(value)}` | {meaning} |\n"
        for key, (value, meaning) in sorted(rows.items())
    )


def sections(text: str) -> list[str]:
    """The sections that have a table on the page."""
    return [match[2] for match in _TABLE.finditer(text)]


def _run() -> dict[str, tuple[object, str]]:
    return {name: (key.default, key.meaning) for name, key in settings.RUN.items()}


def _keys(section: str) -> dict[str, tuple[object, str]]:
    keys = {**settings.SECTIONS, "ablate": ablate_config.KEYS}[section]
    # What configs/default.py changes is shown as it is there.
    config = default.get_config()
    values = config[section] if section in config else schema.defaults(keys)
    return {f"{section}.{name}": (_plain(values[name]), key.meaning) for name, key in keys.items()}


def _affinity_head() -> dict[str, tuple[object, str]]:
    head = affinity_head.AffinityHead()
    text = inspect.getdoc(affinity_head.AffinityHead) or ""
    attributes = re.findall(
        r"^    (\w+): (.*(?:\n        .*)*)", text.partition("Attributes:\n")[2], re.M
    )
    meanings = {name: " ".join(words.split()) for name, words in attributes}
    names = [n for n in module_options.fields(affinity_head.AffinityHead) if n != "style"]
    return {
        f"model.affinity.{name}": (
            getattr(head, name),
            meanings[name][0].upper() + meanings[name][1:],
        )
        for name in names
    }


def _plain(value: object) -> object:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else "..."


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
