"""The page of an ablation, from its `ablation.json` alone (and its pictures, where they are).

    python -m dilaff_jax.report DIR_OR_JSON [--output FILE.html]

One file that needs no network: plots are inline SVG, pictures inline data.
"""

import base64
import json
import pathlib
from typing import Any

from dilaff_jax.errors import UserError

# What `ablation.json` this page knows.
FORMAT = 1


def write(source: pathlib.Path, output: pathlib.Path | None = None) -> pathlib.Path:
    """Renders a workdir (or an ablation.json itself) and returns the page's path.

    Args:
        source: of the numbers.
        output: of the page; beside the numbers by default, as NAME.html.

    Raises:
        FileNotFoundError: there is no ablation.json.
        UserError: it is of another format.
    """
    path = source / "ablation.json" if source.is_dir() else source
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --mode ablate writes it")
    result = read(path)
    output = path.with_suffix(".html") if output is None else output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(result, path.parent), encoding="utf-8")
    return output


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads ablation.json.

    Raises:
        UserError: it is none, or of another format.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        version = result["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no ablation.json: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}; this version reads {FORMAT}: run --mode ablate again"
        )
    return result


def render(result: dict[str, Any], folder: pathlib.Path) -> str:
    """The page as text; pictures are looked for in `folder` and left out where they are not."""
    import jinja2

    from dilaff_jax.ablation.report import content, diagram, plots

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= content.FILTERS
    return environment.get_template("template.html.j2").render(
        result=result,
        page=content.page(result),
        plots=plots.draw(result),
        diagram=diagram.neighbourhood(content.dilations(result)),
        pictures=_pictures(result, folder),
    )


def _pictures(result: dict[str, Any], folder: pathlib.Path) -> list[dict[str, Any]]:
    """The drawn images whose files are all there, each tile as a data address."""
    complete = []
    for shown in result["pictures"]:
        paths = {title: folder / name for title, name in shown["tiles"].items()}
        if all(path.is_file() for path in paths.values()):
            complete.append(shown | {"tiles": {title: _data(p) for title, p in paths.items()}})
    return complete


def _data(path: pathlib.Path) -> str:
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
