"""What became of labelled objects: found, taken for something else, or not found at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

OVERLAP = 0.5
"""Intersection over union from which on a box lies on an object."""

NOTHING = -1
"""Class of an object on which no box lies."""


@dataclass(frozen=True)
class Fates:
    """The boxes that lie on M labelled objects, crowds left out.

    An object counts as found even if another object has the same box: unlike average precision,
    this asks whether an object is named at all, not how well boxes are shared out.

    Attributes:
        image: (M,) rows of the images.
        label: (M,) classes of the objects.
        own: (M,) highest score of a box of the same class on the object; 0 without one.
        other: (M,) highest score of a box of another class on it; 0 without one.
        other_class: (M,) class of that box; `NOTHING` without one.
    """

    image: np.ndarray
    label: np.ndarray
    own: np.ndarray
    other: np.ndarray
    other_class: np.ndarray

    def __len__(self) -> int:
        """Count the objects."""
        return len(self.label)

    def found(self, score: float) -> np.ndarray:
        """(M,) bool: a box of its own class lies on the object with at least this score."""
        return np.asarray(self.own >= score)

    def moved(self, score: float) -> np.ndarray:
        """(M,) bool: only boxes of other classes lie on it."""
        return ~self.found(score) & (self.other >= score)

    def vanished(self, score: float) -> np.ndarray:
        """(M,) bool: no box lies on it."""
        return ~self.found(score) & ~self.moved(score)

    def named(self, score: float) -> np.ndarray:
        """(M,) the class that an object is taken for: its own if found; `NOTHING` if vanished."""
        names = np.where(self.found(score), self.label, self.other_class)
        return np.where(self.vanished(score), NOTHING, names)


def fates_of(
    predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]
) -> Fates:
    """Look at the boxes on every labelled object.

    Args:
        predictions: per image ``boxes`` (D, 4) in pixels, ``scores`` (D,), ``labels`` (D,).
        targets: per image ``boxes`` (K, 4), ``labels`` (K,), ``iscrowd`` (K,).
    """
    columns: list[tuple[int, int, float, float, int]] = []
    for row, (found, there) in enumerate(zip(predictions, targets, strict=True)):
        real = there["iscrowd"] == 0
        boxes, labels = there["boxes"][real].float(), there["labels"][real]
        lies = box_iou(boxes, found["boxes"].float()) >= OVERLAP  # (K, D)
        same = labels[:, None] == found["labels"][None]
        for index, label in enumerate(labels.tolist()):
            own = found["scores"][lies[index] & same[index]]
            rest = torch.where(lies[index] & ~same[index], found["scores"], -torch.inf)
            other, kind = 0.0, NOTHING
            if len(rest) and bool(rest.max() > 0):
                other, kind = float(rest.max()), int(found["labels"][int(rest.argmax())])
            columns.append((row, label, float(own.max()) if len(own) else 0.0, other, kind))
    values = np.array(columns, dtype=np.float64).reshape(-1, 5).T
    image, label, own_score, other_score, other_class = values
    return Fates(
        image.astype(np.int64),
        label.astype(np.int64),
        own_score,
        other_score,
        other_class.astype(np.int64),
    )


def boxes_of(
    predictions: Sequence[dict[str, Tensor]], classes: Sequence[int], score: float
) -> np.ndarray:
    """(N,) number of boxes of some classes per image, wherever they lie."""
    chosen = torch.tensor(sorted(classes))
    return np.array(
        [
            int((torch.isin(one["labels"], chosen) & (one["scores"] >= score)).sum())
            for one in predictions
        ],
        dtype=np.float64,
    )
