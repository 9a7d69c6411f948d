"""Errors that mmforget raises for its users, each with one sentence that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MMForgetError(Exception):
    """Base of all errors that a user can cause and mend. The command line exits with code 2."""


class RequestError(MMForgetError, ValueError):
    """A forget request that cannot be carried out on the given data."""


class DataError(MMForgetError, ValueError):
    """Data that is missing, malformed or does not fit the request."""


class AccessError(MMForgetError, PermissionError):
    """A method reads data that it did not declare in its `access`."""


class CapabilityError(MMForgetError, TypeError):
    """A method needs something that the model does not offer."""


class ModelError(MMForgetError, ValueError):
    """A model that cannot be built from what was given."""


class WeightsError(MMForgetError, ValueError):
    """Weights that are corrupted, do not fit the model, or would execute code when loaded."""


class ConfigurationError(MMForgetError, ValueError):
    """A setting that has no meaning or contradicts another one."""


class MissingFileError(MMForgetError, FileNotFoundError):
    """A file or folder that does not exist."""


class RunExistsError(MMForgetError, FileExistsError):
    """A run folder that is already taken."""


class StorageError(MMForgetError, OSError):
    """A result that could not be written; earlier files are intact."""


class NoOpError(MMForgetError, RuntimeError):
    """A method that would leave, or has left, every parameter of the model as it was."""


class DivergenceError(MMForgetError, ArithmeticError):
    """A loss or parameter that is not finite."""


def suggest(given: object, choices: Iterable[object]) -> str:
    """Describe the valid choices for a wrong name, the nearest one first.

    Args:
        given: what the user wrote.
        choices: everything that would have been accepted.

    Returns:
        A clause such as ``did you mean 'seven'?`` or ``valid are: 'a', 'b'`` (at most ten names).
    """
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(f"'{name}'" for name in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"valid are: {shown}{more}"
