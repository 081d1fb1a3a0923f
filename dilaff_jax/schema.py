"""The keys of a config: default, rule and meaning of each, in one table beside what uses it.

A section is such a table. From it come the defaults (`defaults`), the check of a config (`check`)
and the tables of docs/configs.md (docs/config_tables.py).
"""

import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import ml_collections

from dilaff_jax.errors import UserError


class Rule(NamedTuple):
    """What a value must be: in words, after "expected", and as a test."""

    wanted: str
    fits: Callable[[Any], bool]


class Unset(NamedTuple):
    """The default of a key that is None until it is given a value of this type."""

    kind: type


class Key(NamedTuple):
    """One key. meaning: a sentence or two, Markdown."""

    default: Any
    rule: Rule
    meaning: str


Section: TypeAlias = Mapping[str, Key]


def is_number(value: Any) -> bool:
    """Whether it is finite and real."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def is_whole(value: Any, low: int) -> bool:
    """Whether it is an integer, at least `low`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and int(value) >= low


def is_sequence(value: Any, length: int | None = None) -> bool:
    """Whether it is a tuple or list, of this length."""
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    return fits and (length is None or len(value) == length)


def is_name(value: Any) -> bool:
    """Whether it is a text that is not empty."""
    return isinstance(value, str) and bool(value)


def is_size(value: Any) -> bool:
    """Whether it is (height, width), or the three sides of a volume."""
    return is_sequence(value) and len(value) in (2, 3) and all(is_whole(n, 1) for n in value)


def is_mapping(value: Any) -> bool:
    """Whether it is a dict of options."""
    return isinstance(value, Mapping | ml_collections.ConfigDict)


def choice(*values: str | int) -> Rule:
    """The rule of a key that takes one of a few values."""
    return Rule(f"one of {', '.join(map(repr, values))}", lambda v: v in values)


def at_least(low: int, wanted: str = "") -> Rule:
    """The rule of an integer."""
    return Rule(wanted or f"{low} or more, a whole number", lambda v: is_whole(v, low))


def or_none(rule: Rule) -> Rule:
    """The rule of a key that may be None."""
    return Rule(f"{rule.wanted} or None", lambda v: v is None or rule.fits(v))


COUNT = at_least(1, "a whole number above 0")
WHOLE = at_least(0, "a whole number, 0 or more")
ABOVE_0 = Rule("a number above 0", lambda v: is_number(v) and v > 0)
FROM_0 = Rule("0 or more", lambda v: is_number(v) and v >= 0)
SHARE = Rule("a number from 0 to below 1", lambda v: is_number(v) and 0 <= v < 1)
UP_TO_1 = Rule("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
SWITCH = Rule("True or False", lambda v: isinstance(v, bool))
TEXT = Rule("a text, '' for none", lambda v: isinstance(v, str))
NAME = Rule("a name", is_name)
OPTIONS = Rule("a dict of options", is_mapping)
WEIGHTS = Rule(
    "a tuple of numbers, 0 or more, one for each class; () for none",
    lambda v: is_sequence(v) and all(is_number(x) and x >= 0 for x in v),
)
PATTERNS = Rule(
    "a tuple of patterns, such as ('fc.*',)",
    lambda v: is_sequence(v) and all(isinstance(x, str) for x in v),
)


def defaults(section: Section) -> ml_collections.ConfigDict:
    """A config with every key of a section at its default."""

    def fresh(value: Any) -> Any:
        # One for each config: what is set in one would be set in all that share it.
        unset = isinstance(value, Unset)
        return ml_collections.config_dict.placeholder(value.kind) if unset else value

    return ml_collections.ConfigDict({name: fresh(key.default) for name, key in section.items()})


def check(config: Mapping[str, Any], section: Section, where: str) -> None:
    """Checks keys and values of a part of a config.

    Raises:
        UserError: a key that is missing or unknown, or a value that its rule does not allow; the
            message names the key, what was found and what is expected.
    """
    check_keys(config, list(section), where)
    for name, key in section.items():
        if name not in config:
            raise UserError(f"{where} lacks {name!r}; start from configs/default.py")
        try:
            fits = key.rule.fits(config[name])
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"{where}.{name} is {config[name]!r}; expected {key.rule.wanted}")


def check_keys(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    """Raises UserError for a key that is not allowed, with the nearest that is."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{where} has no key {key!r}{hint}; allowed: {', '.join(allowed)}")
