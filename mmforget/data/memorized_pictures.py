"""Finding the pictures of a list in a folder, and decoding them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from torch import Tensor

from mmforget.data.memorized_lists import ListedPrompt, listed_prompt
from mmforget.errors import DataError, MissingFileError

OnMissing = Literal["raise", "skip"]

Key = TypeVar("Key", bound=Hashable)

_NUMBER = re.compile(r"(?:img_|image_)?(\d+)(?:_.*)?")


class PictureReader:
    """Decodes the pictures of rows, each file once.

    Identical pictures under several names count as one, so that no split can part them.

    Args:
        size: side to which pictures are cropped and resized; None keeps sizes.

    Attributes:
        images: per name (3, H, W) float in [0, 1].
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.images: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}
        self._known: dict[bytes, str] = {}

    def read(
        self,
        path: Path,
        images: str | Path | None,
        rows: Sequence[ListedPrompt],
        wanted: Sequence[ListedPrompt],
        on_missing: OnMissing,
    ) -> tuple[list[tuple[str, ...]], list[str]]:
        """Read the pictures of some rows.

        Args:
            path: of the list, or a folder.
            images: folder of the pictures, see `load_memorized`.
            rows: the whole list.
            wanted: the rows to read for.
            on_missing: ``raise`` or ``skip``.

        Returns:
            Per wanted row the names of its pictures, and what is missing.

        Raises:
            MissingFileError: `images` is no folder.
            DataError: missing pictures, pictures of different sizes, or a folder in which no
                picture belongs to a row.
        """
        found: list[tuple[str, ...]] = []
        missing: list[str] = []
        for files in _located(path, images, rows, wanted):
            names: list[str] = []
            for label, file in files:
                name = None if file is None else self._add(label, file)
                (missing if name is None else names).append(name or label)
            found.append(tuple(dict.fromkeys(names)))
        missing = list(dict.fromkeys(missing))
        if missing and on_missing == "raise":
            raise DataError(
                f"{len(missing)} pictures of '{path}' are missing or cannot be read, first "
                f"'{missing[0]}'; add them, or go on without them by `on_missing=\"skip\"`"
            )
        return found, missing

    def _add(self, label: str, file: Path) -> str | None:
        """The name under which a picture is known, None if it cannot be decoded."""
        if label in self._names:
            return self._names[label]
        image = decoded(file, self.size)
        if image is None:
            return None
        other = next(iter(self.images.values()), image)
        if image.shape != other.shape:
            raise DataError(
                f"the picture '{label}' is {image.shape[2]}x{image.shape[1]}, another one "
                f"{other.shape[2]}x{other.shape[1]}; give `size`, the side that the model draws"
            )
        digest = hashlib.sha256(image.numpy().tobytes()).digest()
        name = self._known.setdefault(digest, label)
        self._names[label] = name
        self.images.setdefault(name, image)
        return name


def picture_files(folder: Path) -> list[Path]:
    """All picture files below a folder, sorted.

    Args:
        folder: where to look.
    """
    from PIL import Image

    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in readable and file.is_file()
    ]


