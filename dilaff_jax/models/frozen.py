"""Parameters that do not change in training, and the network that runs around them."""

import contextlib
import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from dilaff_jax.errors import UserError
from dilaff_jax.models import layers

Path: TypeAlias = tuple[str, ...]


class Frozen:
    """Which parameters of a network keep the values that they begin with.

    A pattern is that of a parameter's name, or of a module's: "encoder" is all that is in the
    encoder, "encoder/block_?" ten of its blocks, "*/norm" the scale and bias of every norm.

    A module of which every parameter is frozen runs as in evaluation, whole: BatchNorm takes its
    running statistics and leaves them as they are, nothing is dropped out. So does a BatchNorm of
    `layers.ConvNorm` that is frozen by itself.

    Args:
        params: of the network; values or shapes.
        patterns: of names; () for none.

    Raises:
        UserError: a pattern fits nothing, or nothing is left to be trained.
    """

    def __init__(self, params: Mapping[str, Any], patterns: Sequence[str]) -> None:
        paths = list(flatten_dict(dict(params))) if patterns else []
        for pattern in patterns:
            if not any(_fits(path, (pattern,)) for path in paths):
                examples = ", ".join(sorted({path[0] for path in paths}))
                raise UserError(
                    f"optim.frozen has the pattern {pattern!r}, which fits no parameter; the model "
                    f"has {examples}, and below them such as {'/'.join(paths[0])}"
                )
        self._paths = {path for path in paths if _fits(path, patterns)}
        if paths and len(self._paths) == len(paths):
            raise UserError(
                f"optim.frozen is {tuple(patterns)}, which is all parameters of the model; leave "
                "one out, or give the model a part to train, such as model.affinity"
            )
        learning = {path[:n] for path in paths if path not in self._paths for n in range(len(path))}
        self._modules = {path[:n] for path in self._paths for n in range(len(path))} - learning

    def split(self, variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns {params, batch_stats} without what is frozen, and what is frozen of them."""
        flat = {k: flatten_dict(dict(tree)) for k, tree in variables.items()}
        fixed = {k: {p: v for p, v in tree.items() if self._keeps(p)} for k, tree in flat.items()}
        rest = {k: {p: v for p, v in flat[k].items() if p not in fixed[k]} for k in flat}
        return _nested(rest), _nested(fixed)

    @contextlib.contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Within it, modules whose parameters are frozen are called with `train=False`."""

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "__call__" and self._evaluates(context.module):
                signature = inspect.signature(type(context.module).__call__)
                if "train" in signature.parameters:
                    bound = signature.bind(context.module, *args, **kwargs)
                    bound.arguments["train"] = False
                    args, kwargs = bound.args[1:], bound.kwargs
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept) if self._paths else contextlib.nullcontext():
            yield

    def _evaluates(self, module: nn.Module) -> bool:
        norm = isinstance(module, layers.ConvNorm) and (*module.path, "norm") in self._modules
        return norm or module.path in self._modules

    def _keeps(self, path: Path) -> bool:
        # A statistic lies in the module whose parameters say whether it changes.
        return path in self._paths or path[:-1] in self._modules


def _nested(flat: Mapping[str, Mapping[Path, Any]]) -> dict[str, Any]:
    return {k: unflatten_dict(dict(tree)) for k, tree in flat.items()}


def _fits(path: Path, patterns: Sequence[str]) -> bool:
    """Whether a pattern is that of the parameter, or of a module that it is in."""
    names = ["/".join(path[:n]) for n in range(1, len(path) + 1)]
    return any(fnmatch.fnmatchcase(name, p) for p in patterns for name in names)
