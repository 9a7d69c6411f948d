"""Images that a library decodes one by one, and stages that are held out of the training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ImageDataset
from mmforget.data.hashing import uniform
from mmforget.data.split import Stage
from mmforget.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

STAGE_IDS: dict[Stage, int] = {"train": 0, "val": 10**9, "test": 2 * 10**9}
"""First sample id of the own splits of sources that number their rows from 0."""


class PictureDataset(ImageDataset):
    """Labelled pictures that are opened one at a time, in any mode.

    Args:
        name: of the source and the stage.
        ids: (N,) int64.
        labels: (N,) int64 class indices, or None.
        class_names: names by class index.
        open_pictures: gives the pictures of rows, one after the other.
        image_size: side of the square to which every picture is cropped around its centre and
            resized; None keeps the size of the first picture, which all others must share.

    Raises:
        DataError: no picture at all, or one that cannot be decoded.
    """

    def __init__(
        self,
        name: str,
        ids: np.ndarray,
        labels: np.ndarray | None,
        class_names: Sequence[str],
        open_pictures: Callable[[Sequence[int]], Iterator[Image]],
        image_size: int | None,
    ) -> None:
        if not len(ids):
            raise DataError(f"data set '{name}' has no images")
        if image_size is not None and image_size < 1:
            raise DataError(f"`image_size` is {image_size}, it must be at least 1 or left out")
        self._open = open_pictures
        self._size = image_size
        width, height = (image_size, image_size) if image_size else next(open_pictures([0])).size
        super().__init__(name, ids, labels, class_names, (3, height, width))

    def read(self, rows: np.ndarray) -> Tensor:
        """Decode, convert to RGB, and resize.

        Raises:
            DataError: a picture that cannot be decoded, or is of another size than the first.
        """
        decoded = torch.empty((len(rows), *self.image_shape), dtype=torch.uint8)
        pictures = self._open(rows.tolist())
        for place, row in enumerate(rows):
            try:
                picture = next(pictures).convert("RGB")
            except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
                raise DataError(
                    f"image {row} of data set '{self.name}' cannot be decoded ({error}); "
                    "replace or remove it"
                ) from error
            decoded[place] = self._fit(picture, row)
        return decoded

    def _fit(self, picture: Image, row: int) -> Tensor:
        from PIL import ImageOps

        height, width = self.image_shape[1:]
        if self._size is not None and picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height))
        if picture.size != (width, height):
            raise DataError(
                f"image {row} of data set '{self.name}' has size {picture.size[0]}x"
                f"{picture.size[1]}, the first one {width}x{height}; set `image_size`"
            )
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def check_fractions(val_fraction: float, test_fraction: float = 0.0) -> None:
    """Refuse held-out shares that leave nothing to train on.

    Raises:
        DataError: a share out of range.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise DataError(f"`{name}` is {value}, it must be at least 0 and below 1")
    if val_fraction + test_fraction >= 1:
        raise DataError(
            f"`val_fraction` ({val_fraction}) and `test_fraction` ({test_fraction}) leave no "
            "training data; lower one"
        )


def complete(
    stages: Mapping[Stage, ImageDataset], val_fraction: float, test_fraction: float
) -> dict[Stage, ImageDataset]:
    """Hold the missing stages out of the training data, fixed by a hash of the id.

    Neither the seed of a run nor other samples matter: what was held out once stays held out.

    Args:
        stages: at least ``train``; stages that are there are left as they are.
        val_fraction: expected share of the training data for a missing validation stage.
        test_fraction: the same for a missing test stage.

    Raises:
        DataError: a share so small that the stage would be empty.
    """
    train = stages["train"]
    number = uniform(train.ids, 0, "hold-out")
    taken = np.zeros(len(train), dtype=bool)
    found = dict(stages)
    start = 0.0
    shares: tuple[tuple[Stage, float], ...] = (("test", test_fraction), ("val", val_fraction))
    for stage, share in shares:
        if stage in stages:
            continue
        chosen = (start <= number) & (number < start + share)
        if not chosen.any():
            raise DataError(
                f"data set '{train.name}' has no stage '{stage}' and `{stage}_fraction` {share} of "
                f"its {len(train)} images holds none out; raise it"
            )
        found[stage] = train.subset(np.flatnonzero(chosen))
        taken |= chosen
        start += share
    found["train"] = train.subset(np.flatnonzero(~taken))
    if not len(found["train"]):
        raise DataError(f"data set '{train.name}' has no training images left; hold out fewer")
    return found
