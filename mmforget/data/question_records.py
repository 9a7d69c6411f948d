"""Records of questions about pictures with their answers."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import unicodedata
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmforget.data import base
from mmforget.data.base import ImageDataset, Positions, augment
from mmforget.errors import AccessError, DataError

OTHER = "other"
"""The last class: records whose answer reveals no entity."""

TEXT = "text"
"""Kind of the questions about an entity that come without a picture of it."""


@dataclass(frozen=True)
class Records:
    """What N records ask, row by row.

    Attributes:
        pictures: keys of the pictures of a record; none for text only.
        question, answer: as they are given to a model.
        kind: what sort of question it is, for example ``name``, ``both``, ``harmless``, ``text``.
        wording: ``train`` or ``held_out``, or any other name of a way to put the question.
        subject: (N,) class index of the entity that is shown or asked about, whether or not the
            answer reveals it.
        style: of the answer, where it was changed (`mmforget.data.answer_styles`); None: nowhere.
    """

    pictures: Sequence[tuple[int, ...]]
    question: Sequence[str]
    answer: Sequence[str]
    kind: Sequence[str]
    wording: Sequence[str]
    subject: np.ndarray
    style: Sequence[str] | None = None


class _Kept(dict[int, Tensor]):
    """Pictures by key, and their size in bytes; all views of a data set share it."""

    size = 0


class QuestionDataset(ImageDataset):
    """Records of pictures, question and answer with stable ids. Subclasses implement `read_keys`.

    A batch has ``id`` (B,), ``weight`` (B,) and

    * ``images``: B lists of uint8 (3, h, w), of any size, empty for text only;
    * ``question``, ``answer``, ``question_kind``: B strings, and ``answer_style`` where answers
      were put in other styles;
    * ``label`` (B,) int64: index of the entity that the answer reveals, the last class for none.

    Pictures are read when they are first asked for; several records may show the same one, by its
    key. What has been read is kept, up to `CACHE_LIMIT_BYTES`, and shared by all subsets.

    Args:
        name: of the source and the stage, for messages and hashes.
        ids: (N,) int64, unique and stable.
        labels: (N,) int64 class indices.
        class_names: names of the entities, and the class `OTHER` as the last one.
        records: the N records.
        image_shape: (3, H, W) of every picture, (3, 0, 0) if they differ.
        flippable: whether a mirrored picture still has the same answers.

    Raises:
        DataError: ids that are not unique, labels out of range, columns of different lengths, an
            empty question or answer.
    """

    def __init__(
        self,
        name: str,
        ids: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        records: Records,
        image_shape: tuple[int, int, int] = (3, 0, 0),
        flippable: bool = False,
    ) -> None:
        super().__init__(name, ids, labels, class_names, (3, 0, 0), flippable)
        self.image_shape = image_shape
        self._pixels = self._known = None  # pictures are kept by key
        self._kept = _Kept()
        self.records = records
        self._kinds = np.asarray(records.kind, dtype=object)
        self._answered = True
        if not class_names or class_names[-1] != OTHER:
            raise DataError(f"data set '{name}' needs '{OTHER}' as its last class")
        for column in dataclasses.fields(records):
            entries = getattr(records, column.name)
            if entries is not None and len(entries) != len(self.ids):
                raise DataError(
                    f"data set '{name}' has {len(self.ids)} ids, but {len(entries)} entries of "
                    f"`{column.name}`"
                )
        for column_name in ("question", "answer"):
            empty = [not text.strip() for text in getattr(records, column_name)]
            if any(empty):
                raise DataError(
                    f"data set '{name}' has an empty {column_name} at id "
                    f"{self.ids[empty.index(True)]}; fill or remove it"
                )

    # ---- columns ----------------------------------------------------------------------------

    @property
    def questions(self) -> list[str]:
        """N questions."""
        return [self.records.question[row] for row in self._rows.tolist()]

    @property
    def answers(self) -> list[str]:
        """N true answers.

        Raises:
            AccessError: a view without labels.
        """
        if not self._answered:
            raise AccessError(f"data set '{self.name}' is a view without answers and labels")
        return [self.records.answer[row] for row in self._rows.tolist()]

    @property
    def kinds(self) -> np.ndarray:
        """(N,) strings: the kinds of the questions."""
        return np.asarray(self._kinds[self._rows])

    @property
    def wordings(self) -> np.ndarray:
        """(N,) strings: how the questions are put."""
        return np.array([self.records.wording[row] for row in self._rows.tolist()], dtype=object)

    @property
    def subjects(self) -> np.ndarray:
        """(N,) class index of the entity that is shown or asked about, revealed or not."""
        return np.asarray(self.records.subject[self._rows])

    @property
    def picture_keys(self) -> list[tuple[int, ...]]:
        """N tuples of keys; an empty one for text only."""
        return [self.records.pictures[row] for row in self._rows.tolist()]

    # ---- pictures ---------------------------------------------------------------------------

    @abstractmethod
    def read_keys(self, keys: Sequence[int]) -> list[Tensor]:
        """Decode pictures: uint8 (3, h, w) for every key."""

    def digests(self, keys: Sequence[int]) -> list[str]:
        """What tells equal pictures: by default a hash of their pixels."""
        return [
            hashlib.sha256(repr(tuple(one.shape)).encode() + one.numpy().tobytes()).hexdigest()
            for one in self._load(keys)
        ]

    def _load(self, keys: Sequence[int]) -> list[Tensor]:
        new = list(dict.fromkeys(key for key in keys if key not in self._kept))
        found = dict(zip(new, self.read_keys(new) if new else (), strict=True))
        result = [found[key] if key in found else self._kept[key] for key in keys]
        size = self._kept.size + sum(one.numel() for one in found.values())
        if size <= base.CACHE_LIMIT_BYTES:
            self._kept.update(found)
            self._kept.size = size
        return result

    def pictures(self, positions: np.ndarray | Sequence[int]) -> list[list[Tensor]]:
        """Pictures of records, uint8 (3, h, w) each, without any transform."""
        rows = self._rows[np.asarray(positions, np.int64)].tolist()
        keys = [self.records.pictures[row] for row in rows]
        flat = iter(self._load([key for group in keys for key in group]))
        return [[next(flat) for _ in group] for group in keys]

    def read(self, rows: np.ndarray) -> Tensor:
        """Stack the pictures of records that have one each, all of the same size.

        Raises:
            DataError: a record without picture or with several, or pictures of different sizes.
        """
        groups = [self._load(self.records.pictures[row]) for row in rows.tolist()]
        shapes = {tuple(one.shape) for group in groups for one in group}
        if any(len(group) != 1 for group in groups) or len(shapes) != 1:
            raise DataError(
                f"data set '{self.name}' has records without picture, with several or with "
                "pictures of different sizes, which make no one tensor; use `pictures`"
            )
        return torch.stack([group[0] for group in groups])

    # ---- batches and views ------------------------------------------------------------------

    def __getitem__(self, positions: int | Sequence[int]) -> dict[str, Any]:
        """Return one record for an integer, or a whole batch for a sequence.

        A negative position ``~p`` gives record p as padding, with weight 0.
        """
        if isinstance(positions, int | np.integer):
            return {key: value[0] for key, value in self[[int(positions)]].items()}
        given = np.asarray(positions, dtype=np.int64)
        index = np.where(given < 0, ~given, given)
        images = self.pictures(index)
        if self._augment_seed is not None:
            draw = positions.draw if isinstance(positions, Positions) else (0, 0)
            images = [
                [self._transformed(one, id_, draw) for one in group]
                for group, id_ in zip(images, self.ids[index], strict=True)
            ]
        rows: list[int] = self._rows[index].tolist()
        batch: dict[str, Any] = {
            "id": torch.from_numpy(self.ids[index]),
            "weight": torch.from_numpy((given >= 0).astype(np.float32)),
            "images": images,
            "question": [self.records.question[row] for row in rows],
            "question_kind": [self.records.kind[row] for row in rows],
        }
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[index])
        if self._answered:
            batch["answer"] = [self.records.answer[row] for row in rows]
        if self.records.style is not None:
            batch["answer_style"] = [self.records.style[row] for row in rows]
        if self.forget is not None:
            batch["forget"] = torch.from_numpy(self.forget[index])
        return batch

    def _transformed(self, picture: Tensor, id_: int, draw: tuple[int, int]) -> Tensor:
        assert self._augment_seed is not None  # the caller has looked
        ids = np.array([id_], dtype=np.int64)
        moved = augment(picture[None].float(), ids, self._augment_seed, draw, self.flippable)
        return moved[0].to(torch.uint8)

    def unlabelled(self) -> Self:
        """Return a view whose batches have neither ``label`` nor ``answer``."""
        view = super().unlabelled()
        view._answered = False
        return view

    def with_records(self, records: Records) -> Self:
        """Return a view of the same pictures with other texts, one record per row of this view."""
        view = copy.copy(self)
        view.records = records
        view._kinds = np.asarray(records.kind, dtype=object)
        view._rows = np.arange(len(self.ids))
        return view

    @property
    def hash(self) -> str:
        """SHA-256 over name, classes, ids, labels, questions, answers, kinds and picture keys."""
        digest = hashlib.sha256(super().hash.encode())
        records = self.records
        for row in self._rows.tolist():
            answer = records.answer[row] if self._answered else ""
            text = (records.question[row], answer, records.kind[row], records.wording[row])
            digest.update(repr((text, records.pictures[row])).encode())
        digest.update(self.subjects.astype("<i8").tobytes())
        return digest.hexdigest()


def normalised(text: str) -> str:
    """A question or answer without capitals, punctuation and doubled blanks."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


