"""The report of `--reliability-report FILE.json`: what was tried, what survived, and what with."""

import ast
import datetime
import json
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent
_LOST, _SKIPPED, _SURVIVED = "lost", "skipped", "survived"


class Report:
    """A pytest plugin that lives where reports arrive: with xdist in the controller."""

    def __init__(self, path: pathlib.Path, folder: pathlib.Path = FOLDER) -> None:
        self._path, self._folder = path, folder
        self._modules: dict[str, dict[str, dict]] = {}
        self._root = pathlib.Path()

    def pytest_sessionstart(self, session):
        self._root = session.config.rootpath

    def pytest_collectreport(self, report):
        """A module that cannot be imported is lost too."""
        if report.failed and self._is_ours(report.nodeid):
            self._case(report.nodeid)["outcome"] = _LOST

    def pytest_runtest_logreport(self, report):
        if not self._is_ours(report.nodeid):
            return
        case = self._case(report.nodeid)
        case["seconds"] += report.duration
        case["recorded"].update(report.user_properties)
        if report.failed:  # in the test, or in what sets it up or takes it down
            case["outcome"] = _LOST
        elif report.skipped and case["outcome"] != _LOST:
            case["outcome"] = _SKIPPED
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.wasxfail
            case["reason"] = str(reason).removeprefix("Skipped: ")
        elif report.when == "call":
            case["outcome"] = _SURVIVED

    def pytest_sessionfinish(self, session):
        if session.config.option.collectonly:
            return
        from dilaff_jax.runtime import provenance

        content = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **provenance.provenance("jaxlib", "numpy"),
            "modules": {name: self._module(name) for name in sorted(self._modules)},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")

    def _is_ours(self, nodeid: str) -> bool:
        path = self._root / nodeid.partition("::")[0]
        return path.suffix == ".py" and path.is_relative_to(self._folder)

    def _case(self, nodeid: str) -> dict:
        module, _, name = nodeid.partition("::")
        empty = {"outcome": "", "seconds": 0.0, "recorded": {}}
        return self._modules.setdefault(module, {}).setdefault(name, empty)

    def _module(self, name: str) -> dict:
        cases = self._modules[name]
        for case in cases.values():  # what a crash of its process left without an outcome is lost
            case["outcome"] = case["outcome"] or _LOST
        outcomes = [case["outcome"] for case in cases.values()]
        return {
            "title": _title(self._root / name),
            "tried": len(cases) - outcomes.count(_SKIPPED),
            _SURVIVED: outcomes.count(_SURVIVED),
            _LOST: outcomes.count(_LOST),
            "lost_cases": [n for n, case in cases.items() if case["outcome"] == _LOST],
            _SKIPPED: {n: c["reason"] for n, c in cases.items() if c["outcome"] == _SKIPPED},
            "seconds": round(sum(case["seconds"] for case in cases.values()), 2),
            "recorded": {n: c["recorded"] for n, c in cases.items() if c["recorded"]},
        }


def _title(path: pathlib.Path) -> str:
    """The first line of a module's docstring, which the controller never imports."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text()))
    except SyntaxError:  # such a module is in the report, as lost
        text = None
    return (text or path.stem).splitlines()[0]


def _plain(value):
    """Numbers of NumPy and JAX, and their arrays, as what JSON can hold."""
    return value.tolist()
