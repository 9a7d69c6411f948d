"""`mmforget list`: what there is, without importing any of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmforget.cli.catalogue import CATALOGUE, METHODS, MODELS, Entry, fits
from mmforget.errors import ConfigurationError, MissingFileError, suggest

HELP = """
usage: mmforget list models|data|methods|metrics|attacks|detectors|mitigations|retention|configs

Shows what there is. The names are the short class names of configurations and of the command
line; classes of your own are given by their dotted path instead and need no registration.
For methods, the list says what each one reads and which model families it works with.

examples:
  mmforget list methods
  mmforget list configs
  mmforget list attacks
"""


def run(args: list[str]) -> int:
    """Print one list.

    Raises:
        ConfigurationError: there is no such list.
        MissingFileError: the configurations are not installed.
    """
    kinds = [*CATALOGUE, "configs"]
    if len(args) != 1 or args[0] not in kinds:
        given = " ".join(args)
        problem = f"there is no list '{given}'" if args else "`mmforget list` needs to know of what"
        raise ConfigurationError(f"{problem}; {suggest(given, kinds)}")
    if args[0] == "configs":
        rows = _configs()
    elif args[0] == "methods":
        rows = [("method", "what it does", "reads", *(m.name for m in MODELS), "paper")]
        for method in METHODS:
            marks = ("yes" if fits(method, model) else "no" for model in MODELS)
            rows.append((method.name, method.summary, _reads(method), *marks, method.paper))
    elif args[0] == "models":
        rows = [(e.name, e.summary, "offers " + ", ".join(e.capabilities)) for e in MODELS]
    else:
        rows = [(e.name, e.summary, e.paper) for e in CATALOGUE[args[0]]]
    print(_table(rows))
    return 0


def _reads(method: Entry) -> str:
    return {"none": "no retain data", "statistics": "retain, one pass"}.get(
        method.reads, f"retain, {method.reads}"
    )


def configs_folder() -> Path:
    """Where the configurations are: inside an installed package, or beside it in the repository.

    Raises:
        MissingFileError: they are in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise MissingFileError(f"there is no folder '{package.parent / 'configs'}'; reinstall mmforget")


def _configs() -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for path in sorted(configs_folder().rglob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            rows.append((_shown(path), file.readline().strip("# \n")))
    return rows


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
