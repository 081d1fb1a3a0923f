"""Semantic segmentation with dilated affinity, in JAX.

    model = dilaff_jax.load("workdirs/camvid")  # or an exported file
    result = model("street.jpg")  # a list of images gives a list of results
    result.labels, result.probs, result.affinity, result.overlay()

Import the modules themselves for the rest (`from dilaff_jax import affinity, propagate`): the
package pulls in nothing on its own, so that a notebook that only refines logits does not pay for
the trainer.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilaff_jax.errors import UserError
    from dilaff_jax.serving.predictor import Predictor, Result, load
    from dilaff_jax.serving.refine import refine

__all__ = ["Predictor", "Result", "UserError", "__version__", "load", "refine"]

_HOME = {
    "Predictor": "serving.predictor",
    "Result": "serving.predictor",
    "UserError": "errors",
    "load": "serving.predictor",
    "refine": "serving.refine",
}


def __getattr__(name: str) -> Any:
    """Imports what a public name needs when it is first used."""
    import importlib

    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("dilaff-jax")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