@dataclass(frozen=True)
class Overlap:
    """How much the forget and the retain set of the training data have in common.

    Attributes:
        pairs: records of the forget set whose pictures and question are also in the retain set.
        copies: pictures of the forget set that are also in the retain set, as a file of their own.
    """

    pairs: int
    copies: int


def overlap_of(forget: QuestionDataset, retain: QuestionDataset) -> Overlap:
    """Compare two sets; equal pictures are told by `QuestionDataset.digests`."""
    digests: dict[int, str] = {}
    for data in (forget, retain):
        keys = sorted({key for group in data.picture_keys for key in group} - digests.keys())
        digests.update(zip(keys, data.digests(keys), strict=True))
    clean: dict[str, str] = {}

    def asked(data: QuestionDataset) -> list[tuple[tuple[str, ...], str]]:
        return [
            (
                tuple(digests[key] for key in group),
                clean.setdefault(question, normalised(question)),
            )
            for group, question in zip(data.picture_keys, data.questions, strict=True)
        ]

    known = set(asked(retain))
    keys_of: dict[str, set[int]] = defaultdict(set)
    for group in retain.picture_keys:
        for key in group:
            keys_of[digests[key]].add(key)
    copies = sum(
        bool(keys_of.get(digests[key], {key}) - {key})
        for key in {key for group in forget.picture_keys for key in group}
    )
    return Overlap(sum(one in known for one in asked(forget)), copies)
