"""What the user wrote, read without torch: the cheap part of the checks, before anything heavy.

Importing torch and Lightning takes ten seconds and more on a small machine. A misspelt section, a
missing file or broken YAML is found here in milliseconds; values are left to the real parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmforget.cli.catalogue import CATALOGUE
from mmforget.errors import ConfigurationError, MissingFileError, suggest
from mmforget.request import ForgetRequest

EVALUATION_KEYS = ("model", "data", "request", "trainer", "seed_everything")
ALWAYS = ("print_config", "help-all")


class Options(argparse.ArgumentParser):
    """Argument parser of the commands without configuration file; its errors are one sentence."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"mmforget {command}", add_help=False, allow_abbrev=False)

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse `args`.

        Raises:
            ConfigurationError: an unknown option, a missing or superfluous argument.
        """
        known, unknown = self.parse_known_args(args)
        if unknown:
            if unknown[0].startswith("-"):
                name = unknown[0].partition("=")[0]
                hint = suggest(name, [key for key in self._option_string_actions if key])
                raise ConfigurationError(f"`{self.prog}` has no option '{name}'; {hint}")
            raise ConfigurationError(
                f"`{self.prog}` does not expect '{unknown[0]}'; see `{self.prog} --help`"
            )
        return known

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        raise ConfigurationError(f"{message}; see `{self.prog} --help`")


def read_settings(
    command: str,
    args: Sequence[str],
    keys: Collection[str],
    flags: Collection[str] = (),
    lists: Collection[str] = (),
    positional: str | None = None,
) -> dict[str, Any]:
    """Read configuration files and command line into one nested mapping.

    The values are as YAML reads them; nothing is converted or completed.

    Args:
        command: name of the command, for messages.
        args: the arguments after the command.
        keys: the valid top-level keys.
        flags: keys that take no value.
        lists: keys that take several values.
        positional: key of the arguments without option, None if there are none.

    Raises:
        ConfigurationError: an unknown key, a missing value, YAML that cannot be read.
        MissingFileError: a configuration file that does not exist.
    """
    import yaml

    settings: dict[str, Any] = {}
    rest = list(args)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            if positional is None:
                raise ConfigurationError(
                    f"`mmforget {command}` does not expect '{token}'; options begin with `--`, "
                    "a configuration file is given with `-c FILE`"
                )
            settings.setdefault(positional, []).append(token)
            continue
        name, equals, value = token.partition("=")
        path = "config" if name == "-c" else name[2:].removesuffix("+")
        _check_key(command, name, path.split(".")[0], keys)
        if path in lists:
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            settings[path] = values
            continue
        if path in flags or path.split(".")[-1] == "help" or path in ALWAYS:
            settings[path] = True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigurationError(f"`{name}` needs a value")
            value = rest.pop(0)
        if path == "config":
            _merge(settings, _read_file(command, value, keys))
            continue
        section, _, option = path.partition(".")
        if option and isinstance(settings.get(section), list):
            raise ConfigurationError(
                f"`{section}` is a list in the file, so `{name}` fits no single element; give the "
                f"whole list, such as `--request '[{{classes: [7]}}]'`"
            )
        try:
            loaded = yaml.safe_load(value)
        except yaml.YAMLError:
            loaded = value
        _merge(settings, _nest(path.split("."), loaded))
    return settings


def checked_settings(
    command: str,
    args: Sequence[str],
    keys: Collection[str],
    flags: Collection[str] = (),
    required: Sequence[str] = ("model", "data"),
    lists: Collection[str] = (),
    positional: str | None = None,
) -> dict[str, Any]:
    """Read the settings of a command that builds a model, and check all that is cheap to check.

    Raises:
        MMForgetError: see `read_settings`, `check_names`, `require` and `requests_from`.
    """
    settings = read_settings(command, args, keys, flags, lists, positional)
    check_names(settings)
    seed = settings.get("seed_everything", 0)
    if not isinstance(seed, int):
        raise ConfigurationError(f"`seed_everything` is '{seed}'; give a whole number")
    if not shows_options(settings):
        require(command, settings, required)
        if settings.get("request") is not None:
            requests_from(settings["request"])
    return settings


def shows_options(settings: Mapping[str, Any]) -> bool:
    """Whether the user only wants to see options, so that nothing is required and nothing runs."""
    return any(key in settings for key in ALWAYS)


def check_names(settings: Mapping[str, Any]) -> None:
    """Refuse short class names that are not in the catalogue.

    Raises:
        ConfigurationError: no such class; classes that are not ours are named with their module.
    """
    for section, kind in (("model", "models"), ("data", "data"), ("method", "methods")):
        given = settings.get(section)
        name = given.get("class_path") if isinstance(given, dict) else given
        if given is not None and not isinstance(name, str):
            raise ConfigurationError(
                f"`{section}` needs a class, such as `--{section} {CATALOGUE[kind][0].name}`; "
                f"see `mmforget list {kind}`"
            )
        if not isinstance(name, str) or not name.isidentifier():
            continue  # dotted names, folders and hub ids are looked up when they are needed
        names = [entry.name for entry in CATALOGUE[kind]]
        if name not in names and not (section == "model" and Path(name).exists()):
            raise ConfigurationError(
                f"there is no {kind.removesuffix('s')} '{name}'; {suggest(name, names)} "
                "(a class of yours is given as module.Class)"
            )


def require(command: str, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Refuse settings that lack a section.

    Raises:
        ConfigurationError: names what is missing.
    """
    missing = [key for key in keys if settings.get(key) is None]
    if missing:
        raise ConfigurationError(
            f"`mmforget {command}` needs {' and '.join(_option(key) for key in missing)}, or a "
            f"file with them (`-c FILE`); see `mmforget {command} --help`"
        )


