"""Writing results so that a crash, a full disk or a second process never damages an earlier one."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from mmforget.errors import MissingFileError, MMForgetError, RunExistsError, StorageError

LOCK_NAME = ".lock"
OUR_FILES = ("config.yaml", "request.json", "results.json", "manifest.json")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the file system into one sentence that says what to do.

    Libraries written in Rust and C++ report a full disk with exception classes of their own, so
    these are recognised by the text of the operating system.

    Args:
        path: what is being written, for the message.

    Raises:
        StorageError: the file system refused; whatever was complete before is intact.
    """
    try:
        yield
    except MMForgetError:
        raise
    except OSError as error:
        raise StorageError(_sentence(error.errno, path, error)) from error
    except Exception as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code) in str(error):
                raise StorageError(_sentence(code, path, error)) from error
        raise


def _sentence(code: int | None, path: Path, error: Exception) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no space left to write '{path}'; free some and start again (earlier files are intact)"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"'{path}' may not be written to; choose a place where you have write permission"
    if code in (errno.ENOTDIR, errno.EEXIST):
        return f"'{path}' cannot be created because a file is in its way; choose another place"
    return (
        f"'{path}' could not be written ({error}); choose another place (earlier files are intact)"
    )


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write a file completely or not at all.

    The content goes to a temporary file beside `path`, reaches the disk, and then takes its name.

    Args:
        path: the file; its folder must exist.
        content: text is written as UTF-8 with the line ends it has.

    Raises:
        StorageError: the file could not be written; an earlier file of this name is as it was.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with writing(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(new: Path, path: Path) -> None:
    """Rename the folder `new` to `path`; an earlier `path` is removed only once that succeeded.

    Raises:
        RunExistsError: `path` is something that mmforget did not write.
    """
    refuse_foreign(path)
    aside = _aside(path)
    if path.exists():
        os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        if aside.exists():
            os.rename(aside, path)
        raise
    sync_folder(path.parent)
    # the new folder is in place: what is left of the old one is no failure, and is removed by the
    # next `restore_earlier`
    shutil.rmtree(aside, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """Refuse to replace anything but a folder of ours: a slip in a name must not delete a home.

    Raises:
        RunExistsError: `path` is a file or a folder without any of our files.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not any((path / name).is_file() for name in OUR_FILES):
        raise RunExistsError(
            f"'{path}' was not written by mmforget and is not replaced; choose another name"
        )


def restore_earlier(path: Path) -> None:
    """Finish or undo a `put_in_place` that was killed between its steps."""
    aside = _aside(path)
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


class RunFolder:
    """The folder of one run, which appears under its name only when the run is complete.

    ::

        with RunFolder("runs/example") as run:
            (run.work / "results.json").write_text(...)
            run.commit()

    Until `commit`, everything lies in `work`, a hidden folder ``.<name>.partial`` beside `path`
    (same file system, so that the final rename is atomic). When the block ends without `commit`,
    by an error, Ctrl-C or a kill, `work` stays for ``resume=True``, unless nothing was written.

    Creating the object touches no files: processes of a distributed run other than the first may
    do so to learn `work`, and only the first enters it.

    Args:
        path: the final folder; missing parents are created.
        overwrite: replace an existing run. It stays where it is until the new one is complete.
        resume: continue in the `work` folder of an unfinished run.
    """

    def __init__(self, path: Path | str, overwrite: bool = False, resume: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        self.work = self.path.with_name(f".{self.path.name}.partial")
        self.overwrite = overwrite
        self.resume = resume
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Check the name, create or find `work`, and lock it.

        Raises:
            RunExistsError: the run exists, is unfinished, or is being written by another process.
            MissingFileError: ``resume`` finds no unfinished run.
            StorageError: the folder cannot be created.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.work.mkdir(exist_ok=True)
            self._acquire()
            try:
                self._check()
            except BaseException:
                self.close()
                raise

    def _check(self) -> None:
        restore_earlier(self.path)
        if self.overwrite:
            refuse_foreign(self.path)
        elif self.path.exists():
            raise RunExistsError(
                f"the run '{self.path}' exists; choose another name or replace it with --overwrite"
            )
        if self.resume and self._empty():
            raise MissingFileError(
                f"there is no unfinished run '{self.path}' to resume; start it without --resume"
            )
        if not self.resume and not self._empty():
            raise RunExistsError(
                f"the run '{self.path}' was started and not finished; continue it with --resume or "
                f"delete '{self.work}'"
            )

    def commit(self) -> Path:
        """Give the finished folder its name.

        Returns:
            `path`.

        Raises:
            RunExistsError: `path` has appeared in the meantime.
            StorageError: the rename failed; `work` and an earlier run are intact.
        """
        if self._lock is None:
            raise RuntimeError("RunFolder.commit() needs an open run; use it in a `with` block")
        if self.path.exists() and not self.overwrite:
            raise RunExistsError(
                f"'{self.path}' was created by somebody else during this run; the result is kept "
                f"in '{self.work}', rename it"
            )
        with writing(self.path):
            put_in_place(self.work, self.path)
            (self.path / LOCK_NAME).unlink()
        self._committed = True
        return self.path

    def close(self) -> None:
        """Release the lock; an uncommitted `work` stays for resuming unless it is empty."""
        if self._lock is None:
            return
        if not self._committed and self.work.is_dir() and self._empty():
            shutil.rmtree(self.work)
        self._release()

    def _empty(self) -> bool:
        return [entry.name for entry in self.work.iterdir()] == [LOCK_NAME]

    def _acquire(self) -> None:
        descriptor = os.open(self.work / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RunExistsError(
                f"the run '{self.path}' is being written by another process; wait for it or choose "
                "another name"
            ) from error
        self._lock = descriptor

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
