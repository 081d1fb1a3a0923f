"""Semantic segmentation with dilated affinity, in JAX.

    model = dilaff_jax.load("workdirs/camvid")  # or an exported file
    result = model("street.jpg")
    result.labels, result.probs, result.affinity, result.overlay()

Import the modules themselves for the rest (`from dilaff_jax import affinity, propagate`): the
package pulls in nothing on its own, so that a notebook that only refines logits does not pay for
the trainer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilaff_jax.interchange import refine as refine
    from dilaff_jax.predictor import load as load

__version__ = "0.1.0"

_FOUND_IN = {"load": "predictor", "refine": "interchange"}


def __getattr__(name: str) -> Any:
    """Imports what `load` and `refine` need when they are first used."""
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_FOUND_IN[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FOUND_IN])
