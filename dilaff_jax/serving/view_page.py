"""A local page to look at results: images, layers, a pixel's neighbourhood, refinement by slider.

    python -m dilaff_jax.main --mode view --workdir DIR    (needs the extra `view`: NiceGUI)

It shows the evaluation split of the run's data set, or, with --input, images of one's own. The
server listens on this machine's loopback address alone.
"""

import dataclasses
import pathlib
import socket
from typing import Any

import numpy as np
from PIL import Image

from dilaff_jax import visualize
from dilaff_jax.data import datasets
from dilaff_jax.errors import MissingPackageError, UserError
from dilaff_jax.serving import predict_files, video
from dilaff_jax.serving.predictor import Predictor
from dilaff_jax.serving.view_state import Picture, Settings, Viewer, Weight

HOST = "127.0.0.1"
OPERATORS = ["identity", "random_walk", "signed"]
# Small pictures are enlarged to about so many pixels, or the cross hair would be thick on them.
_LEAST = 720


def of_files(predictor: Predictor, folder: pathlib.Path) -> Viewer:
    """A viewer of an image, or of the images below a folder. Raises as `predict.find`."""
    files = {
        name: path
        for name, path in predict_files.find(
            folder, pathlib.Path("/nowhere"), predict_files.known(predictor.network)
        ).items()
        if path.suffix.lower() not in video.SUFFIXES
    }
    paths = list(files.values())

    def open_picture(index: int) -> Picture:
        seen = predictor.read(paths[index])
        spacing = Picture._field_defaults["spacing"] if seen.place is None else seen.place.spacing
        return Picture(list(files)[index], seen.picture, None, seen.pixels, spacing)

    return Viewer(predictor, list(files), open_picture)


def of_source(predictor: Predictor, source: datasets.Source) -> Viewer:
    """A viewer of a split of a data set; its images are scaled already."""

    def open_picture(index: int) -> Picture:
        example = source[index]
        image = example["image"]
        pixels = image.astype(predictor.network.dtype)
        picture = Picture(source.names[index], source.picture(image), example["label"], pixels)
        if source.spacings is None:
            return picture
        return picture._replace(spacing=source.spacings[index].tolist())

    return Viewer(predictor, source.names, open_picture)


