"""Questions about pictures from a file of JSON lines, and pictures in a folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ImageDataset, View
from mmforget.data.pictures import check_fractions, complete
from mmforget.data.question_records import OTHER, QuestionDataset, Records
from mmforget.data.question_rows import Row, check_ids, checked_row, objects_of, refuse
from mmforget.data.questions import QuestionDataModule, RetainQuestions
from mmforget.data.scene_pictures import upright
from mmforget.data.split import STAGES, Stage
from mmforget.errors import DataError, MissingFileError, suggest


class FileQuestions(QuestionDataset):
    """Records whose pictures are decoded when they are first asked for.

    Args:
        name, ids, labels, class_names, records: see `QuestionDataset`.
        sources: by key, a file or the bytes of one.
        owners: by key, what holds the picture, for messages.
        flippable: whether a mirrored picture still has the same answers.
    """

    def __init__(
        self,
        name: str,
        ids: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        records: Records,
        sources: Sequence[Path | bytes],
        owners: Sequence[str],
        flippable: bool,
    ) -> None:
        super().__init__(name, ids, labels, class_names, records, flippable=flippable)
        self._sources, self._owners = sources, owners

    def read_keys(self, keys: Sequence[int]) -> list[Tensor]:
        """Decode, turn upright and convert to RGB.

        Raises:
            DataError: a picture that cannot be decoded.
        """
        return [self._read(key) for key in keys]

    def _read(self, key: int) -> Tensor:
        from PIL import Image as Pictures

        source = self._sources[key]
        try:
            with Pictures.open(io.BytesIO(source) if isinstance(source, bytes) else source) as one:
                pixels = np.array(upright(one).convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
            raise DataError(
                f"{self._owners[key]}: the picture cannot be decoded ({error}); replace or "
                "remove it"
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class QuestionFolder(QuestionDataModule):
    """Questions from a file of JSON lines, or one JSON list, and pictures in a folder.

    Every record is an object with

    * ``question`` and ``answer``, texts;
    * ``images``: a path below `folder` or a list of them; none for text only;
    * ``class``: name of the entity that the answer reveals; none for questions that reveal nobody;
    * ``subject``: name of the entity that is shown or asked about; by default the class;
    * ``kind``: by default ``name`` for a record with pictures and class, ``text`` for one with a
      class only, and ``harmless`` for one without class;
    * ``wording``: ``train`` by default, or ``held_out`` for a way to ask that training never uses;
    * ``split``: ``train`` (by default), ``val`` or ``test``;
    * ``id``: a whole number or a text, by default the place in the file.

    Args:
        folder: where the file and the pictures are.
        file: name of the file, or one by stage, such as ``{"train": "train.jsonl", ...}``, whose
            records then need no ``split``.
        flippable: whether a mirrored picture still has the same answers; used by `augment`.
        val_fraction: expected share of the training records that is held out where no record is for
            validation, by a hash of the id.
        test_fraction: the same for test.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment,
            forget_questions, forget_text, retain_questions, decouple_size: see
            `QuestionDataModule`.

    Raises:
        MissingFileError: a folder or file that does not exist.
        DataError: a damaged file, or records that contradict the above; every line of the message
            names the file, the line, the field and the remedy.

    Example: ``QuestionFolder("faces", file="questions.jsonl")``
    """

    def __init__(
        self,
        folder: str,
        file: str | dict[str, str] = "questions.jsonl",
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
        if not Path(folder).is_dir():
            raise MissingFileError(f"`folder` is '{folder}', which does not exist; check the path")
        self.folder = Path(folder)
        given = {"train": file} if isinstance(file, str) else file
        for stage, name in given.items():
            if stage not in STAGES:
                raise DataError(f"`file` names the stage '{stage}', {suggest(stage, STAGES)}")
            if not (self.folder / name).is_file():
                raise MissingFileError(
                    f"`file` is '{self.folder / name}', which does not exist; check the path"
                )
        if "train" not in given:
            raise DataError("`file` names no file for the stage 'train'; add it")
        self.by_stage = not isinstance(file, str)
        self.files: dict[Stage, str] = {s: given[s] for s in STAGES if s in given}
        self.flippable = flippable
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def build(self) -> dict[Stage, ImageDataset]:
        """Read and check the records; pictures are decoded when they are first asked for."""
        problems: list[str] = []
        rows = []
        for stage, name in self.files.items():
            for place, content in objects_of(self.folder / name):
                row = checked_row(content, place, stage, self.by_stage, problems)
                if row is not None:
                    rows.append(row)
        for row in rows:
            for image in row.images:
                if not (self.folder / image).is_file():
                    problems.append(
                        f"{row.place}: `images` names '{image}', which is not in '{self.folder}'; "
                        "add the file or correct the path"
                    )
        check_ids(rows, problems)
        refuse(problems)
        return stages_of(
            self.folder.name,
            rows,
            {image: self.folder / image for row in rows for image in row.images},
            self.flippable,
            (self.val_fraction, self.test_fraction),
        )


def stages_of(
    name: str,
    rows: Sequence[Row],
    sources: Mapping[Any, Path | bytes],
    flippable: bool,
    fractions: tuple[float, float],
) -> dict[Stage, ImageDataset]:
    """One data set per stage that has records; missing ones are held out of training."""
    keys = {image: key for key, image in enumerate(sources)}
    owner: dict[Any, str] = {}
    for row in rows:
        for image in row.images:
            owner.setdefault(image, f"{row.place}, `images` '{image}'")
    entities = sorted({one for row in rows for one in (row.entity, row.subject) if one is not None})
    index = {entity: number for number, entity in enumerate(entities)}
    stages: dict[Stage, ImageDataset] = {}
    for stage in STAGES:
        part = [row for row in rows if row.stage == stage]
        if not part:
            continue
        stages[stage] = FileQuestions(
            f"{name}/{stage}",
            np.array([row.id for row in part], dtype=np.int64),
            _indices([row.entity for row in part], index),
            (*entities, OTHER),
            Records(
                [tuple(keys[image] for image in row.images) for row in part],
                [row.question for row in part],
                [row.answer for row in part],
                [row.kind for row in part],
                [row.wording for row in part],
                _indices([row.subject for row in part], index),
            ),
            list(sources.values()),
            [owner.get(image, "") for image in sources],
            flippable,
        )
    if "train" not in stages:
        raise DataError(f"'{name}' has no record for training; give some the `split` 'train'")
    return complete(stages, *fractions)


def _indices(names: Sequence[str | None], index: Mapping[str, int]) -> np.ndarray:
    found = [len(index) if name is None else index[name] for name in names]
    return np.array(found, dtype=np.int64)
