"""From the name of a method to its class, and a check of its settings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmforget.errors import ConfigurationError, suggest


def target_of(
    name: str, methods: Mapping[str, str], why: str = "", others: Sequence[str] = ()
) -> str:
    """``module:class`` of a method name; imports nothing.

    Args:
        name: short name, class name, or dotted path.
        methods: short names and their ``module:class``.
        why: what an unknown name is told, after it.
        others: further names that the message offers.

    Raises:
        ConfigurationError: no such method; names the nearest.
    """
    classes = {target.partition(":")[2]: target for target in methods.values()}
    if name in methods:
        return methods[name]
    if name in classes:
        return classes[name]
    module, dot, attribute = name.rpartition(".")
    if not dot:
        choices = [*others, *methods, *classes]
        raise ConfigurationError(f"`method` is '{name}'{why}; {suggest(name, choices)}")
    return f"{module}:{attribute}"


def class_of(
    method: Any,
    methods: Mapping[str, str],
    target: Callable[[str], str],
    fits: Callable[[type], bool],
    why: str,
) -> Any:
    """Resolve a name or a class.

    Args:
        method: what `target_of` reads, or a class.
        methods: see `target_of`.
        target: `target_of` with everything else filled in.
        fits: whether a class may be used.
        why: what a class is told that may not.

    Raises:
        ConfigurationError: there is no such method, or it does not fit.
    """
    found = method
    if isinstance(method, str):
        place = target(method)
        module, _, name = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError) as error:
            if place in methods.values():
                raise
            raise ConfigurationError(
                f"there is no class '{method}'; give module.Class, or one of "
                + ", ".join(f"'{name}'" for name in methods)
            ) from error
    if not (isinstance(found, type) and fits(found)):
        raise ConfigurationError(
            f"`method` is {getattr(found, '__name__', found)}, {why}; {suggest(method, methods)}"
        )
    return found


def check_settings(
    method: type, settings: Mapping[str, Any], arguments: Sequence[str] = ()
) -> None:
    """Refuse settings that a method does not have.

    Args:
        method: the class.
        settings: by name.
        arguments: of the constructor that are no settings.

    Raises:
        ConfigurationError: names the nearest one.
    """
    known = [name for name in inspect.signature(method).parameters if name not in arguments]
    for name in settings:
        if name not in known:
            raise ConfigurationError(
                f"{method.__name__} has no setting '{name}'; {suggest(name, known)}"
            )
