"""Checks that the settings of all audits of generators share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmforget.errors import ConfigurationError, suggest


def check_limits(
    settings: Any,
    least: Mapping[str, int],
    shares: Iterable[str],
    choices: Mapping[str, Iterable[str]],
) -> None:
    """Refuse settings without meaning, and turn lists of names into tuples.

    Args:
        settings: a frozen dataclass, in its ``__post_init__``.
        least: smallest value per field; None as a value stands for a default.
        shares: fields that must lie in [0, 1].
        choices: valid names per field that holds several.

    Raises:
        ConfigurationError: names the field, its value and what is valid.
    """
    for name, minimum in least.items():
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise ConfigurationError(f"`audit.{name}` is {value}, it must be at least {minimum}")
    for name in shares:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise ConfigurationError(f"`audit.{name}` is {value}, it must lie in [0, 1]")
    for name, known in choices.items():
        values = tuple(getattr(settings, name))
        object.__setattr__(settings, name, values)
        for value in values:
            if value not in known:
                raise ConfigurationError(f"`audit.{name}` has '{value}'; {suggest(value, known)}")
