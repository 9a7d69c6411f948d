"""Pictures with boxes that a library decodes one by one, on a common canvas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmforget.data.boxes import BadBoxes, RawBoxes, annotations_of, fit
from mmforget.data.detection import DetectionDataset, Flips
from mmforget.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""


class ScenePictures(DetectionDataset):
    """Pictures with boxes that are opened one at a time, in any mode.

    Pictures that are larger than the canvas are scaled down with their boxes, smaller ones lie in
    its upper left corner.

    Args:
        name: of the source and the stage.
        ids: (N,) int64.
        raw: the boxes in pixels of the pictures.
        sizes: (N, 2) heights and widths of the pictures.
        class_names: names by class index.
        open_pictures: gives the pictures of rows, one after the other, the right way up.
        canvas: height and width to which pictures are fitted.
        enlarge: also scale smaller pictures up.
        flips: see `DetectionDataset`.
        bad_boxes: what to do with boxes that are no annotations, see `boxes.annotations_of`.

    Raises:
        DataError: no picture at all, or a box that is no annotation.
    """

    def __init__(
        self,
        name: str,
        ids: np.ndarray,
        raw: RawBoxes,
        sizes: np.ndarray,
        class_names: Sequence[str],
        open_pictures: Callable[[Sequence[int]], Iterator[Image]],
        canvas: tuple[int, int],
        enlarge: bool = False,
        flips: Flips = "horizontal",
        bad_boxes: BadBoxes = "refuse",
    ) -> None:
        if not len(ids):
            raise DataError(f"data set '{name}' has no images")
        self._open = open_pictures
        self._sizes = np.asarray(sizes, dtype=np.int64)
        extents = fit(self._sizes, canvas, enlarge)
        marks = annotations_of(raw, self._sizes, extents, bad_boxes, name)
        super().__init__(name, ids, marks, class_names, (3, *canvas), extents, flips)
        self._all_ids = self.ids

    def read(self, rows: np.ndarray) -> Tensor:
        """Decode, convert to RGB, scale, and put onto the canvas.

        Raises:
            DataError: a picture that cannot be decoded, is not of the size that its boxes were made
                for, or has more than 8 bits per channel.
        """
        decoded = torch.zeros((len(rows), *self.image_shape), dtype=torch.uint8)
        pictures = self._open(rows.tolist())
        for place, row in enumerate(rows):
            owner = f"image {self._all_ids[row]} of data set '{self.name}'"
            try:
                picture = next(pictures)
                deep = picture.mode.startswith(("I", "F"))
                picture = picture if deep else picture.convert("RGB")
            except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
                raise DataError(
                    f"{owner} cannot be decoded ({error}); replace or remove it"
                ) from error
            if deep:
                raise DataError(
                    f"{owner} has more than 8 bits per channel (mode {picture.mode}); convert it"
                )
            height, width = self._sizes[row].tolist()
            if picture.size != (width, height):
                raise DataError(
                    f"{owner} has {picture.size[0]}x{picture.size[1]} pixels, but its boxes were "
                    f"made for {width}x{height}; replace the picture or its annotations"
                )
            height, width = self._extents[row].tolist()
            if picture.size != (width, height):
                picture = picture.resize((width, height))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            decoded[place, :, :height, :width] = pixels
        return decoded


def orientation(picture: Image) -> int:
    """EXIF orientation of an opened picture, 1 (upright) to 8.

    A PNG that says it only after its pixels counts as upright: all of it would have to be decoded.
    """
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1
    found = int(picture.getexif().get(ORIENTATION, 1))
    return found if 1 <= found <= 8 else 1


def upright_size(picture: Image) -> tuple[int, int]:
    """Height and width of a picture that is held as its orientation says."""
    width, height = picture.size
    return (width, height) if orientation(picture) >= 5 else (height, width)


def upright(picture: Image) -> Image:
    """Turn a picture as its orientation says."""
    from PIL import ImageOps

    return picture if orientation(picture) == 1 else ImageOps.exif_transpose(picture)
