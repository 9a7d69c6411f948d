"""Save an unlearned model as a folder that loads without mmforget."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmforget.artifacts.manifest import Manifest
from mmforget.artifacts.run_folder import (
    atomic_write,
    put_in_place,
    refuse_foreign,
    restore_earlier,
    writing,
)
from mmforget.errors import RunExistsError

if TYPE_CHECKING:
    from mmforget.models.base import Model


def save_artifact(
    model: Model,
    folder: Path | str,
    manifest: Manifest,
    card: str,
    adapters: Mapping[str, Callable[[Path], None]] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write native weights, adapters, model card and, as the last file, the manifest.

    Everything is written to a hidden folder beside `folder`, which takes its name when it is
    complete.

    Args:
        model: the unlearned model; `Model.save_native` decides the format.
        folder: the artifact folder.
        manifest: what it is; `result_hash` and `files` are filled in here.
        card: text of ``README.md``; it replaces one that the native library has written.
        adapters: per request name a function that writes its adapter into a folder that exists.
            They land in ``adapters/<name>/`` (`folder_name` of the request name).
        overwrite: replace an earlier artifact.

    Returns:
        The manifest as it was written.

    Raises:
        RunExistsError: `folder` exists and `overwrite` is off, or is no artifact.
        StorageError: the disk is full or may not be written to; an earlier artifact is intact.
    """
    from mmforget.models.base import state_hash

    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.saving")
    with writing(folder):
        restore_earlier(folder)
        if overwrite:
            refuse_foreign(folder)
        elif folder.exists():
            raise RunExistsError(f"'{folder}' exists; choose another name or pass overwrite=True")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if work.exists():  # of a process that was killed; it has no manifest and no use
            shutil.rmtree(work)
        work.mkdir()
        try:
            model.save_native(work)
            for name, write in (adapters or {}).items():
                target = work / "adapters" / folder_name(name)
                target.mkdir(parents=True)
                write(target)
            atomic_write(work / "README.md", card)
            replace(manifest, result_hash=state_hash(model)).write(work)
            saved = Manifest.read(work)
            put_in_place(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return saved


def folder_name(name: str) -> str:
    """A request name as a folder name: letters, digits, dots and dashes, unique per name."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:60]
    if plain and plain == name:
        return plain
    return f"{plain or 'request'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
