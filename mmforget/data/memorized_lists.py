"""Lists of memorized prompts, in the forms that they are published in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmforget.concept import normalised
from mmforget.data.memorized import MemoryKind
from mmforget.errors import DataError, MissingFileError, suggest

COLUMNS = {
    "prompt": ("caption", "prompt", "text"),
    "kind": ("type", "kind", "overfit_type"),
    "files": ("images", "image", "file", "file_name", "filename", "path"),
    "index": ("index",),
    "url": ("url",),
}
"""Names that columns go by, without case; the first that is there counts."""

KINDS: Mapping[str, MemoryKind | None] = {
    "": "unknown",
    "unknown": "unknown",
    "vm": "verbatim",
    "mv": "verbatim",
    "rv": "verbatim",
    "verbatim": "verbatim",
    "tm": "template",
    "tv": "template",
    "template": "template",
    "n": None,
}
"""Labels of public lists. ``N`` are prompts for which the authors found no copy: None, since they
are not memorized."""


@dataclass(frozen=True)
class ListedPrompt:
    """One row of a list.

    Attributes:
        number: of the row, from 0.
        prompt: the text.
        kind: None if the list says that it is not memorized.
        files: of its pictures, relative to some folder.
        index: of the sample in the training data.
        url: of its picture.
    """

    number: int
    prompt: str
    kind: MemoryKind | None = "unknown"
    files: tuple[str, ...] = ()
    index: str = ""
    url: str = ""

    @property
    def label(self) -> str:
        """What a picture that is missing is called."""
        return self.url or self.index or self.prompt


def listed_prompts(path: Path) -> list[ListedPrompt]:
    """Read a list.

    Args:
        path: ``.csv`` or ``.tsv`` with a head, ``.json`` with a list or with one under ``prompts``,
            ``.jsonl``, or ``.txt`` with a prompt per line.

    Raises:
        MissingFileError: there is no such file.
        DataError: an unknown form, a broken file, a row without a prompt or with an unknown kind,
            or no rows.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no list '{path}'; check the path")
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise DataError(f"'{path}' is no list of a known form; {suggest(ending, _READERS)}")
    try:
        entries = list(_READERS[ending](path))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read ({error}); save it as UTF-8 again") from error
    if not entries:
        raise DataError(f"'{path}' has no rows; check that it is the right list")
    return [listed_prompt(path, number, entry) for number, entry in enumerate(entries)]


def listed_prompt(path: Path, number: int, entry: Any) -> ListedPrompt:
    """Read one row.

    Args:
        path: of the list, for messages.
        number: of the row, from 0.
        entry: a text, or values by column.

    Raises:
        DataError: no prompt, or an unknown kind.
    """
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, Mapping):
        raise DataError(f"row {number} of '{path}' is {entry!r}; it must be a text or an object")
    fields = {str(key).strip().lower(): value for key, value in entry.items()}
    found = {
        what: next((fields[name] for name in names if name in fields), None)
        for what, names in COLUMNS.items()
    }
    prompt = found["prompt"]
    if not isinstance(prompt, str) or not normalised(prompt):
        raise DataError(
            f"row {number} of '{path}' has no prompt; give it in a column `prompt` or `caption`"
        )
    label = str(found["kind"] or "").strip().lower()
    if label not in KINDS:
        raise DataError(
            f"row {number} of '{path}' has the kind '{found['kind']}', {suggest(label, KINDS)}"
        )
    files = found["files"] or ()
    names = (files,) if isinstance(files, str) else tuple(str(file) for file in files)
    index = "" if found["index"] is None else str(found["index"]).strip()
    url = str(found["url"] or "").strip()
    return ListedPrompt(number, prompt, KINDS[label], names, index, url)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        # Prompts are full of commas, so that only the names in the head can tell the separator.
        near = [mark for mark in "\t;," if _names_prompt(next(csv.reader([head], delimiter=mark)))]
        if not near:
            raise DataError(
                f"the first line of '{path}' names no column of prompts; call it 'prompt' or "
                "'caption', and separate columns by tabs, semicolons or commas"
            )
        file.seek(0)
        reader = csv.DictReader(file, delimiter=near[0], strict=True)
        rows = []
        for row in reader:
            # Fields too many come under the name None, fields too few have the value None.
            if None in row or None in row.values():
                raise DataError(
                    f"line {reader.line_num} of '{path}' has another number of fields than the "
                    "first; put fields that contain the separator into double quotes"
                )
            rows.append(row)
    return rows


def _names_prompt(names: Sequence[str]) -> bool:
    return any(name.strip().lower() in COLUMNS["prompt"] for name in names)


def _json(path: Path) -> list[Any]:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(data, dict):
        data = data.get("prompts")
    if not isinstance(data, list):
        raise DataError(f"'{path}' must hold a list of prompts, or of objects with a `prompt`")
    return data


def _json_lines(path: Path) -> list[Any]:
    # Not splitlines, which also splits at separators that JSON allows inside a text.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _text_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


_READERS: Mapping[str, Callable[[Path], Iterable[Any]]] = {
    ".csv": _table,
    ".tsv": _table,
    ".json": _json,
    ".jsonl": _json_lines,
    ".txt": _text_lines,
}
