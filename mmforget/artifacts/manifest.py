"""`manifest.json`: where an artifact comes from, and the hash of each of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from mmforget.artifacts.run_folder import atomic_write
from mmforget.errors import DataError, MissingFileError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LIBRARIES = (
    "torch",
    "lightning",
    "timm",
    "torchvision",
    "transformers",
    "diffusers",
    "open_clip_torch",
    "peft",
    "safetensors",
    "datasets",
    "torchmetrics",
    "numpy",
    "scikit-learn",
)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that a result can depend on, without importing them."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def mmforget_version() -> str:
    """Version of mmforget, or ``not installed`` when it runs from a plain source folder."""
    try:
        return metadata.version("mmforget")
    except metadata.PackageNotFoundError:
        return "not installed"


def utc_now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a resolved configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder but the manifest, by relative path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and how it was made.

    Args:
        base_model: source of the model before forgetting: hub id, folder or file.
        base_hash: `state_hash` of its weights.
        method: class name of the forgetting method.
        settings: its constructor arguments.
        config_hash: `config_hash` of the complete resolved configuration.
        request_hashes: `ForgetRequest.hash` of every request carried out so far, in order.
        data_hash: hash of the data set.
        split_hash: hash of the split into forget and retain data.
        seeds: seeds by purpose.
        result_hash: `state_hash` of the weights in the artifact; filled in by `save_artifact`.
        libraries: versions of the libraries used.
        created: time of saving, ISO 8601 in UTC.
        files: SHA-256 per file; filled in by `write`.
    """

    base_model: str
    base_hash: str
    method: str
    settings: dict[str, Any]
    config_hash: str
    request_hashes: tuple[str, ...]
    data_hash: str
    split_hash: str
    seeds: dict[str, int]
    result_hash: str = ""
    libraries: dict[str, str] = field(default_factory=library_versions)
    created: str = field(default_factory=utc_now)
    mmforget_version: str = field(default_factory=mmforget_version)
    format_version: int = FORMAT_VERSION
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path | str) -> None:
        """Hash every file in `folder` and write the manifest beside them, as the last file.

        Raises:
            StorageError: the file could not be written.
        """
        folder = Path(folder)
        body = asdict(self) | {"files": folder_hashes(folder)}
        text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False, default=str)
        atomic_write(folder / MANIFEST_NAME, text + "\n")

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read the manifest of an artifact folder.

        Raises:
            MissingFileError: there is none.
            DataError: it is damaged, or of another format version.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise MissingFileError(f"no {MANIFEST_NAME} in '{folder}'; give an artifact folder")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"'{path}' is damaged ({error}); save the artifact again") from error
        version = body.get("format_version") if isinstance(body, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"'{path}' has format version {version}, this mmforget reads {FORMAT_VERSION}; "
                "use the version that wrote it"
            )
        names = {entry.name for entry in fields(cls)}
        if set(body) != names:
            wrong = ", ".join(sorted(set(body) ^ names))
            raise DataError(f"'{path}' has missing or unknown fields: {wrong}; save it again")
        return cls(**body | {"request_hashes": tuple(body["request_hashes"])})

    def verify(self, folder: Path | str) -> list[str]:
        """Compare the files of an artifact with their recorded hashes.

        Returns:
            One sentence for each missing, changed or unexpected file; empty if all is well.
        """
        found = folder_hashes(Path(folder))
        problems = []
        for name in sorted(self.files.keys() | found.keys()):
            if name not in found:
                problems.append(f"'{name}' is missing")
            elif name not in self.files:
                problems.append(f"'{name}' is not in the manifest")
            elif found[name] != self.files[name]:
                problems.append(f"'{name}' has changed")
        return problems


def manifest_hash(folder: Path | str) -> str:
    """SHA-256 of the manifest file, which pins every file of an artifact.

    Raises:
        MissingFileError: the folder has no manifest.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise MissingFileError(f"no {MANIFEST_NAME} in '{folder}'; give an artifact folder")
    return file_hash(path)
