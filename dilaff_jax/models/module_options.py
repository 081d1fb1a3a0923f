"""Options from a config into the fields of a Flax module, checked against their annotations."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from dilaff_jax import schema
from dilaff_jax.errors import UserError

# What a field of this type may hold: a description, and a test.
_ALLOWED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer", lambda v: type(v) is int and v > 0),
    bool: ("True or False", lambda v: type(v) is bool),
    float: ("a number in [0, 1)", lambda v: isinstance(v, int | float) and 0 <= v < 1),
    tuple[int, ...]: (
        "positive integers",
        lambda v: isinstance(v, tuple) and all(type(x) is int and x > 0 for x in v),
    ),
    tuple[str, ...]: (
        "a tuple of names",
        lambda v: isinstance(v, tuple) and all(isinstance(x, str) for x in v),
    ),
    # One for each channel of images; `int | float` says that there may be none.
    tuple[float, ...]: (
        "one number for each channel of the images, three for RGB",
        lambda v: isinstance(v, tuple) and bool(v) and all(schema.is_number(x) for x in v),
    ),
    tuple[int | float, ...]: (
        "numbers",
        lambda v: isinstance(v, tuple) and all(schema.is_number(x) for x in v),
    ),
}


def make_module(
    make: Callable[..., nn.Module],
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    where: str,
) -> nn.Module:
    """Calls `make` with options from a config, and with what every module is given.

    Args:
        make: a Flax module class, or a functools.partial of one.
        given: field values, of which those are passed that the module has a field for.
        options: from the config; lists become tuples, since Flax modules must be hashable.
        where: the key of the config that holds the options, for messages.

    Raises:
        UserError: an option that is no field, or a value that the field does not allow.
    """
    known = fields(make)
    options = {k: _tuples(v) for k, v in options.items()}
    schema.check_keys(options, [f for f in known if f not in ("num_classes", "style")], where)
    for name, value in options.items():
        _check_value(name, value, known[name])
    return make(**{k: v for k, v in given.items() if k in known} | options)


def fields(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """The fields of a Flax module and their types.

    Raises:
        UserError: `make` is no module class, nor a functools.partial of one.
    """
    module: Any = make.func if isinstance(make, functools.partial) else make
    if not dataclasses.is_dataclass(module):
        raise UserError(f"{make!r} is no Flax module class, nor a functools.partial of one")
    return {f.name: f.type for f in dataclasses.fields(module) if f.name not in ("parent", "name")}


def _check_value(name: str, value: Any, annotation: Any) -> None:
    choices: Sequence[Any] = getattr(annotation, "__args__", ())
    if type(None) in choices:  # tuple[int, ...] | None
        if value is None:
            return
        annotation = choices[0]
    expected, test = _ALLOWED.get(annotation, ("", lambda v: True))
    if not test(value):
        raise UserError(f"{name} is {value!r}; expected {expected}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
