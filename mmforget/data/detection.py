"""Images with labelled boxes, and the data module that filters the boxes by role."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ForgetDataModule, ImageDataset, Positions, View
from mmforget.data.hashing import uniform
from mmforget.data.split import STAGES, ForgetSplit, Labelled, Role, Stage, holding
from mmforget.errors import DataError, suggest
from mmforget.request import ForgetRequest

logger = logging.getLogger(__name__)

PADDING = -1
"""Label of the rows that fill up the boxes of an image."""

Flips = Literal["none", "horizontal", "both"]
MixedImages = Literal["filter", "forget"]


@dataclass(frozen=True)
class Annotations:
    """The boxes of N images, one after the other.

    Attributes:
        boxes: (M, 4) float32, left, top, right, bottom in pixels of the canvas.
        labels: (M,) int64 class indices.
        crowd: (M,) bool: the box holds a crowd, which is neither trained on nor counted as missed.
        starts: (N + 1,) int64; image i owns the rows ``starts[i]`` to ``starts[i + 1]``.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, images: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Annotations:
        """Put together (boxes, labels, crowd) of single images."""
        counts = [len(labels) for _, labels, _ in images]
        return cls(
            np.concatenate([np.zeros((0, 4)), *(one[0] for one in images)]).astype(np.float32),
            np.concatenate([np.zeros(0), *(one[1] for one in images)]).astype(np.int64),
            np.concatenate([np.zeros(0), *(one[2] for one in images)]).astype(bool),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        )

    def presence(self, num_classes: int, crowds: bool = False) -> np.ndarray:
        """(N, C) bool: which classes an image holds, with or without its crowds."""
        images = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        chosen = ~self.crowd | crowds
        found = np.zeros((len(self.starts) - 1, num_classes), dtype=bool)
        found[images[chosen], self.labels[chosen]] = True
        return found


