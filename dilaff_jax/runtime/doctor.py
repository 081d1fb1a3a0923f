"""What a machine has for this package, and what is wrong with it: `dilaff doctor`."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from packaging.requirements import Requirement

from dilaff_jax.errors import UserError
from dilaff_jax.runtime import chips, machine, parallel

DISTRIBUTION = "dilaff-jax"
_GB = 1e9
# Below which there is trouble ahead: two checkpoints of a ResNet-101 with their optimiser; what
# workers of the input pipeline hand over. (Our choice.)
_DISK, _SHARED_MEMORY = 2 * _GB, 0.5 * _GB
# What the driver of a device leaves on Linux, and what JAX needs for it.
_DRIVERS = {
    "gpu": (("/dev/nvidia0", "/dev/nvidiactl"), '"jax[cuda13]"'),
    "tpu": (("/dev/accel0", "/dev/vfio/0"), '"jax[tpu]"'),
}


class Finding(NamedTuple):
    """One thing that was looked at; `trouble` says what is wrong and what to do, "" for nothing."""

    what: str
    found: str
    trouble: str = ""


def examine(workdir: pathlib.Path = pathlib.Path()) -> list[Finding]:
    """Looks at Python, packages, devices, memory and disks.

    Args:
        workdir: whose disk is looked at.
    """
    return [
        Finding("python", f"{platform.python_version()}, {sys.executable}"),
        *packages(),
        *devices(),
        *memory(),
        *disks(workdir),
    ]


def packages() -> Iterator[Finding]:
    """What the package requires, then each extra."""
    try:
        own = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, "not installed", "its requirements cannot be checked: pip install -e ."
        )
        return
    yield Finding(DISTRIBUTION, own.version)
    requirements = [Requirement(line) for line in own.requires or ()]
    installed = _installed()
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, installed)
    for extra in own.metadata.get_all("Provides-Extra") or ():
        yield _extra(extra, requirements, installed)
    if {"opencv-python", "opencv-python-headless"} <= installed.keys():
        yield Finding(
            "opencv",
            "twice",
            "opencv-python and opencv-python-headless overwrite each other: pip uninstall both, "
            "then pip install opencv-python-headless",
        )
    versions = {name: installed.get(name) for name in ("jax", "jaxlib")}
    if len(set(versions.values())) > 1:
        yield Finding(
            "jax and jaxlib",
            ", ".join(f"{k} {v}" for k, v in versions.items()),
            f"they belong to different releases: pip install jaxlib=={versions['jax']}",
        )


def _installed() -> dict[str, str]:
    """{name in lower case with hyphens: version} of all that is installed."""
    found = importlib.metadata.distributions()
    return {_plain(d.metadata["Name"]): d.version for d in found if d.metadata["Name"]}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _package(requirement: Requirement, installed: Mapping[str, str]) -> Finding:
    version, wanted = installed.get(_plain(requirement.name)), _wanted(requirement)
    if version is None:
        return Finding(requirement.name, "missing", f"pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version, f"pip install '{wanted}'")
    return Finding(requirement.name, version)


def _extra(
    extra: str, requirements: Sequence[Requirement], installed: Mapping[str, str]
) -> Finding:
    """Whether all of an extra is there; missing is no trouble, of another version it is."""
    of_it = _of_extra(extra, requirements)
    for requirement in of_it.copy():  # such as jax[tpu]
        if requirement.extras and _plain(requirement.name) in installed:
            lines = [Requirement(x) for x in importlib.metadata.requires(requirement.name) or ()]
            for inner in requirement.extras:
                of_it += _of_extra(inner, lines)
    found = [_package(r, installed) for r in of_it]
    missing = [f.what for f in found if f.found == "missing"]
    wrong = [f for f in found if f.trouble and f.what not in missing]
    says = "there" if not missing else f"not there: pip install '{DISTRIBUTION}[{extra}]'"
    if 0 < len(missing) < len(of_it):
        says += f" (lacks {', '.join(missing)})"
    return Finding(
        f"extra {extra}", says, "; ".join(f"{f.what} {f.found}: {f.trouble}" for f in wrong)
    )


def _of_extra(extra: str, requirements: Iterable[Requirement]) -> list[Requirement]:
    return [
        r
        for r in requirements
        if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def _wanted(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def devices() -> Iterator[Finding]:
    """What JAX computes on, and whether a device is there that it does not use."""
    try:
        local = parallel.local_devices()
    except UserError as error:
        yield Finding("devices", "none", str(error))
        return
    kinds = [d.device_kind for d in local]
    found = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
    trouble = chips.compiler_fault(local[0])
    for platform_name, (files, extra) in _DRIVERS.items():
        if local[0].platform == "cpu" and any(pathlib.Path(f).exists() for f in files):
            chosen = os.environ.get("JAX_PLATFORMS")
            why = f"JAX_PLATFORMS is {chosen}" if chosen else f"pip install {extra}"
            trouble = f"this machine has a {platform_name.upper()}, and JAX does not use it: {why}"
    yield Finding("devices", found, trouble)
    stats = local[0].memory_stats() or {}
    if "bytes_limit" in stats:
        yield Finding("memory of a device", _gigabytes(stats["bytes_limit"]))


def memory() -> Iterator[Finding]:
    """Cores and memory of the machine, and what processes share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores, memory", f"{cores}, {_gigabytes(machine.memory())}")
    shared = pathlib.Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        trouble = (
            "the workers of the input pipeline hand images over in it: give a container more "
            "(docker run --shm-size=8g), or train with --config.data.workers=0"
        )
        yield Finding(
            "shared memory", f"{_gigabytes(free)} free", trouble if free < _SHARED_MEMORY else ""
        )


def disks(workdir: pathlib.Path) -> Iterator[Finding]:
    """Free space of the workdir's disk and of that of temporary files."""
    there = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    temporary = pathlib.Path(tempfile.gettempdir())
    for what, path in (("disk of the workdir", there), ("disk of temporary files", temporary)):
        free = shutil.disk_usage(path).free
        trouble = f"checkpoints and data sets need more: make room in {path}, or use another"
        yield Finding(what, f"{_gigabytes(free)} free ({path})", trouble if free < _DISK else "")
    if not os.access(there, os.W_OK):
        yield Finding("workdir", str(workdir), f"{there} cannot be written to")


def _gigabytes(count: float) -> str:
    return f"{count / _GB:.1f} GB"


def report(workdir: pathlib.Path = pathlib.Path()) -> bool:
    """Prints what `examine` finds; returns whether nothing is wrong."""
    findings = examine(workdir)
    width = max(len(f.what) for f in findings)
    for f in findings:
        print(f"{f.what:{width}}  {f.found}{'   WRONG, see below' if f.trouble else ''}")
    wrong = [f for f in findings if f.trouble]
    for f in wrong:
        print(f"WRONG: {f.what} ({f.found}): {f.trouble}")
    print("nothing is wrong" if not wrong else f"{len(wrong)} wrong")
    return not wrong
