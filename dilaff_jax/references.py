"""Objects outside this package that a config names as "module:attribute"."""

import importlib.util
import pkgutil
from typing import Any

from dilaff_jax.errors import UserError


def resolve(reference: str, where: str, otherwise: str = "put its folder on PYTHONPATH") -> Any:
    """Returns what "module:attribute" names; the attribute may have dots.

    Args:
        reference: such as "my_package.my_module:MyEncoder".
        where: the key of the config that holds it, for messages.
        otherwise: what else could be done about a module that does not exist.

    Raises:
        UserError: there is no such module or attribute. What the module itself raises while it is
            imported is not caught.
    """
    module, separator, attribute = reference.partition(":")
    if not separator or not module or not attribute:
        raise UserError(f"{where} is {reference!r}; expected 'module:attribute'")
    if not _exists(module):
        raise UserError(
            f"{where} names {reference!r}, but there is no module {module!r}: pip install it, or "
            f"{otherwise}"
        )
    try:
        return pkgutil.resolve_name(reference)
    except AttributeError as e:
        raise UserError(f"{where} names {reference!r}, but {e}") from e


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent that is missing, or no name at all
        return False
