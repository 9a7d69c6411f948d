"""Image data sets of the Hugging Face library: from the hub or from local files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmforget.data.base import ForgetDataModule, ImageDataset, View
from mmforget.data.pictures import STAGE_IDS, PictureDataset, check_fractions, complete
from mmforget.data.split import Stage
from mmforget.errors import DataError, MissingFileError, suggest

if TYPE_CHECKING:
    from PIL.Image import Image

# A `datasets.Dataset`. Not imported for type checkers either: jsonargparse follows such imports,
# and this one would add five seconds to the start of every command.
Table = Any


class HuggingFaceData(ForgetDataModule):
    """Any labelled image data set that `datasets.load_dataset` opens.

    Args:
        path: id on the hub, or the kind of the local files, such as ``parquet``.
        data_files: local files by split, for example ``{"train": "a.parquet"}``.
        image_column: column with the images; None takes the only one there is.
        label_column: column with class names or indices; None for data without labels.
        train_split: split to train on.
        val_split: split to validate on; None holds one out of the training data.
        test_split: split to test on; None holds one out of the training data.
        val_fraction: expected share of the training data that is held out for validation.
        test_fraction: the same for a missing test split.
        image_size: side of the square to which images are cropped and resized; None if all have
            the same size.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment: see
            `ForgetDataModule`.

    Sample ids are row numbers of the split, plus 10**9 for the split `val_split` and 2 * 10**9 for
    `test_split`.

    Raises:
        MissingFileError: a local file that does not exist, or an id that the hub does not give.
        DataError: a damaged file, an unknown split or column, labels that do not fit.

    Example: ``HuggingFaceData("parquet", data_files={"train": "train.parquet", ...})``
    """

    def __init__(
        self,
        path: str = "parquet",
        data_files: Mapping[str, str] | None = None,
        image_column: str | None = None,
        label_column: str | None = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        image_size: int | None = None,
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
        check_data_files(data_files)
        self.path = path
        self.data_files = None if data_files is None else dict(data_files)
        self.image_column = image_column
        self.label_column = label_column
        self.splits: dict[Stage, str | None] = {
            "train": train_split,
            "val": val_split,
            "test": test_split,
        }
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.image_size = image_size

    def build(self) -> dict[Stage, ImageDataset]:
        """Open the splits; images are decoded when they are first asked for."""
        tables = open_tables(self.path, self.data_files, self.splits)
        labels, names = self._labels(tables)
        stages = {
            stage: self._stage_of(stage, table, labels, names) for stage, table in tables.items()
        }
        return complete(stages, self.val_fraction, self.test_fraction)

    def _stage_of(
        self,
        stage: Stage,
        table: Table,
        labels: dict[Stage, np.ndarray],
        names: tuple[str, ...],
    ) -> ImageDataset:
        return PictureDataset(
            source_name(self.path, self.data_files, self.splits[stage]),
            STAGE_IDS[stage] + np.arange(len(table)),
            labels.get(stage),
            names,
            Opener(table, image_column(table, self.image_column)),
            self.image_size,
        )

    def _labels(
        self, tables: dict[Stage, Table]
    ) -> tuple[dict[Stage, np.ndarray], tuple[str, ...]]:
        """Class indices by stage, and class names; a plain column is numbered in sorted order."""
        import datasets

        if self.label_column is None:
            return {}, ()
        column = checked_column(tables["train"], self.label_column, "label_column")
        values = {
            stage: np.asarray(table[checked_column(table, column, "label_column")][:])
            for stage, table in tables.items()
        }
        feature = tables["train"].features[column]
        if isinstance(feature, datasets.ClassLabel):
            return values, tuple(feature.names)
        distinct, joined = np.unique(np.concatenate(list(values.values())), return_inverse=True)
        ends = np.cumsum([len(value) for value in values.values()])[:-1]
        indices = dict(zip(values, np.split(joined, ends), strict=True))
        return indices, tuple(str(value) for value in distinct)


def check_data_files(data_files: Mapping[str, str] | None) -> None:
    """Refuse local files that do not exist; patterns and addresses pass.

    Raises:
        MissingFileError: there is no such file.
    """
    for split, file in (data_files or {}).items():
        if "*" not in file and "://" not in file and not Path(file).is_file():
            raise MissingFileError(
                f"`data_files.{split}` is '{file}', which does not exist; check the path"
            )


def open_tables(
    path: str, data_files: Mapping[str, str] | None, splits: Mapping[Stage, str | None]
) -> dict[Stage, Table]:
    """Open a data set and return the table of every stage that has a split.

    Raises:
        MissingFileError: the hub does not give it.
        DataError: a damaged file or an unknown split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(path, data_files=data_files)
    except (FileNotFoundError, ConnectionError) as error:
        raise MissingFileError(
            f"`path` '{path}' cannot be loaded ({error}); check the id and the network, "
            "or give local files as `data_files`"
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(
            f"`path` '{path}' with `data_files` {data_files} cannot be read "
            f"({error}); check that the files are whole and of this kind"
        ) from error
    tables: dict[Stage, Table] = {}
    for stage, split in splits.items():
        if split is not None:
            if split not in loaded:
                raise DataError(
                    f"`{stage}_split` is '{split}', {suggest(split, loaded)} "
                    "(for val and test, null holds one out of the training data)"
                )
            tables[stage] = loaded[split]
    return tables


def source_name(path: str, data_files: Mapping[str, str] | None, split: str | None) -> str:
    """Name of a split for messages and hashes: it says nothing of folders."""
    source = "+".join(sorted(Path(file).name for file in (data_files or {}).values()))
    return f"{path}/{source}/{split}"


def image_column(table: Table, column: str | None) -> str:
    """Check the column with the images; None finds the only one there is.

    Raises:
        DataError: no such column, it holds no images, or there are several.
    """
    import datasets

    kinds = table.features
    pictures = [name for name in kinds if isinstance(kinds[name], datasets.Image)]
    if column is None:
        if len(pictures) != 1:
            raise DataError(
                f"the data has {len(pictures)} image columns ({', '.join(pictures)}) among "
                f"{', '.join(kinds)}; name one in `image_column`"
            )
        return pictures[0]
    checked_column(table, column, "image_column")
    if column not in pictures:
        raise DataError(
            f"`image_column` is '{column}', which holds {kinds[column]} instead of images, "
            f"{suggest(column, pictures)}"
        )
    return column


def checked_column(table: Table, column: str, option: str) -> str:
    """Refuse a column that is not there.

    Raises:
        DataError: as said.
    """
    if column not in table.column_names:
        raise DataError(f"`{option}` is '{column}', {suggest(column, table.column_names)}")
    return column


class Opener:
    """Opens the pictures of rows; a class, so that loader workers can be sent it."""

    def __init__(self, table: Table, column: str) -> None:
        import datasets

        self._table = table.select_columns([column]).cast_column(
            column, datasets.Image(decode=False)
        )
        self._column = column

    def __call__(self, rows: Sequence[int]) -> Iterator[Image]:
        """Yield one picture after the other, not yet decoded."""
        from PIL import Image

        cells: list[dict[str, Any]] = self._table[list(rows)][self._column]
        for cell in cells:
            yield Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])
