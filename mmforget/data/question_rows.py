"""Records of questions as they stand in files, checked one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmforget.data.question_records import OTHER, TEXT
from mmforget.data.split import STAGES, Stage
from mmforget.errors import DataError, suggest

FIELDS = (
    "id",
    "images",
    "question",
    "answer",
    "class",
    "kind",
    "split",
    "wording",
    "subject",
)
"""Of a record. All but `question` and `answer` may be left out."""


@dataclass(frozen=True)
class Row:
    """One record of a file, checked.

    Attributes:
        place: where it stands, for messages.
        id: of the record.
        images: what names its pictures.
        question, answer, kind, wording: see `Records`.
        entity: name of the entity that the answer reveals, None for none.
        subject: name of the entity that is shown or asked about.
        stage: of the record.
    """

    place: str
    id: int
    images: tuple[Any, ...]
    question: str
    answer: str
    kind: str
    wording: str
    entity: str | None
    subject: str | None
    stage: Stage


def objects_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Every record of a file with its place.

    Raises:
        DataError: the file is no JSON.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{file}' is no text in UTF-8 ({error}); write it as JSON lines"
        ) from error
    if text.lstrip().startswith("["):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"'{file}' is no valid JSON ({error}); correct it") from error
        yield from ((f"{file}: record {number}", one) for number, one in enumerate(content, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{file}, line {number}", json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{file}, line {number}: no valid JSON ({error}); correct or remove the line"
                ) from error


def checked_row(
    content: Any,
    place: str,
    stage: Stage,
    fixed: bool,
    problems: list[str],
    keys: Sequence[Any] = (),
) -> Row | None:
    """Check one record.

    Args:
        content: as read.
        place: where it stands.
        stage: of the file.
        fixed: whether all records of the file are of this stage.
        problems: what is wrong is added here, one line each.
        keys: what names the pictures; by default the field ``images``.

    Returns:
        The record; None if it cannot be used.
    """
    if not isinstance(content, Mapping):
        problems.append(f"{place}: {content!r:.40} is no record; write an object with {FIELDS}")
        return None
    before = len(problems)
    for field in content:
        if field not in FIELDS:
            problems.append(f"{place}: `{field}` is no field of a record; {suggest(field, FIELDS)}")
    for field in ("question", "answer"):
        value = content.get(field)
        if not isinstance(value, str) or not value.strip():
            given = "is missing" if field not in content else f"is {value!r}"
            problems.append(f"{place}: `{field}` {given}; write a text that is not empty")
    for field in ("class", "kind", "wording", "subject", "split"):
        value = content.get(field)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            problems.append(f"{place}: `{field}` is {value!r}; write a text or leave it out")
        elif field in ("class", "subject") and value == OTHER:
            problems.append(f"{place}: `{field}` is '{OTHER}', which is reserved; leave it out")
    split = content.get("split")
    if isinstance(split, str) and split not in STAGES:
        problems.append(f"{place}: `split` is '{split}', {suggest(split, STAGES)}")
    elif fixed and split not in (None, stage):
        problems.append(
            f"{place}: `split` is '{split}' in the file of '{stage}'; remove the field or move "
            "the record"
        )
    images = content.get("images", [])
    images = [images] if isinstance(images, str) else [] if images is None else images
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        problems.append(f"{place}: `images` is {images!r}; write a path or a list of paths")
    identity = content.get("id")
    if isinstance(identity, bool) or not isinstance(identity, int | str | None):
        problems.append(f"{place}: `id` is {identity!r}; write a whole number or a text")
    if len(problems) > before:
        return None
    shown = tuple(keys) or tuple(images)
    entity = content.get("class")
    usual = "harmless" if entity is None else "name" if shown else TEXT
    return Row(
        place,
        _id(identity, place),
        shown,
        content["question"],
        content["answer"],
        content.get("kind") or usual,
        content.get("wording") or "train",
        entity,
        content.get("subject") or entity,
        split or stage,
    )


def _id(given: int | str | None, place: str) -> int:
    """A number as it is; a text, or else the place, hashed to 53 bits."""
    if isinstance(given, int):
        return given
    text = Path(place).name if given is None else given
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 11


def check_ids(rows: Sequence[Row], problems: list[str]) -> None:
    """Add a line to `problems` for every record whose id is that of an earlier one."""
    first: dict[int, str] = {}
    for row in rows:
        if row.id in first:
            problems.append(
                f"{row.place}: `id` is that of {first[row.id]} already; give every record its own"
            )
        first.setdefault(row.id, row.place)


def refuse(problems: Sequence[str], shown: int = 5) -> None:
    """Stop if there are problems.

    Raises:
        DataError: the first ones, one line each, and the number of the others.
    """
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        raise DataError("\n".join([*problems[:shown], *more]))