def decoded(file: Path, size: int | None) -> Tensor | None:
    """Decode a picture, (3, H, W) float in [0, 1]; None if the file is damaged.

    Args:
        file: of any kind that Pillow opens.
        size: side to which it is cropped around its centre and resized; None keeps its size.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # all of these mean a damaged file to Pillow; callers count or refuse it
    if size is not None and picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255


def all_pictures(folder: Path, size: int | None) -> Tensor:
    """Decode every picture in a folder, (K, 3, H, W) float in [0, 1].

    Args:
        folder: where they are.
        size: see `decoded`.

    Raises:
        MissingFileError: there is no such folder.
        DataError: no pictures, damaged ones, or different sizes.
    """
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder of pictures '{folder}'; check the path")
    files = picture_files(folder)
    if not files:
        raise DataError(f"'{folder}' holds no pictures; check the path")
    found: list[Tensor] = []
    for file in files:
        image = decoded(file, size)
        if image is None:
            raise DataError(f"the picture '{file}' cannot be decoded; replace or remove it")
        if found and image.shape != found[0].shape:
            raise DataError(
                f"the picture '{file}' is {image.shape[2]}x{image.shape[1]}, the first one "
                f"{found[0].shape[2]}x{found[0].shape[1]}; give `size`"
            )
        found.append(image)
    return torch.stack(found)


def captioned_pictures(folder: Path) -> list[ListedPrompt]:
    """List pictures that have a text of the same name beside them.

    Args:
        folder: for example with ``00000001.jpg`` and ``00000001.txt``.

    Raises:
        DataError: there are none.
    """
    rows: list[ListedPrompt] = []
    for file in picture_files(folder):
        text = file.with_suffix(".txt")
        if text.is_file():
            prompt = text.read_text(encoding="utf-8-sig").strip()
            name = file.relative_to(folder).as_posix()
            rows.append(listed_prompt(text, len(rows), {"prompt": prompt, "file": name}))
    if not rows:
        raise DataError(
            f"'{folder}' is no memorized set, and no picture in it has a .txt beside it; give a "
            "list of prompts, and the folder as `images`"
        )
    return rows


# ---- which picture belongs to which row ---------------------------------------------------------


def _located(
    path: Path,
    images: str | Path | None,
    rows: Sequence[ListedPrompt],
    wanted: Sequence[ListedPrompt],
) -> list[list[tuple[str, Path | None]]]:
    """Per wanted row its pictures: a label, and the file, None where it is not there."""
    folder = path if path.is_dir() else path.parent
    if images is not None:
        folder = Path(images).expanduser()
        if not folder.is_dir():
            raise MissingFileError(f"`images` is '{folder}', which is no folder; check the path")
    if any(row.files for row in rows):
        return [[_named(folder, name) for name in row.files] or [(row.label, None)]
                for row in wanted]  # fmt: skip
    if images is None:
        return [[] for _ in wanted]
    table = _placed(folder, rows)
    return [
        [(file.relative_to(folder).as_posix(), file) for file in table.get(row.number, ())]
        or [(row.label, None)]
        for row in wanted
    ]


def _named(folder: Path, name: str) -> tuple[str, Path | None]:
    file = folder / name
    return name, file if file.is_file() else None


def _placed(folder: Path, rows: Sequence[ListedPrompt]) -> dict[int, list[Path]]:
    """Pictures by row number, after the way of naming that places most rows.

    One way for all rows, because the end of an address may look like a row number.
    """
    files = picture_files(folder)
    index, address, number = _by_index(files, rows), _by_address(files, rows), _by_number(files)
    numbered = {row.number: number[row.number] for row in rows if row.number in number}
    best = max((index, address, numbered), key=len)
    if not best:
        raise DataError(
            f"none of the {len(files)} pictures in '{folder}' belongs to a row; name them by the "
            "row's `index`, its `url` or its number (0000.png first), or give a column `file`"
        )
    if best is numbered and 0 not in number and len(rows) in number:
        raise DataError(
            f"the pictures in '{folder}' are numbered from 1, rows count from 0; rename them, or "
            "give a column `file`"
        )
    return best


def _by_index(files: Sequence[Path], rows: Sequence[ListedPrompt]) -> dict[int, list[Path]]:
    table = _grouped((name, file) for file in files for name in {file.parent.name, file.stem})
    return {row.number: table[row.index] for row in rows if row.index and row.index in table}


def _by_address(files: Sequence[Path], rows: Sequence[ListedPrompt]) -> dict[int, list[Path]]:
    table = _grouped((file.name, file) for file in files)
    addresses = {row.number: urlsplit(row.url) for row in rows if row.url}
    # The same last part at two places means two pictures, of which a folder can hold only one.
    places: dict[str, set[str]] = {}
    for part in addresses.values():
        places.setdefault(_last(part.path), set()).add(part.netloc + part.path)
    return {
        number: table[_last(part.path)]
        for number, part in addresses.items()
        if _last(part.path) in table and len(places[_last(part.path)]) == 1
    }


def _last(path: str) -> str:
    return unquote(path.rpartition("/")[2])


def _by_number(files: Sequence[Path]) -> dict[int, list[Path]]:
    matches = ((_NUMBER.fullmatch(file.stem), file) for file in files)
    return _grouped((int(match[1]), file) for match, file in matches if match)


def _grouped(pairs: Iterable[tuple[Key, Path]]) -> dict[Key, list[Path]]:
    table: dict[Key, list[Path]] = {}
    for key, file in pairs:
        table.setdefault(key, []).append(file)
    return table
