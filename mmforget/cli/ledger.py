"""`mmforget ledger`: what was asked and done, and whether the files still match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmforget.artifacts.ledger import Ledger
from mmforget.cli.settings import Options
from mmforget.errors import ConfigurationError, MissingFileError, suggest

HELP = """
usage: mmforget ledger show|verify [FILE] [--root FOLDER]

`show` prints the entries: when, what was asked, with which method, where the result is.
`verify` checks that no entry was changed, removed or inserted, and that the files of every
artifact still have their hashes. Problems are listed one per line, and the exit code is 1.

options:
  FILE            the ledger (default: runs/ledger.jsonl)
  --root FOLDER   the folder that the paths in the ledger start from (default: that of FILE)

examples:
  mmforget ledger show
  mmforget ledger verify
  mmforget ledger verify archive/ledger.jsonl --root archive
"""

ACTIONS = ("show", "verify")


def run(args: list[str]) -> int:
    """Show or verify a ledger.

    Raises:
        ConfigurationError: neither ``show`` nor ``verify``.
        MissingFileError: there is no such ledger.
    """
    parser = Options("ledger")
    parser.add_argument("action", metavar="show|verify")
    parser.add_argument("file", nargs="?", default="runs/ledger.jsonl", metavar="FILE")
    parser.add_argument("--root", metavar="FOLDER")
    given = parser.parse_args(args)
    if given.action not in ACTIONS:
        raise ConfigurationError(
            f"`mmforget ledger` cannot '{given.action}'; {suggest(given.action, ACTIONS)}"
        )
    path = Path(given.file)
    if not path.is_file():
        raise MissingFileError(
            f"there is no ledger '{path}'; give its path, `mmforget forget` names it at its end"
        )
    ledger = Ledger(path)
    if given.action == "show":
        for entry in ledger.entries():
            print(_line(entry))
        return 0
    root = Path(given.root) if given.root else path.parent
    problems = ledger.verify(root)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"'{path}' is intact: {len(ledger.entries())} entries, all files match")
    return 1 if problems else 0


def _line(entry: dict[str, Any]) -> str:
    shown = ("index", "time", "hash", "previous", "manifest")
    facts = ", ".join(f"{key}: {_short(value)}" for key, value in entry.items() if key not in shown)
    return f"{entry['index']:>4}  {entry['time']}  {entry['hash'][:12]}  {facts}"


def _short(value: Any) -> str:
    """A value on one line: hashes cut, requests by name, so that no sample is listed."""
    if isinstance(value, list):
        return " + ".join(str(v.get("name", v)) if isinstance(v, dict) else str(v) for v in value)
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
