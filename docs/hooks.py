"""What mkdocs does besides: pages of the API reference, measured numbers, formulas as MathML.

All happens at build time, so that a built site needs no network and no script to be read.
"""

import html
import pathlib
import re
from typing import Any

import latex2mathml.converter
import measured
from mkdocs.structure.files import File, Files

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "dilaff_jax"
METHOD = ("affinity", "propagate", "resize", "kernels", "losses", "metrics", "baselines")
PAGES = {
    "method": "The method",
    "models": "Models",
    "data": "Data",
    "interop": "Weights and parity",
    "running": "Training, evaluation, use",
}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds a reference page for every part of the package; no module is left out."""
    modules: dict[str, list[str]] = {page: [] for page in PAGES}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("_") and path.name != "__init__.py":
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        modules[_page(parts)].append(name)
    for page, names in modules.items():
        files.append(File.generated(config, f"reference/{page}.md", content=_text(page, names)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Measured numbers without their links to results/, which is no part of the site."""
    return measured.bare(markdown)


def on_page_content(html_text: str, **_: Any) -> str:
    r"""Turns `\(...\)` and `\[...\]`, as pymdownx.arithmatex marks them, into MathML."""
    pattern = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(pattern, _mathml, html_text, flags=re.DOTALL)


def _page(parts: tuple[str, ...]) -> str:
    part = parts[1]
    return "method" if part in METHOD else part if part in PAGES else "running"


def _text(page: str, names: list[str]) -> str:
    blocks = [f"# {PAGES[page]}\n"]
    for name in names:
        # A package's own page is its docstring; what it exports stands with its modules.
        package = (PACKAGE.parent / name.replace(".", "/")).is_dir()
        options = "    options:\n      members: []\n" if package else ""
        blocks.append(f"::: {name}\n{options}")
    return "\n".join(blocks)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    formula = latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)
    return f'<{match[1]} class="formula">{formula}</{match[1]}>'
