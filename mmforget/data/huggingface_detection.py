"""Object-detection data sets of the Hugging Face library: from the hub or from local files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mmforget.data.base import ImageDataset, View
from mmforget.data.boxes import BadBoxes, RawBoxes, canvas_of, check_bad_boxes, xyxy
from mmforget.data.detection import DetectionDataModule, Flips, MixedImages, check_flips
from mmforget.data.huggingface import (
    Opener,
    Table,
    check_data_files,
    checked_column,
    image_column,
    open_tables,
    source_name,
)
from mmforget.data.pictures import STAGE_IDS, check_fractions, complete
from mmforget.data.scene_pictures import ScenePictures, upright, upright_size
from mmforget.data.split import Stage
from mmforget.errors import DataError, suggest

if TYPE_CHECKING:
    from PIL.Image import Image

BoxFormat = Literal["coco", "pascal_voc"]

CROWD = "iscrowd"
"""Name of the field that marks boxes around crowds; data without it has none."""


class HuggingFaceDetection(DetectionDataModule):
    """Any object-detection data set that `datasets.load_dataset` opens.

    Every row has an image and its objects, either lists by field (``{"bbox": [...], "category":
    [...]}``) or a list of objects. Categories are class labels, or whole numbers or texts, which
    are numbered in sorted order over all splits. Pictures are turned as their EXIF orientation
    says, as `datasets` does it. Rows without objects are background and stay.

    Args:
        path: id on the hub, a folder, or the kind of the local files, such as ``parquet``.
        data_files: local files by split, for example ``{"train": "a.parquet"}``.
        image_column: column with the images; None takes the only one there is.
        objects_column: column with the objects.
        box_field: field of the objects with four numbers.
        category_field: field of the objects with the class.
        box_format: ``coco`` (left, top, width, height) or ``pascal_voc`` (left, top, right,
            bottom), in pixels.
        train_split: split to train on.
        val_split: split to validate on; None holds one out of the training data.
        test_split: split to test on; None holds one out of the training data.
        size, enlarge, flips, bad_boxes, val_fraction, test_fraction: see `CocoFolder`.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment,
            mixed_images: see `DetectionDataModule`.

    Sample ids are row numbers of the split, plus 10**9 for the split `val_split` and 2 * 10**9 for
    `test_split`.

    Raises:
        MissingFileError: a local file that does not exist, or an id that the hub does not give.
        DataError: a damaged file, an unknown split, column or field, or bad boxes.

    Example: ``HuggingFaceDetection("parquet", data_files={"train": "train.parquet", ...})``
    """

    def __init__(
        self,
        path: str = "parquet",
        data_files: Mapping[str, str] | None = None,
        image_column: str | None = None,
        objects_column: str = "objects",
        box_field: str = "bbox",
        category_field: str = "category",
        box_format: BoxFormat = "coco",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        size: int | tuple[int, int] | None = None,
        enlarge: bool = False,
        flips: Flips = "horizontal",
        bad_boxes: BadBoxes = "refuse",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
        mixed_images: MixedImages = "filter",
    ) -> None:
        super().__init__(
            batch_size,
            seed,
            num_workers,
            view,
            shots,
            missing_classes,
            retain_fraction,
            augment,
            mixed_images,
        )
        check_fractions(val_fraction, test_fraction)
        check_flips(flips)
        check_bad_boxes(bad_boxes)
        if size is not None:
            canvas_of(size, np.ones((1, 2)))
        if box_format not in get_args(BoxFormat):
            raise DataError(
                f"`box_format` is '{box_format}', {suggest(box_format, get_args(BoxFormat))}"
            )
        check_data_files(data_files)
        self.path = path
        self.data_files = None if data_files is None else dict(data_files)
        self.image_column, self.objects_column = image_column, objects_column
        self.fields = (box_field, category_field)
        self.box_format: BoxFormat = box_format
        self.splits: dict[Stage, str | None] = {
            "train": train_split,
            "val": val_split,
            "test": test_split,
        }
        self.size = size if size is None or isinstance(size, int) else tuple(size)
        self.enlarge = enlarge
        self.flips: Flips = flips
        self.bad_boxes: BadBoxes = bad_boxes
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def build(self) -> dict[Stage, ImageDataset]:
        """Open the splits; pictures are decoded when they are first asked for."""
        tables = open_tables(self.path, self.data_files, self.splits)
        openers = {
            stage: _UprightOpener(table, image_column(table, self.image_column))
            for stage, table in tables.items()
        }
        marks = {stage: self._marks(table, stage) for stage, table in tables.items()}
        labels, names = self._classes(tables["train"], marks)
        sizes = {stage: opener.sizes() for stage, opener in openers.items()}
        canvas = canvas_of(self.size, np.concatenate(list(sizes.values())))
        stages: dict[Stage, ImageDataset] = {}
        for stage, (image, boxes, _, crowd) in marks.items():
            split = self.splits[stage]
            corners = xyxy(boxes) if self.box_format == "coco" else boxes
            stages[stage] = ScenePictures(
                f"{source_name(self.path, self.data_files, split)}/{canvas[0]}x{canvas[1]}",
                STAGE_IDS[stage] + np.arange(len(tables[stage])),
                RawBoxes(image, corners, labels[stage], crowd, _Described(image, split)),
                sizes[stage],
                names,
                openers[stage],
                canvas,
                self.enlarge,
                self.flips,
                self.bad_boxes,
            )
        return complete(stages, self.val_fraction, self.test_fraction)

    def _marks(
        self, table: Table, stage: Stage
    ) -> tuple[np.ndarray, np.ndarray, list[Any], np.ndarray]:
        """Row (M,), four numbers (M, 4), category (M,) and crowd mark (M,) of every object."""
        column = checked_column(table, self.objects_column, "objects_column")
        box_field, category_field = self.fields
        known = _fields(table.features[column])
        for option, name in (("box_field", box_field), ("category_field", category_field)):
            if name not in known:
                remedy = suggest(name, known) if known else "name another `objects_column`"
                raise DataError(
                    f"`{option}` is '{name}', which the column '{column}' does not have; {remedy}"
                )
        images: list[int] = []
        boxes: list[Any] = []
        categories: list[Any] = []
        crowds: list[bool] = []
        for row, cell in enumerate(table[column][:]):
            lists = _by_field(cell, (box_field, category_field, CROWD))
            owner = f"row {row} of split '{self.splits[stage]}'"
            count = len(lists[box_field])
            if len(lists[category_field]) != count:
                raise DataError(
                    f"{owner} has {count} boxes, but {len(lists[category_field])} categories; "
                    "mend the data"
                )
            for number, box in enumerate(lists[box_field]):
                if box is None or len(box) != 4 or None in box:
                    raise DataError(
                        f"box {number} of {owner} is {box}; it must be four numbers, see "
                        "`box_format`"
                    )
            if None in lists[category_field]:
                raise DataError(f"{owner} has a box without a category; add or remove it")
            images += [row] * count
            boxes += lists[box_field]
            categories += lists[category_field]
            crowds += [bool(value) for value in lists[CROWD]] or [False] * count
        return (
            np.array(images, dtype=np.int64),
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            categories,
            np.array(crowds, dtype=bool),
        )

    def _classes(
        self,
        train: Table,
        marks: Mapping[Stage, tuple[np.ndarray, np.ndarray, list[Any], np.ndarray]],
    ) -> tuple[dict[Stage, np.ndarray], tuple[str, ...]]:
        """Class indices by stage, and class names."""
        import datasets

        kind = _fields(train.features[self.objects_column])[self.fields[1]]
        if isinstance(kind, datasets.ClassLabel):
            found = {stage: np.array(mark[2], dtype=np.int64) for stage, mark in marks.items()}
            return found, tuple(kind.names)
        distinct = sorted({value for mark in marks.values() for value in mark[2]})
        if not distinct:
            raise DataError(f"the column '{self.objects_column}' holds no objects at all")
        index = {value: number for number, value in enumerate(distinct)}
        labels = {
            stage: np.array([index[value] for value in mark[2]], dtype=np.int64)
            for stage, mark in marks.items()
        }
        return labels, tuple(str(value) for value in distinct)


def _fields(feature: Any) -> dict[str, Any]:
    """What an object consists of: kinds by name, whether it is a dict of lists or the reverse."""

    def inner(kind: Any) -> Any:
        return getattr(kind, "feature", kind)

    given = inner(feature)
    return {name: inner(kind) for name, kind in given.items()} if isinstance(given, dict) else {}


def _by_field(cell: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """The objects of one row as lists by field; empty where there are none."""
    if isinstance(cell, Mapping):
        return {name: list(cell.get(name) or ()) for name in names}
    objects = cell or ()
    return {name: [one[name] for one in objects if name in one] for name in names}


class _Described:
    """Names a box by its row and its number in that row."""

    def __init__(self, image: np.ndarray, split: str | None) -> None:
        self._image, self._split = image, split

    def __call__(self, box: int) -> str:
        row = int(self._image[box])
        number = box - int(np.flatnonzero(self._image == row)[0])
        return f"box {number} of row {row} of split '{self._split}'"


class _UprightOpener(Opener):
    """Opens the pictures of rows and turns them the right way up."""

    def sizes(self) -> np.ndarray:
        """(N, 2) heights and widths; only the heads of the files are decoded."""
        found: list[tuple[int, int]] = []
        count = len(self._table)
        for start in range(0, count, 256):  # so that few files are in memory at once
            rows = range(start, min(start + 256, count))
            found += [upright_size(picture) for picture in super().__call__(rows)]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    def __call__(self, rows: Sequence[int]) -> Iterator[Image]:
        """Yield one picture after the other."""
        for picture in super().__call__(rows):
            yield upright(picture)
