"""The one place where torchvision is imported."""

import importlib
import types
from typing import Any

from dilaff_jax.errors import MissingPackageError

_OPERATORS = ("qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
# Declarations last as long as the library that made them.
_LIBRARIES: list[Any] = []


def torchvision() -> types.ModuleType:
    """Returns torchvision, also where its C++ part does not fit the torch at hand.

    That part holds box operators which no segmentation model uses, but torchvision registers
    their meta kernels when it is imported and stops where they are not declared. So on that error,
    and only then, they are declared (a CPU build of torch beside torchvision from PyPI).

    Raises:
        ImportError: torch or torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise MissingPackageError(
            "this needs the extra: pip install 'dilaff-jax[torch]'"
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    _LIBRARIES.append(library)
