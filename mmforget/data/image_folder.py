"""A folder of pictures, one subfolder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmforget.data.base import ForgetDataModule, ImageDataset, View
from mmforget.data.pictures import PictureDataset, check_fractions, complete
from mmforget.data.split import STAGES, Stage
from mmforget.errors import DataError, MissingFileError, suggest

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageFolderData(ForgetDataModule):
    """Pictures in ``folder/CLASS/...``, or in ``folder/{train,val,test}/CLASS/...``.

    Stages without a folder of their own are held out of the training pictures. Sample ids are
    hashes of the path below `folder`: other pictures may come and go without changing them.

    Args:
        folder: where the pictures are.
        image_size: side of the square to which pictures are cropped and resized; None if all have
            the same size.
        val_fraction, test_fraction: expected share that is held out for a missing stage.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment: see
            `ForgetDataModule`.

    Raises:
        MissingFileError: there is no such folder.
        DataError: no pictures, or a class in validation or test that is not in training.
    """

    def __init__(
        self,
        folder: str,
        image_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
    ) -> None:
        super().__init__(
            batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment
        )
        check_fractions(val_fraction, test_fraction)
        if not Path(folder).is_dir():
            raise MissingFileError(f"`folder` is '{folder}', which does not exist; check the path")
        self.folder = Path(folder)
        self.image_size = image_size
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def build(self) -> dict[Stage, ImageDataset]:
        """List the files; pictures are decoded when they are first asked for."""
        if not (self.folder / "train").is_dir():
            files, names = _pictures(self.folder)
            only = self._stage_of("train", self.folder, files, names)
            return complete({"train": only}, self.val_fraction, self.test_fraction)
        names = _pictures(self.folder / "train")[1]
        found: dict[Stage, ImageDataset] = {}
        for stage in STAGES:
            root = self.folder / stage
            if root.is_dir():
                files, present = _pictures(root)
                for name in present:
                    if name not in names:
                        raise DataError(
                            f"class '{name}' is in '{root}' but not in training, "
                            f"{suggest(name, names)}"
                        )
                found[stage] = self._stage_of(stage, root, files, names)
        return complete(found, self.val_fraction, self.test_fraction)

    def _stage_of(
        self, stage: Stage, root: Path, files: list[Path], names: tuple[str, ...]
    ) -> ImageDataset:
        ids = [_path_id(file.relative_to(self.folder).as_posix()) for file in files]
        labels = [names.index(file.relative_to(root).parts[0]) for file in files]
        return PictureDataset(
            f"{self.folder.name}/{stage}",
            np.array(ids, dtype=np.int64),
            np.array(labels, dtype=np.int64),
            names,
            _Opener(files),
            self.image_size,
        )


class _Opener:
    """Opens the pictures of rows; a class, so that loader workers can be sent it."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __call__(self, rows: Sequence[int]) -> Iterator[Image]:
        from PIL import Image

        for row in rows:
            with Image.open(self._files[row]) as picture:
                yield picture


def _pictures(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """All picture files below the class folders of `root`, sorted, and the class names."""
    from PIL import Image

    endings = Image.registered_extensions()
    readable = {end for end, kind in endings.items() if kind in Image.OPEN}
    names = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
    files = [
        file
        for name in names
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in readable and file.is_file()
    ]
    if not files:
        raise DataError(
            f"'{root}' holds no pictures; expected one subfolder per class with image files in it"
        )
    return files, names


def _path_id(path: str) -> int:
    """53-bit hash of a path: exact in every JSON reader, and unique among millions of files."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big") >> 11