def check_port(port: int) -> None:
    """Raises UserError for a port that is none, or that another program listens at."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port={port}; expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError as e:
            raise UserError(
                f"--port={port} cannot be used on {HOST}: {e.strerror}; give another port"
            ) from e


def serve(viewer: Viewer, port: int = 8080) -> None:
    """Serves the page on http://127.0.0.1:PORT until it is interrupted.

    Raises:
        ImportError: NiceGUI is not installed.
        UserError: the port cannot be used.
    """
    try:
        from nicegui import app, ui
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as e:
        raise MissingPackageError(f"{e}; pip install -e '.[view]'") from e
    check_port(port)
    # A page elsewhere that makes its name point here is not answered.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    ui.page("/")(lambda: Page(viewer).build())
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    ui.run(host=HOST, port=port, title="dilaff_jax", show=False, reload=False)


class Page:
    """One visitor's page."""

    def __init__(self, viewer: Viewer) -> None:
        self._viewer, self._settings = viewer, viewer.initial()
        self._busy = self._again = False
        self._clicked: tuple[float, float] | None = None
        self._factor = 1

    def build(self) -> None:
        """Lays out the page."""
        from nicegui import ui

        ui.add_css(".picture img { image-rendering: pixelated }")
        with ui.row().classes("w-full no-wrap items-start"):
            with ui.column().classes("w-80 shrink-0"):
                self._controls()
            with ui.column().classes("grow"):
                with ui.row().classes("items-center h-8"):
                    self._figures = ui.label()
                    self._spinner = ui.spinner()
                self._image = ui.interactive_image(
                    on_mouse=self._click, events=["mousedown"], cross=True
                ).classes("picture")
                self._legend()
            with ui.column().classes("w-72 shrink-0"):
                ui.label("Click a pixel: how likely is each neighbour of its class?")
                self._table = ui.html("", sanitize=False)
        ui.timer(0.1, self._refresh, once=True)

    def _controls(self) -> None:
        from nicegui import ui

        names = dict(enumerate(self._viewer.names))
        settings = self._settings
        ui.select(names, value=0, label="image", with_input=True).classes("w-full").on_value_change(
            lambda e: self._set(index=e.value)
        )
        with ui.row():
            ui.button("previous", on_click=lambda: self._move(-1))
            ui.button("next", on_click=lambda: self._move(1))
        self._number = ui.label()
        ui.radio(self._viewer.layers, value=settings.layer).on_value_change(
            lambda e: self._set(layer=e.value)
        )
        if self._viewer.is_of_volumes:
            axes = dict(enumerate(("first axis", "second axis", "third axis")))
            ui.select(axes, value=settings.axis, label="slices across").classes(
                "w-full"
            ).on_value_change(lambda e: self._set(axis=e.value))
            self._slider("position", 0, 1, 0.01)
        self._slider("opacity", 0, 1, 0.05)
        if not self._viewer.predictor.has_affinity:
            return
        ui.separator()
        ui.select(OPERATORS, value=settings.operator, label="operator").classes(
            "w-full"
        ).on_value_change(lambda e: self._set(operator=e.value))
        for name, low, high, step in (
            ("steps", 0, 10, 1),
            ("strength", 0, 1, 0.01),
            ("sharpness", 1, 16, 0.5),
            ("bias", -5, 5, 0.1),
        ):
            self._slider(name, low, high, step)

    def _slider(self, name: str, low: float, high: float, step: float) -> None:
        from nicegui import ui

        used = {"strength": ("signed",), "sharpness": ("random_walk",)}.get(name)
        with ui.column().classes("w-full gap-0") as box:
            label = ui.label(f"{name}: {getattr(self._settings, name):g}")
            slider = ui.slider(min=low, max=high, step=step, value=getattr(self._settings, name))
            slider.props(f"aria-label={name}")
        if used is not None:
            box.bind_visibility_from(self, "_settings", backward=lambda s: s.operator in used)

        async def change(value: float) -> None:
            label.set_text(f"{name}: {value:g}")
            await self._set(**{name: type(getattr(Settings(), name))(value)})

        slider.on_value_change(lambda e: change(e.value))

    def _legend(self) -> None:
        from nicegui import ui

        classes = self._viewer.predictor.classes
        groups = {"classes:": dict(zip(classes.names, classes.colors, strict=True))}
        if self._viewer.predictor.has_affinity:
            groups["changes:"] = {name: np.array(rgb) for name, rgb in visualize.CHANGES.items()}
        for title, colors in groups.items():
            with ui.row().classes("gap-3"):
                ui.label(title).classes("text-sm")
                for name, color in colors.items():
                    with ui.row().classes("items-center gap-1"):
                        rgb = ",".join(str(int(c)) for c in color)
                        ui.element("div").style(f"width:1em;height:1em;background:rgb({rgb})")
                        ui.label(name).classes("text-sm")

    async def _move(self, by: int) -> None:
        await self._set(index=(self._settings.index + by) % len(self._viewer.names))

    async def _set(self, **changes: Any) -> None:
        self._settings = dataclasses.replace(self._settings, **changes)
        if "index" in changes:
            self._clicked = None
        await self._refresh()

    async def _refresh(self) -> None:
        """Draws what the settings say; while it is at it, only the latest change is remembered."""
        from nicegui import run

        self._again = True
        if self._busy:
            return
        self._busy = True
        self._spinner.set_visibility(True)
        try:
            while self._again:
                self._again = False
                settings = self._settings
                drawn = await run.io_bound(self._viewer.render, settings)
                if drawn is None:  # the server is ending
                    return
                picture, text = drawn
                height, width = picture.shape[:2]
                self._factor = max(1, _LEAST // max(height, width))
                drawn_at = picture.repeat(self._factor, axis=0).repeat(self._factor, axis=1)
                self._image.set_source(Image.fromarray(drawn_at))
                # As wide as there is room for, and not higher than the window.
                self._image.style(f"width: min(100%, 56rem, {85 * width / height:.1f}vh)")
                self._figures.set_text(text)
                name = self._viewer.names[settings.index]
                self._number.set_text(f"{settings.index + 1} of {len(self._viewer.names)}: {name}")
                self._mark()
        finally:
            self._busy = False
            self._spinner.set_visibility(False)

    def _click(self, event: Any) -> None:
        self._clicked = event.image_x / self._factor, event.image_y / self._factor
        self._mark()

    def _mark(self) -> None:
        """Draws the neighbours of the clicked pixel, and their weights."""
        weights = []
        if self._clicked is not None:
            weights = self._viewer.weights(self._settings, *self._clicked)
        circles = "".join(_circle(w) for w in weights)
        self._image.set_content(f'<g transform="scale({self._factor})">{circles}</g>')
        self._table.set_content(table(weights))


def color(affinity: float) -> str:
    """From orange (another class) over white to blue (the same)."""
    ends = np.array([[213, 94, 0], [255, 255, 255], [0, 114, 178]], float)
    mixed = [np.interp(affinity, [0, 0.5, 1], channel) for channel in ends.T]
    return "rgb({:.0f},{:.0f},{:.0f})".format(*mixed)


def table(weights: list[Weight]) -> str:
    """The weights as a 3 x 3 grid for each dilation, HTML."""
    by_dilation: dict[int, dict[tuple[int, int], float]] = {}
    for weight in weights:
        by_dilation.setdefault(weight.dilation, {})[weight.step] = weight.affinity
    grids = []
    for dilation, cells in by_dilation.items():
        rows = "".join(
            "<tr>" + "".join(_cell(cells.get((v, u))) for u in (-1, 0, 1)) + "</tr>"
            for v in (-1, 0, 1)
        )
        grids.append(f"<div>dilation {dilation}</div><table>{rows}</table>")
    return "".join(grids)


def _cell(affinity: float | None) -> str:
    style = "width:3.5em;text-align:center"
    if affinity is None:
        return f'<td style="{style}">·</td>'
    dark = "color:white;" if not 0.15 < affinity < 0.85 else ""
    return f'<td style="{style};{dark}background:{color(affinity)}">{affinity:.2f}</td>'


def _circle(weight: Weight) -> str:
    radius = weight.size * (0.22 + 0.09 * weight.dilation)
    return (
        f'<circle cx="{weight.x:.1f}" cy="{weight.y:.1f}" r="{radius:.2f}" '
        f'fill="{color(weight.affinity)}" stroke="black" stroke-width="{weight.size / 13:.2f}" />'
    )
