"""`ledger.jsonl`: an append-only record of requests and artifacts, chained by hash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmforget.artifacts.manifest import MANIFEST_NAME, Manifest, manifest_hash, utc_now
from mmforget.artifacts.run_folder import sync_folder, writing
from mmforget.errors import DataError, MMForgetError

START = "0" * 64
_RESERVED = ("index", "time", "previous", "hash")


class Ledger:
    """Append-only list of what was asked, done and measured.

    Every line is one JSON object with ``index`` (from 1), ``time`` (UTC), the caller's own fields,
    ``previous`` (the ``hash`` of the line before) and ``hash`` (SHA-256 over the rest of the line).
    A changed, removed or inserted line breaks the chain at that place. Lines cut off at the very
    end cannot be told from a shorter ledger: whoever needs that keeps the last ``hash`` elsewhere.

    An entry may have ``artifact`` (folder, relative to the root given to `verify`) together with
    ``manifest`` (`manifest_hash` of it), so that the files can be checked later.

    Args:
        path: the file; it is created by the first `append`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def append(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Add one entry and bring it to the disk; safe against other processes that append.

        Args:
            entry: plain data for JSON.

        Returns:
            The entry as it was written.

        Raises:
            DataError: a reserved field is used, or the last line is damaged.
            StorageError: it could not be written; the ledger is as it was.
        """
        taken = [name for name in _RESERVED if name in entry]
        if taken:
            raise DataError(f"a ledger entry may not set {taken}; rename these fields")
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                size = os.fstat(descriptor).st_size
                last = self._last(_read_all(descriptor))
                line = {
                    "index": last["index"] + 1,
                    "time": utc_now(),
                    **entry,
                    "previous": last["hash"],
                }
                line["hash"] = _hash(line)
                _append_all(descriptor, size, (_canonical(line) + "\n").encode())
            finally:
                os.close(descriptor)
            if size == 0:
                sync_folder(self.path.parent)
        return line

    def entries(self) -> list[dict[str, Any]]:
        """All entries, the oldest first; none if there is no ledger yet.

        Raises:
            DataError: a line is no entry (`verify` lists all problems).
        """
        found = []
        for number, line in enumerate(self._lines(), start=1):
            entry, problem = _parse(number, line)
            if entry is None:
                raise DataError(f"'{self.path}': {problem}; see `mmforget ledger verify`")
            found.append(entry)
        return found

    def verify(self, root: Path | str) -> list[str]:
        """Check the chain, and the files of every artifact that no later entry replaced.

        Args:
            root: folder that ``artifact`` paths are relative to.

        Returns:
            One sentence per problem; empty if all is well.
        """
        problems: list[str] = []
        expected = START
        artifacts: dict[str, tuple[int, dict[str, Any]]] = {}
        for number, line in enumerate(self._lines(), start=1):
            entry, problem = _parse(number, line)
            if entry is None:
                problems.append(problem)
                expected = ""  # unknown: the next line cannot be blamed for it
                continue
            if problem:
                problems.append(problem)
            if expected and entry["previous"] != expected:
                problems.append(
                    f"line {number}: the chain is broken, its predecessor was changed, removed or "
                    "inserted"
                )
            if entry["index"] != number:
                problems.append(f"line {number}: it was written as line {entry['index']}")
            expected = entry["hash"]
            if "artifact" in entry:
                artifacts[str(entry["artifact"])] = (number, entry)
        for folder, (number, entry) in artifacts.items():
            problems += [
                f"line {number}: artifact '{folder}': {text}"
                for text in _check_artifact(Path(root) / folder, entry)
            ]
        return problems

    def _lines(self) -> list[bytes]:
        if not self.path.exists():
            return []
        return self.path.read_bytes().splitlines(keepends=True)

    def _last(self, content: bytes) -> dict[str, Any]:
        """The last entry, or what stands before the first."""
        lines = content.splitlines(keepends=True)
        if not lines:
            return {"index": 0, "hash": START}
        entry, problem = _parse(len(lines), lines[-1])
        if problem or entry is None:
            raise DataError(
                f"'{self.path}': {problem}; nothing was added. Look at the line, remove it (for "
                f"example with sed -i '$d' '{self.path}') and run the command again"
            )
        return entry


def _check_artifact(folder: Path, entry: Mapping[str, Any]) -> list[str]:
    if not folder.is_dir():
        return ["the folder is missing"]
    try:
        if manifest_hash(folder) != entry.get("manifest"):
            return [f"'{MANIFEST_NAME}' has changed since the entry was made"]
        return Manifest.read(folder).verify(folder)
    except MMForgetError as error:
        return [str(error)]


def _parse(number: int, line: bytes) -> tuple[dict[str, Any] | None, str]:
    """Read one line: the entry (None if there is no reading it) and what is wrong with it."""
    if not line.endswith(b"\n"):
        return None, f"line {number} is half-written (a process was killed while writing it)"
    try:
        entry = json.loads(line)
    except ValueError:
        return None, f"line {number} is not valid JSON"
    if not isinstance(entry, dict) or not all(name in entry for name in _RESERVED):
        return None, f"line {number} is no ledger entry"
    if _canonical(entry) + "\n" != line.decode() or _hash(entry) != entry["hash"]:
        return entry, f"line {number} was altered: its content does not match its hash"
    return entry, ""


def _canonical(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _hash(entry: Mapping[str, Any]) -> str:
    body = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        return file.read()


def _append_all(descriptor: int, size: int, data: bytes) -> None:
    """Write and sync; after a failure the file has its old `size` again."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, size)
        raise