def _option(key: str) -> str:
    return {"request": "`--request.classes`", "models": "`MODEL...`"}.get(key, f"`--{key}`")


def requests_from(given: Any) -> list[ForgetRequest]:
    """Make requests of what stands under `request`: one mapping, or a list of them.

    Raises:
        ConfigurationError: neither a mapping nor a list of mappings.
        RequestError: the mapping is no valid request.
    """
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ConfigurationError(
            f"`request` is '{given}'; write `request: {{classes: [3]}}`, or a list of such requests"
        )
    requests = []
    for item in given:
        if not isinstance(item, Mapping):
            raise ConfigurationError(
                f"`request` contains '{item}'; every request is a mapping like `{{classes: [3]}}`"
            )
        for field in ("classes", "samples"):
            value = item.get(field, ())
            if not isinstance(value, list | tuple):
                raise ConfigurationError(
                    f"`request.{field}` is '{value}'; give a list, such as `[{value}]`"
                )
        requests.append(ForgetRequest.from_dict(item))
    return requests


def _check_key(command: str, shown: str, key: str, keys: Collection[str]) -> None:
    if key in keys or key in ALWAYS or key == "config":
        return
    dashes = "--" if shown.startswith("-") else ""
    raise ConfigurationError(
        f"`mmforget {command}` has no option '{dashes}{key}'; "
        + suggest(f"{dashes}{key}", [f"{dashes}{name}" for name in (*keys, "config")])
    )


def _read_file(command: str, name: str, keys: Collection[str]) -> dict[str, Any]:
    import yaml

    path = Path(name)
    if not path.is_file():
        near = [str(found) for found in sorted(path.parent.glob("*.y*ml"))] if name else []
        hint = suggest(name, near) if near else "`mmforget list configs` shows those there are"
        raise MissingFileError(f"there is no configuration file '{name}'; {hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"'{name}' is not valid YAML: {_yaml_problem(error)}") from error
    if content is None:
        raise ConfigurationError(f"'{name}' is empty")
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"'{name}' holds a {type(content).__name__}; a configuration is a mapping with keys "
            "such as `model:` and `data:`"
        )
    for key in content:
        if str(key) not in keys:
            raise ConfigurationError(
                f"`mmforget {command}` has no section '{key}', found in '{name}'; "
                + suggest(key, keys)
            )
    return content


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{where}"


def _nest(path: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Lay `other` over `into`; a class given by its short name keeps the options given later."""
    for key, value in other.items():
        present = into.get(key)
        if isinstance(present, str) and isinstance(value, dict):
            present = into[key] = {"class_path": present}
        if isinstance(present, dict) and isinstance(value, dict):
            _merge(present, value)
        else:
            into[key] = value