class DetectionDataset(ImageDataset):
    """Images on a common canvas with the boxes of their objects. Subclasses implement `read`.

    Smaller images lie in the upper left corner of the canvas; the rest is black, and ``extent``
    says where the picture ends. A batch has, besides ``image``, ``id`` and ``weight``:

    * ``boxes`` (B, K, 4) float32: left, top, right, bottom in pixels;
    * ``label`` (B, K) int64: class indices, -1 for rows without a box;
    * ``crowd`` (B, K) bool: boxes around crowds, which are neither trained on nor missed;
    * ``extent`` (B, 2) int64: height and width of the picture within the canvas.

    K is the largest number of boxes in one image of the stage.

    Args:
        name: of the source and the stage, for messages and hashes.
        ids: (N,) int64, unique and stable.
        annotations: the boxes.
        class_names: names by class index.
        image_shape: (3, H, W) of the canvas.
        extents: (N, 2) height and width of the pictures; None if all fill the canvas.
        flips: mirror images that are still examples of their classes; used for augmentation.

    Raises:
        DataError: ids that are not unique, labels out of range, or boxes that are empty, not finite
            or outside of their picture.
    """

    def __init__(
        self,
        name: str,
        ids: np.ndarray,
        annotations: Annotations,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        extents: np.ndarray | None = None,
        flips: Flips = "horizontal",
    ) -> None:
        super().__init__(name, ids, None, class_names, image_shape, flips != "none")
        self.annotations = annotations
        self.flips: Flips = flips
        if extents is None:
            extents = np.tile(np.array(image_shape[1:], dtype=np.int64), (len(self.ids), 1))
        self._extents = np.asarray(extents, dtype=np.int64)
        self._check()
        self.max_objects = max(1, int(np.diff(annotations.starts).max(initial=0)))
        self._presence = annotations.presence(len(self.class_names))
        # one row per image: the classes whose boxes are given out
        self._shown = np.ones((len(self.ids), len(self.class_names)), dtype=bool)
        self._annotated = True

    def _check(self) -> None:
        marks = self.annotations
        wrong = (marks.labels < 0) | (marks.labels >= len(self.class_names))
        if wrong.any():
            raise DataError(
                f"data set '{self.name}' has the class index {marks.labels[wrong][0]}, but "
                f"{len(self.class_names)} classes"
            )
        images = np.repeat(np.arange(len(self.ids)), np.diff(marks.starts))
        left, top, right, bottom = marks.boxes.T
        height, width = self._extents[images].T
        good = (left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)
        good &= (left < right) & (top < bottom)  # false for NaN
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise DataError(
                f"data set '{self.name}' has {int((~good).sum())} boxes that are empty or leave "
                f"their picture, first {marks.boxes[row].tolist()} of class "
                f"'{self.class_names[marks.labels[row]]}' in image {self.ids[images[row]]} of "
                f"{width[row]}x{height[row]} pixels; mend or remove them"
            )

    @property
    def classes(self) -> np.ndarray | None:
        """(N, C) bool: the classes that an image holds, shown or not; crowds are not counted.

        None in a view without labels.
        """
        return self.presence if self._annotated else None

    @property
    def presence(self) -> np.ndarray:
        """(N, C) bool: as `classes`, in any view."""
        return np.asarray(self._presence[self._rows])

    @property
    def seen(self) -> np.ndarray:
        """(N, C) bool: the classes that can be seen in an image, shown or not, crowds included."""
        return self.annotations.presence(len(self.class_names), crowds=True)[self._rows]

    def showing(self, classes: Sequence[int] | np.ndarray) -> Self:
        """Return a view that gives out only the boxes of some classes.

        Args:
            classes: indices, or (N, C) bool with a choice of its own for every image.
        """
        view = copy.copy(self)
        if isinstance(classes, np.ndarray) and classes.ndim == 2:
            view._shown = self._shown & classes
        else:
            chosen = np.zeros(len(self.class_names), dtype=bool)
            chosen[list(classes)] = True
            view._shown = self._shown & chosen
        return view

    def subset(self, positions: np.ndarray) -> Self:
        """Return a view of some images, in the given order; pixels are shared."""
        view = super().subset(positions)
        view._shown = self._shown[np.asarray(positions)]
        return view

    def unlabelled(self) -> Self:
        """Return a view whose batches have neither boxes nor labels."""
        view = copy.copy(self)
        view._annotated = False
        return view

    def extents(self, positions: np.ndarray) -> np.ndarray:
        """(B, 2) height and width of the pictures within the canvas."""
        return np.asarray(self._extents[self._rows[positions]])

    def objects(self, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (K, 4), labels (K,) and crowd marks (K,) of one image, of the shown classes.

        None at all in a view without labels.
        """
        marks, row = self.annotations, self._rows[position]
        own = slice(marks.starts[row], marks.starts[row + 1])
        chosen = self._shown[position][marks.labels[own]] & self._annotated
        return marks.boxes[own][chosen], marks.labels[own][chosen], marks.crowd[own][chosen]

    def __getitem__(self, positions: int | Sequence[int]) -> dict[str, Tensor]:
        """Return one image with its boxes for an integer, or a whole batch for a sequence."""
        if isinstance(positions, int | np.integer):
            return {key: value[0] for key, value in self[[int(positions)]].items()}
        given = np.asarray(positions, dtype=np.int64)
        index = np.where(given < 0, ~given, given)
        batch = {
            "image": self.images(index),
            "id": torch.from_numpy(self.ids[index]),
            "weight": torch.from_numpy((given >= 0).astype(np.float32)),
            "extent": torch.from_numpy(self.extents(index)),
        }
        if self._annotated:
            batch |= self._marks(index)
        if self.forget is not None:
            batch["forget"] = torch.from_numpy(self.forget[index])
        if self._augment_seed is not None:
            draw = positions.draw if isinstance(positions, Positions) else (0, 0)
            flip(batch, self._augment_seed, draw, self.flips)
        return batch

    def _marks(self, index: np.ndarray) -> dict[str, Tensor]:
        boxes = torch.zeros(len(index), self.max_objects, 4)
        label = torch.full((len(index), self.max_objects), PADDING)
        crowd = torch.zeros(len(index), self.max_objects, dtype=torch.bool)
        for place, position in enumerate(index):
            own_boxes, own_label, own_crowd = self.objects(int(position))
            count = len(own_label)
            boxes[place, :count] = torch.from_numpy(own_boxes)
            label[place, :count] = torch.from_numpy(own_label)
            crowd[place, :count] = torch.from_numpy(own_crowd)
        return {"boxes": boxes, "label": label, "crowd": crowd}

    @property
    def hash(self) -> str:
        """SHA-256 over name, class names, ids, boxes and what is shown; pixels are not read."""
        digest = hashlib.sha256(super().hash.encode())
        marks = self.annotations
        digest.update(self._rows.astype("<i8").tobytes())
        for values, kind in (
            (marks.boxes, "<f4"),
            (marks.labels, "<i8"),
            (marks.crowd, "<i8"),
            (marks.starts, "<i8"),
            (self._shown, "<i8"),
        ):
            digest.update(values.astype(kind).tobytes())
        if not self._annotated:
            digest.update(b"unlabelled")
        return digest.hexdigest()


def flip(batch: dict[str, Tensor], seed: int, draw: tuple[int, int], flips: Flips) -> None:
    """Mirror half of the images of a batch with their boxes, in place; keyed by sample.

    Args:
        batch: see `DetectionDataset`.
        seed: base seed.
        draw: (epoch, pass within the epoch).
        flips: ``both`` also turns images upside down.
    """
    axes = {"none": (), "horizontal": (1,), "both": (0, 1)}[flips]
    for axis in axes:  # 0: top and bottom, 1: left and right
        chance = uniform(batch["id"].numpy(), seed, f"flip-{axis}", *draw)
        for place in np.flatnonzero(chance < 0.5):
            height, width = batch["extent"][place].tolist()
            picture = batch["image"][place, :, :height, :width]
            batch["image"][place, :, :height, :width] = picture.flip(axis + 1)
            if "boxes" in batch:
                real = batch["label"][place] != PADDING
                low, high = 1 - axis, 3 - axis  # columns of the box along this axis
                boxes = batch["boxes"][place, real]
                mirrored = boxes.clone()
                size = height if axis == 0 else width
                mirrored[:, low], mirrored[:, high] = size - boxes[:, high], size - boxes[:, low]
                batch["boxes"][place, real] = mirrored


def check_flips(flips: str) -> None:
    """Refuse an unknown value of the option `flips`.

    Raises:
        DataError: it is none of `Flips`.
    """
    if flips not in get_args(Flips):
        raise DataError(f"`flips` is '{flips}', {suggest(flips, get_args(Flips))}")


class DetectionDataModule(ForgetDataModule):
    """Images with boxes, whose boxes follow their roles. Subclasses implement `build`.

    An image plays every role of which it holds an object: one with a forgotten and a retained
    object is in the forget set with the first box only, and in the retain set with the second only.
    There the forgotten object is background, which helps forgetting; an object that was forgotten
    earlier is background in both. Images without any object are retained. Evaluation follows the
    same rule: only images that hold an object of the role, only with boxes of the role.

    Args:
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction: see
            `ForgetDataModule`. `shots` counts images: every class has so many of its own, and more
            where it is also in those of another class. An image with an object of a missing class
            is not retained in training.
        augment: mirror training images as the data set allows.
        mixed_images: ``filter``, as above; ``forget`` leaves training images that show a forgotten
            object or a crowd of them out of the retain set, so that no picture of one is ever
            retained. Evaluation stays the same.

    Raises:
        DataError: a value out of range.
        RequestError: by `request`: a class or an image without a training box to forget.

    Reference:
        The filter: Zhao et al., Continual Forgetting for Pre-trained Vision Models, CVPR 2024,
        arXiv 2403.11530.
    """

    def __init__(
        self,
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
            batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment
        )
        if mixed_images not in get_args(MixedImages):
            raise DataError(
                f"`mixed_images` is '{mixed_images}', "
                f"{suggest(mixed_images, get_args(MixedImages))}"
            )
        self.mixed_images: MixedImages = mixed_images
        self._told: set[str] = set()  # warnings, so that none comes twice

    def request(self, *requests: ForgetRequest) -> ForgetSplit:
        """Give every image its roles; warns of classes with which a request cannot be judged."""
        split = super().request(*requests)
        train, *rest = (self._scenes(stage) for stage in STAGES)
        held = train.presence
        if split.forget_classes and holding(held, split.forget_classes).all():
            self._tell(
                f"every training image holds an object to forget "
                f"({self._names(split.forget_classes)}): what is retained is learnt from pictures "
                "that show it"
            )
        elsewhere = np.any([data.presence.any(axis=0) for data in rest], axis=0)
        if unseen := np.flatnonzero(elsewhere & ~held.any(axis=0)).tolist():
            self._tell(
                f"validation or test data has objects that training data lacks "
                f"({self._names(unseen)}): no model can learn to find them"
            )
        if self.mixed_images == "forget":
            free = ~holding(train.seen, (*split.forget_classes, *split.previous_classes))
            lost = held.any(axis=0) & ~held[free].any(axis=0)
            if without := [index for index in split.retain_classes if lost[index]]:
                self._tell(
                    f"retained classes ({self._names(without)}) have no training image that is "
                    "free of forgotten objects: set `mixed_images` to 'filter' to retain them too"
                )
        return split

    def _names(self, classes: Sequence[int]) -> str:
        return ", ".join(self.class_names[index] for index in classes)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)

    def _labelled(self, stage: Stage) -> Labelled:
        found = super()._labelled(stage)
        if self.mixed_images == "filter" or stage != "train":
            return found
        return dataclasses.replace(found, seen=self._scenes(stage).seen)

    def _scenes(self, stage: Stage) -> DetectionDataset:
        data = self._stage(stage)
        assert isinstance(data, DetectionDataset)  # what `build` of this family returns
        return data

    def subset(self, stage: Stage, role: Role, whole: bool = False) -> DetectionDataset:
        """Return the images of a role with the boxes of that role.

        See `ForgetDataModule.subset`.
        """
        data = super().subset(stage, role, whole)
        assert isinstance(data, DetectionDataset)  # what `build` of this family returns
        if role == "all":
            return data
        return data.showing(self._role_classes(role, stage, whole, data.ids))

    def _role_classes(self, role: Role, stage: Stage, whole: bool, ids: np.ndarray) -> np.ndarray:
        """(N, C) bool: the classes whose boxes the images of a role give out."""
        split = self.split
        assert split is not None  # the caller has looked
        hidden = () if whole or stage != "train" else split.missing_classes
        chosen = {
            "forget": split.forget_classes,
            "previous": split.previous_classes,
            "missing": split.missing_classes,
            "retain": [index for index in split.retain_classes if index not in hidden],
        }[role]
        shown = np.zeros((len(ids), len(split.class_names)), dtype=bool)
        shown[:, list(chosen)] = True
        if role in ("forget", "previous"):  # an image that is named by its id goes as a whole
            named = self._requests[-1:] if role == "forget" else self._requests[:-1]
            samples = [sample for request in named for sample in request.samples]
            shown[np.isin(ids, np.asarray(samples, dtype=np.int64))] = True
        if role == "forget":
            shown[:, list(split.previous_classes)] = False
        return shown

    def _statistics(self) -> ImageDataset:
        """Forget and retain images in id order; one that plays both roles comes twice."""
        parts = {
            role: self.subset("train", role)  # type: ignore[arg-type]
            for role in ("forget", "retain")
        }
        whole = self._stage("train")
        place = {int(sample): row for row, sample in enumerate(whole.ids)}
        rows = [
            (int(sample), role == "retain", place[int(sample)], shown)
            for role, part in parts.items()
            for sample, shown in zip(part.ids, part._shown, strict=True)
        ]
        rows.sort(key=lambda row: row[:2])
        data: Any = whole.subset(np.array([row[2] for row in rows]))
        data = data.showing(np.stack([row[3] for row in rows]))
        data = data.marked(np.array([not row[1] for row in rows]))
        labelled = self._labels_allowed("forget") and self._labels_allowed("retain")
        return data if labelled else data.unlabelled()
