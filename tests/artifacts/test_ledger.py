"""The ledger notices what was changed, and never mends anything in silence."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmforget.artifacts.ledger import START, Ledger
from mmforget.artifacts.manifest import Manifest, manifest_hash
from mmforget.errors import DataError, StorageError


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Three entries."""
    found = Ledger(tmp_path / "runs" / "ledger.jsonl")
    for name in ("one", "two", "three"):
        found.append({"run": name, "text": 'café "quoted"\nline'})
    return found


def lines(ledger: Ledger) -> list[str]:
    """The raw lines."""
    return ledger.path.read_text(encoding="utf-8").splitlines(keepends=True)


def put(ledger: Ledger, content: list[str]) -> None:
    """Replace the raw lines."""
    ledger.path.write_text("".join(content), encoding="utf-8")


def artifact(root: Path, text: str = "weights") -> dict[str, str]:
    """An artifact folder with one file, and the fields of its entry."""
    folder = root / "run" / "artifact"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_text(text)
    Manifest("base", "h", "SSD", {}, "c", ("r",), "d", "s", {"method": 0}).write(folder)
    return {"artifact": "run/artifact", "manifest": manifest_hash(folder)}


def test_entries_are_chained(ledger: Ledger, tmp_path: Path) -> None:
    found = ledger.entries()
    assert [entry["run"] for entry in found] == ["one", "two", "three"]
    assert [entry["index"] for entry in found] == [1, 2, 3]
    assert found[0]["previous"] == START
    assert found[2]["previous"] == found[1]["hash"]
    assert ledger.verify(tmp_path) == []


def test_missing_ledger_is_empty(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.entries() == []
    assert ledger.verify(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_altered_line(ledger: Ledger, tmp_path: Path, number: int) -> None:
    content = lines(ledger)
    content[number - 1] = content[number - 1].replace("café", "cafe")
    put(ledger, content)
    problems = ledger.verify(tmp_path)
    assert problems == [f"line {number} was altered: its content does not match its hash"]


def test_altered_line_with_a_new_hash_breaks_the_chain(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other.jsonl")
    other.append({"run": "one"})
    other.append({"run": "forged"})
    content = lines(ledger)
    content[1] = lines(other)[1]
    put(ledger, content)
    problems = ledger.verify(tmp_path)
    assert [text.split(":")[0] for text in problems] == ["line 2", "line 3"]
    assert all("chain is broken" in text for text in problems)


def test_removed_line(ledger: Ledger, tmp_path: Path) -> None:
    content = lines(ledger)
    put(ledger, [content[0], content[2]])
    problems = ledger.verify(tmp_path)
    assert "line 2: the chain is broken" in problems[0]
    assert problems[1] == "line 2: it was written as line 3"


def test_half_written_line_is_reported_and_not_mended(ledger: Ledger, tmp_path: Path) -> None:
    content = lines(ledger)
    put(ledger, [*content[:2], content[2][:40]])
    before = ledger.path.read_bytes()
    assert ledger.verify(tmp_path) == [
        "line 3 is half-written (a process was killed while writing it)"
    ]
    with pytest.raises(DataError, match="line 3 is half-written"):
        ledger.entries()
    with pytest.raises(DataError, match=r"nothing was added. Look at the line, remove it .*sed -i"):
        ledger.append({"run": "four"})
    assert ledger.path.read_bytes() == before
    # the remedy that the message names
    subprocess.run(["sed", "-i", "$d", str(ledger.path)], check=True)
    ledger.append({"run": "again"})
    assert [entry["run"] for entry in ledger.entries()] == ["one", "two", "again"]
    assert ledger.verify(tmp_path) == []


def test_append_refuses_an_altered_last_line(ledger: Ledger) -> None:
    content = lines(ledger)
    put(ledger, [*content[:2], content[2].replace("three", "seven")])
    with pytest.raises(DataError, match="line 3 was altered"):
        ledger.append({"run": "four"})


def test_line_that_is_no_entry(ledger: Ledger, tmp_path: Path) -> None:
    content = lines(ledger)
    put(ledger, [content[0], "{}\n", "nonsense\n", *content[1:]])
    assert ledger.verify(tmp_path)[:2] == [
        "line 2 is no ledger entry",
        "line 3 is not valid JSON",
    ]


def test_reserved_fields_are_refused(ledger: Ledger) -> None:
    with pytest.raises(DataError, match="may not set"):
        ledger.append({"hash": "mine"})
    assert len(ledger.entries()) == 3


def test_full_disk_leaves_the_ledger_as_it_was(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ledger.path.read_bytes()
    write, calls = os.write, []

    def limited(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(StorageError, match="no space left"):
        ledger.append({"run": "four"})
    monkeypatch.undo()
    assert len(calls) == 2
    assert ledger.path.read_bytes() == before
    assert ledger.verify(tmp_path) == []


def _append(path: Path, name: str) -> None:
    for number in range(5):
        Ledger(path).append({"run": f"{name}{number}"})


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert Ledger(path).verify(tmp_path) == []
    runs = sorted(entry["run"] for entry in Ledger(path).entries())
    assert runs == sorted(f"{name}{number}" for name in "ab" for number in range(5))


def test_artifacts_are_verified(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(artifact(tmp_path))
    assert ledger.verify(tmp_path) == []
    folder = tmp_path / "run" / "artifact"
    (folder / "weights.bin").write_text("other")
    (folder / "extra").write_text("x")
    assert ledger.verify(tmp_path) == [
        "line 1: artifact 'run/artifact': 'extra' is not in the manifest",
        "line 1: artifact 'run/artifact': 'weights.bin' has changed",
    ]
    Manifest.read(folder).write(folder)  # hides the change in the manifest, not from the ledger
    assert ledger.verify(tmp_path) == [
        "line 1: artifact 'run/artifact': 'manifest.json' has changed since the entry was made"
    ]
    (folder / "manifest.json").unlink()
    assert "no manifest.json" in ledger.verify(tmp_path)[0]
    folder.rename(tmp_path / "elsewhere")
    assert ledger.verify(tmp_path) == ["line 1: artifact 'run/artifact': the folder is missing"]


def test_replaced_artifact_is_judged_by_its_last_entry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(artifact(tmp_path))
    ledger.append(artifact(tmp_path, "new weights"))
    assert ledger.verify(tmp_path) == []


def test_lines_are_plain_json(ledger: Ledger) -> None:
    entry = json.loads(lines(ledger)[0])
    assert entry["text"] == 'café "quoted"\nline'
    assert "café" in lines(ledger)[0]


def test_neither_ledger_nor_report_imports_torch() -> None:
    code = (
        "import sys, mmforget.artifacts.ledger, mmforget.artifacts.save, mmforget.report.write\n"
        "import mmforget.artifacts.model_card\n"
        "print([name for name in ('torch', 'jinja2', 'matplotlib') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert found.stdout.strip() == "[]"
