"""Runs appear complete or not at all, and nothing that was there before is damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from mmforget.artifacts.run_folder import RunFolder, atomic_write, put_in_place
from mmforget.errors import MissingFileError, RunExistsError, StorageError


def finished(path: Path, text: str = "old") -> Path:
    """A committed run with one file."""
    with RunFolder(path) as run:
        (run.work / "results.json").write_text(text)
        run.commit()
    return path


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(entry.name for entry in folder.iterdir())


# ---- atomic_write --------------------------------------------------------------


def test_atomic_write_replaces_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "one\n")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_full_disk_leaves_the_earlier_file_as_it_was(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "earlier")
    with (
        full_disk(1000),
        pytest.raises(StorageError, match=r"no space left to write '.*a\.txt'; free some"),
    ):
        atomic_write(path, "x" * 5000)
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["a.txt"]


def test_no_space_at_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.txt"
    atomic_write(path, "earlier")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="no space left"):
        atomic_write(path, "later")
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["a.txt"]


def test_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # tests may run as root, whom permissions do not bind: the refusal comes from os.mkdir
    def refuse(path: object, mode: int = 0o777) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match="may not be written to; choose a place") as caught:
        RunFolder(tmp_path / "run").open()
    assert "\n" not in str(caught.value)


def test_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a file is in its way"):
        RunFolder(tmp_path / "file" / "run").open()
    with pytest.raises(StorageError, match="a file is in its way"):
        atomic_write(tmp_path / "file" / "a.txt", "x")
    assert (tmp_path / "file").read_text() == "mine"


# ---- life of a run --------------------------------------------------------------


def test_run_appears_only_when_it_is_committed(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "deep" / "run") as run:
        (run.work / "results.json").write_text("{}")
        assert not run.path.exists()
        assert run.commit() == run.path
    assert names(tmp_path / "deep") == ["run"]
    assert names(run.path) == ["results.json"]


def test_constructor_touches_no_files(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    assert run.work == tmp_path / "a" / ".run.partial"
    assert names(tmp_path) == []
    with pytest.raises(RuntimeError, match="open run"):
        run.commit()


def test_existing_run_is_refused(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    with pytest.raises(RunExistsError, match="choose another name or replace it with --overwrite"):
        RunFolder(path).open()
    assert names(tmp_path) == ["run"]
    assert (path / "results.json").read_text() == "old"


def test_overwrite_keeps_the_old_run_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    with RunFolder(path, overwrite=True) as run:
        (run.work / "results.json").write_text("new")
        assert (path / "results.json").read_text() == "old"
        run.commit()
    assert (path / "results.json").read_text() == "new"
    assert names(tmp_path) == ["run"]


def test_failed_rename_brings_the_old_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished(tmp_path / "run")
    rename = os.rename

    def fail_for_work(source: object, target: object) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)  # type: ignore[arg-type]

    with RunFolder(path, overwrite=True) as run:
        (run.work / "results.json").write_text("new")
        monkeypatch.setattr(os, "rename", fail_for_work)
        with pytest.raises(StorageError, match="no space left"):
            run.commit()
    assert (path / "results.json").read_text() == "old"
    assert (run.work / "results.json").read_text() == "new"


def test_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    path.rename(tmp_path / ".run.replaced")
    with pytest.raises(RunExistsError, match="--overwrite"):
        RunFolder(path).open()
    assert (path / "results.json").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_overwrite_refuses_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(RunExistsError, match="was not written by mmforget and is not replaced"):
        RunFolder(tmp_path / "home", overwrite=True).open()
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    assert names(tmp_path) == ["home"]


def test_unfinished_run_is_kept_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), RunFolder(path) as run:
        (run.work / "half.txt").write_text("half")
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(RunExistsError, match=r"--resume or delete '.*\.run\.partial'"):
        RunFolder(path).open()
    with RunFolder(path, resume=True) as run:
        assert (run.work / "half.txt").read_text() == "half"
        run.commit()
    assert names(path) == ["half.txt"]


def test_run_that_failed_before_it_wrote_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no unfinished run .* without --resume"):
        RunFolder(tmp_path / "run", resume=True).open()
    assert names(tmp_path) == []


def _hold(path: Path, ready: object, done: object) -> None:
    with RunFolder(path) as run:
        (run.work / "a").write_text("a")
        ready.set()  # type: ignore[attr-defined]
        done.wait(20)  # type: ignore[attr-defined]


def test_second_process_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", ready, done))
    process.start()
    try:
        assert ready.wait(20)
        for resume in (False, True):
            with pytest.raises(RunExistsError, match="is being written by another process"):
                RunFolder(tmp_path / "run", resume=resume).open()
    finally:
        done.set()
        process.join(20)
    with RunFolder(tmp_path / "run", resume=True) as run:  # the lock ended with its process
        run.commit()


def test_name_taken_during_the_run(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as run:
        (run.work / "a").write_text("a")
        (tmp_path / "run").mkdir()
        with pytest.raises(RunExistsError, match="created by somebody else"):
            run.commit()
    assert (run.work / "a").read_text() == "a"


def test_put_in_place_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunExistsError, match="not written by mmforget"):
        put_in_place(tmp_path / "new", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
