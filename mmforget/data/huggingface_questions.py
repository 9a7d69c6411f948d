"""Questions about pictures in data sets of the Hugging Face library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmforget.data.base import ImageDataset, View
from mmforget.data.huggingface import check_data_files, checked_column, open_tables, source_name
from mmforget.data.pictures import STAGE_IDS, check_fractions
from mmforget.data.question_files import stages_of
from mmforget.data.question_rows import Row, checked_row, refuse
from mmforget.data.questions import QuestionDataModule, RetainQuestions
from mmforget.data.split import Stage
from mmforget.errors import DataError


class HuggingFaceQuestions(QuestionDataModule):
    """Questions about pictures in any data set that `datasets.load_dataset` opens.

    Args:
        path: id on the hub, or the kind of the local files, such as ``parquet``.
        data_files: local files by split, for example ``{"train": "a.parquet"}``.
        image_columns: columns with a picture or a list of pictures each; empty cells are text only.
        question_column, answer_column: columns with texts.
        class_column: column with the name of the entity that the answer reveals, empty for none;
            None: no record reveals anybody, and only single records can be forgotten.
        kind_column: column with the kind of question; None derives it as `QuestionFolder` does.
        train_split: split to train on.
        val_split: split to validate on; None holds one out of the training data.
        test_split: split to test on; None holds one out of the training data.
        flippable, val_fraction, test_fraction: see `mmforget.data.question_files.QuestionFolder`.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment,
            forget_questions, forget_text, retain_questions, decouple_size: see
            `QuestionDataModule`.

    Record ids are row numbers of the split, plus 10**9 for the split `val_split` and 2 * 10**9 for
    `test_split`. The files of all pictures, not decoded, are held in memory.

    Raises:
        MissingFileError: a local file that does not exist, or an id that the hub does not give.
        DataError: a damaged file, an unknown split or column, an empty question or answer.

    Example: ``HuggingFaceQuestions("parquet", data_files={"train": "train.parquet"})``
    """

    def __init__(
        self,
        path: str = "parquet",
        data_files: Mapping[str, str] | None = None,
        image_columns: Sequence[str] = ("image",),
        question_column: str = "question",
        answer_column: str = "answer",
        class_column: str | None = "class",
        kind_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = "test",
        flippable: bool = False,
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
        forget_questions: Sequence[str] = ("name",),
        forget_text: bool = False,
        retain_questions: RetainQuestions = "all",
        decouple_size: int | None = None,
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
            forget_questions,
            forget_text,
            retain_questions,
            decouple_size,
        )
        check_fractions(val_fraction, test_fraction)
        check_data_files(data_files)
        self.path = path
        self.data_files = None if data_files is None else dict(data_files)
        self.image_columns = tuple(image_columns)
        self.columns = {
            "question": question_column,
            "answer": answer_column,
            "class": class_column,
            "kind": kind_column,
        }
        self.splits: dict[Stage, str | None] = {
            "train": train_split,
            "val": val_split,
            "test": test_split,
        }
        self.flippable = flippable
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def build(self) -> dict[Stage, ImageDataset]:
        """Open the splits; pictures are decoded when they are first asked for."""
        problems: list[str] = []
        rows: list[Row] = []
        sources: dict[str, Path | bytes] = {}
        for stage, table in open_tables(self.path, self.data_files, self.splits).items():
            for name, column in self.columns.items():
                if column is not None:
                    checked_column(table, column, f"{name}_column")
            cells = {n: _names(table, c) for n, c in self.columns.items() if c is not None}
            shown = self._encoded(table)
            for number in range(len(table)):
                keys = [_key(one) for one in shown[number]]
                sources.update(zip(keys, shown[number], strict=True))
                content = {n: column[number] for n, column in cells.items()}
                content["id"] = STAGE_IDS[stage] + number
                place = f"row {number} of split '{self.splits[stage]}'"
                row = checked_row(content | {"images": []}, place, stage, True, problems, keys)
                if row is not None:
                    rows.append(row)
        refuse(problems)
        name = source_name(self.path, self.data_files, "all")
        fractions = (self.val_fraction, self.test_fraction)
        return stages_of(name, rows, sources, self.flippable, fractions)

    def _encoded(self, table: Any) -> list[list[Path | bytes]]:
        """The files of the pictures of every row, not yet decoded."""
        import datasets

        found: list[list[Path | bytes]] = [[] for _ in range(len(table))]
        raw = datasets.Image(decode=False)
        for column in self.image_columns:
            checked_column(table, column, "image_columns")
            kind = table.features[column]
            single = isinstance(kind, datasets.Image)
            if not single and not isinstance(getattr(kind, "feature", None), datasets.Image):
                raise DataError(
                    f"`image_columns` names '{column}', which holds {kind} instead of images; "
                    "name a column of images or of lists of images"
                )
            part = table.select_columns([column])
            part = part.cast_column(column, raw if single else datasets.List(raw))
            for number, cell in enumerate(part[column][:]):
                for one in [cell] if single else cell or ():
                    if one is not None:
                        found[number].append(one["bytes"] or Path(one["path"]))
        return found


def _key(source: Path | bytes) -> str:
    """What names a picture: rows that hold the same file share it."""
    return str(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()


def _names(table: Any, column: str) -> list[Any]:
    """A column of texts; indices of classes become their names."""
    kind = table.features[column]
    names = getattr(kind, "names", None)
    values = list(table[column][:])
    if names is None:
        return values
    return [None if value is None else names[value] for value in values]
