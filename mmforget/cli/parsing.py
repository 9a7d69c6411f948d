"""The full parser of the commands that build models, and its errors in one sentence.

jsonargparse reports a wrong key without the class that it belongs to, and a wrong value with the
whole list of types that it tried. `explain` looks the mistake up in what the user wrote.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, NoReturn, Union

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from mmforget.cli.catalogue import CATALOGUE
from mmforget.data.base import ForgetDataModule
from mmforget.errors import ConfigurationError, MMForgetError, suggest
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Model

CLASS_SECTIONS: dict[str, tuple[type, str]] = {
    "model": (Model, "model"),
    "data": (ForgetDataModule, "data module"),
    "method": (ForgettingMethod, "method"),
}
"""Sections that hold a class: its base, and what it is called."""


class ParsingFailed(Exception):
    """What jsonargparse said, before it is explained."""


class Parser(LightningArgumentParser):
    """LightningCLI's parser; raises instead of printing fifty lines, knows no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"allow_abbrev": False}))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `ParsingFailed`, or the error of a constructor that was behind it."""
        if isinstance(ex, MMForgetError):
            raise ex
        raise ParsingFailed(message) from ex


def import_known_classes() -> None:
    """Import everything of the catalogue, so that short class names can be found."""
    for kind in ("models", "data", "methods"):
        for entry in CATALOGUE[kind]:
            importlib.import_module(entry.target.partition(":")[0])


def explain(message: str, settings: Mapping[str, Any], plain: Mapping[str, type]) -> str:
    """Turn an error of jsonargparse into one sentence.

    Args:
        message: what jsonargparse said.
        settings: what the user wrote (`mmforget.cli.settings.read_settings`).
        plain: sections that are one known class or data class, such as ``trainer``.

    Returns:
        The mistake with the section it is in, and the nearest valid name or the expected type.
    """
    structural = next(_structural_mistakes(settings, plain), None)
    if structural:
        return structural
    return next(_value_mistakes(settings, plain), None) or _shorten(message)


def find_class(name: str, base: type) -> Any:
    """Resolve a short or dotted class name; a dotted one may also be a function that returns it.

    Returns:
        The class or function, or None if there is no such name.
    """
    if "." not in name:
        return next((cls for cls in _subclasses(base) if cls.__name__ == name), None)
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError:
        return None


def class_names(base: type) -> list[str]:
    """Short names of all imported, instantiable subclasses."""
    return sorted({cls.__name__ for cls in _subclasses(base) if not _is_abstract(cls)})


def _is_abstract(cls: type) -> bool:
    """Whether a method is left open; `inspect.isabstract` knows only classes of ABCMeta."""
    return any(
        getattr(inspect.getattr_static(cls, name), "__isabstractmethod__", False)
        for name in dir(cls)
    )


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _structural_mistakes(settings: Mapping[str, Any], plain: Mapping[str, type]) -> Iterator[str]:
    for section, (base, noun) in CLASS_SECTIONS.items():
        given = settings.get(section)
        name = given.get("class_path") if isinstance(given, dict) else given
        if not isinstance(name, str):
            continue
        if find_class(name, base) is None:
            if section == "model" and not isinstance(given, dict):
                continue  # a folder or a hub id, whose own loader explains what is wrong
            yield f"there is no {noun} '{name}'; {suggest(name, class_names(base))}"
    for section, target, given in _sections(settings, plain):
        name = f"`{section}`" if section in plain else target.__name__
        yield from _wrong_keys(section, name, target, given)


def _options_of(given: Any) -> dict[str, Any]:
    """Options of a class, given under ``init_args`` or directly below the section."""
    if not isinstance(given, dict):
        return {}
    inner = given.get("init_args") or {}
    direct = {k: v for k, v in given.items() if k not in ("class_path", "init_args", "help")}
    return {**inner, **direct}


