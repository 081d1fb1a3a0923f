"""Errors that tell a person what to change: the command prints them in one line.

Everything else that is raised is a fault of the program and keeps its traceback.
"""


class UserError(ValueError):
    """A config, data, a key, a file or an argument that cannot be used.

    The message says what was found, what is allowed and what to change. A `ValueError`, so that
    code that calls the functions of this package may catch it as one.
    """


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class NotFiniteError(UserError, FloatingPointError):
    """A training step gave NaN or infinity; the state before it is kept."""