def _wrong_keys(section: str, name: str, target: Any, given: Mapping[str, Any]) -> Iterator[str]:
    parameters = _parameters(target, skip={"model"} if section == "method" else set())
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in given:
        if key not in parameters and key != "dict_kwargs":
            yield f"{name} has no option '{key}'; {suggest(key, parameters)}"
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in given:
            yield f"{name} needs `{key}`; give it as `--{section}.{key}`"


def _parameters(target: Any, skip: set[str]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(target).parameters
    return {name: parameter for name, parameter in found.items() if name not in skip}


def _value_mistakes(settings: Mapping[str, Any], plain: Mapping[str, type]) -> Iterator[str]:
    """Check every given value against the annotation of the option that it was meant for."""
    for section, target, given in _sections(settings, plain):
        hints = _hints(target)
        for option, value in given.items():
            if option not in hints or _accepts(hints[option], value):
                continue
            shown = f"`{section}.{option}` is '{value}'"
            choices = _choices(hints[option])
            if choices:
                yield f"{shown}; {suggest(value, choices)}"
            else:
                yield f"{shown}; expected {_describe(hints[option])}"


def _sections(
    settings: Mapping[str, Any], plain: Mapping[str, type]
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each section with the class or function it is for, and the options that were given."""
    for section, (base, _) in CLASS_SECTIONS.items():
        given = settings.get(section)
        name = given.get("class_path") if isinstance(given, dict) else given
        target = find_class(name, base) if isinstance(name, str) else None
        if target is not None:
            yield section, target, _options_of(given)
    for section, cls in plain.items():
        if isinstance(settings.get(section), dict):
            yield section, cls, settings[section]


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether jsonargparse takes the value, as YAML reads it or as plain text."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    for attempt in (value, str(value)):
        try:
            parser.parse_object({"value": attempt})
        except ArgumentError:
            continue
        return True
    return False


def _hints(target: Any) -> dict[str, Any]:
    if is_dataclass(target):
        return typing.get_type_hints(target)
    constructor = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    function = inspect.unwrap(constructor)
    # a module may import the names of its annotations for type checkers only
    usual = {**vars(typing), **vars(collections.abc), **function.__globals__}
    return typing.get_type_hints(function, usual)


def _choices(annotation: Any) -> list[str]:
    """All values of an annotation made of literals only; empty for any other."""
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        parts = [_choices(part) for part in typing.get_args(annotation) if part is not type(None)]
        return list(dict.fromkeys(name for part in parts for name in part)) if all(parts) else []
    return []


_PLAIN_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def _describe(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN_NAMES:
        return _PLAIN_NAMES[annotation]
    if origin is Literal:
        return " or ".join(f"'{part}'" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin in (list, tuple) or getattr(origin, "__name__", "") in ("Sequence", "Iterable"):
        inner = [_describe(part).removeprefix("a ") for part in parts if part is not ...]
        return f"a list of {' / '.join(inner)}" if inner else "a list"
    if origin is dict or getattr(origin, "__name__", "") == "Mapping":
        return "a mapping"
    return f"a {getattr(annotation, '__name__', annotation)}"


def _shorten(message: str) -> str:
    """The first informative lines of an error that nobody could explain better."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    text = "; ".join(lines[:3]).replace(":;", ":")
    return text if len(text) <= 300 else text[:297] + "..."


def explained(
    action: Callable[[], Any], settings: Mapping[str, Any], plain: Mapping[str, type]
) -> Any:
    """Run something that parses or instantiates, and explain what jsonargparse complains about.

    Raises:
        ConfigurationError: the settings are not valid.
        MMForgetError: a constructor has refused its arguments.
    """
    try:
        return action()
    except ParsingFailed as failure:
        raise ConfigurationError(explain(str(failure), settings, plain)) from failure
    except (TypeError, ValueError) as error:
        # jsonargparse wraps what a constructor raises when a section has several types
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MMForgetError):
            cause = cause.__cause__
        if cause is None or cause is error:
            raise
        raise cause from error
