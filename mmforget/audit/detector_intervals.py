"""Average precision from boxes that are matched once: all values of an audit, and its bootstrap.

An audit needs the precision of every model on half a dozen sets of images, and a hundred times more
on resampled ones. `mmforget.metrics.average_precision` would take minutes for it; here every image
is matched once, and a resampled set of images only weighs the matches. With equal weights the
values are those of torchmetrics to the last digits (a test compares them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from mmforget.audit.intervals import Interval
from mmforget.metrics.average_precision import COCO_MIDDLE, Precision
from mmforget.seeds import generator

# in single precision, as torchmetrics has them
OVERLAPS = torch.linspace(0.5, 0.95, 10).double().numpy()
RECALLS = torch.linspace(0, 1, 101).double().numpy()


@dataclass(frozen=True)
class Matched:
    """All detections of one class, the most confident first.

    Attributes:
        image: (D,) row of the image.
        hit: (T, D) bool, at overlap t the detection matches an object.
        counted: (T, D) bool, false for a detection on a crowd.
        objects: (N,) number of objects per image, crowds left out.
    """

    image: np.ndarray
    hit: np.ndarray
    counted: np.ndarray
    objects: np.ndarray


def match(
    predictions: Sequence[dict[str, Tensor]],
    targets: Sequence[dict[str, Tensor]],
    classes: Sequence[int],
    areas: tuple[float, float] = (0.0, np.inf),
) -> list[Matched]:
    """Match detections to objects of the same class, greedily by score, as COCO does.

    Args:
        predictions: per image ``boxes`` (D, 4) in pixels, ``scores`` (D,), ``labels`` (D,).
        targets: per image ``boxes`` (K, 4), ``labels`` (K,), ``iscrowd`` (K,).
        classes: class indices.
        areas: smallest and largest area of objects that count, in square pixels. Others are neither
            missed nor false if they are found, as are detections of other sizes on nothing.

    Returns:
        One entry per class.
    """
    objects = np.zeros((len(classes), len(targets)), dtype=np.int64)
    parts: list[list[_Part]] = [[] for _ in classes]
    places = {index: place for place, index in enumerate(classes)}
    for row, (found, there) in enumerate(zip(predictions, targets, strict=True)):
        order = torch.argsort(-found["scores"], stable=True)
        label, scores = found["labels"][order].numpy(), found["scores"][order].numpy()
        kind, crowd = there["labels"].numpy(), there["iscrowd"].numpy() != 0
        overlap = _overlap(found["boxes"][order], there["boxes"], crowd)
        ignored = crowd | _outside(there["boxes"], areas)
        other_size = _outside(found["boxes"][order], areas)
        for index in kind[~ignored].tolist():
            if index in places:
                objects[places[index], row] += 1
        for index in places.keys() & set(label.tolist()):
            own, real = label == index, kind == index
            hit, counted = _greedy(
                overlap[own][:, real], crowd[real], ignored[real], other_size[own]
            )
            parts[places[index]].append((np.full(len(hit[0]), row), scores[own], hit, counted))
    return [_joined(own, objects[place]) for place, own in enumerate(parts)]


_Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _joined(parts: Sequence[_Part], objects: np.ndarray) -> Matched:
    if not parts:
        nothing = np.zeros((len(OVERLAPS), 0), dtype=bool)
        return Matched(np.zeros(0, dtype=np.int64), nothing, nothing, objects)
    image, scores = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    hit, counted = (np.concatenate([part[i] for part in parts], axis=1) for i in (2, 3))
    order = np.argsort(-scores, kind="stable")
    return Matched(image[order], hit[:, order], counted[:, order], objects)


def _overlap(boxes: Tensor, objects: Tensor, crowd: np.ndarray) -> np.ndarray:
    """(D, K) intersection over union; over the box alone for crowds, which small boxes lie in."""
    boxes, objects = boxes.double(), objects.double()
    overlap = box_iou(boxes, objects).numpy()
    if crowd.any():
        low = torch.maximum(boxes[:, None, :2], objects[None, :, :2])
        high = torch.minimum(boxes[:, None, 2:], objects[None, :, 2:])
        share = (high - low).clamp(min=0).prod(-1) / box_area(boxes)[:, None].clamp(min=1e-12)
        overlap = np.where(crowd, share.numpy(), overlap)
    return np.asarray(overlap)


def _outside(boxes: Tensor, areas: tuple[float, float]) -> np.ndarray:
    own = box_area(boxes.double()).numpy()
    return np.asarray((own < areas[0]) | (own > areas[1]))


def _greedy(
    overlap: np.ndarray, crowd: np.ndarray, ignored: np.ndarray, other_size: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    hit = np.zeros((len(OVERLAPS), len(overlap)), dtype=bool)
    counted = np.tile(~other_size, (len(OVERLAPS), 1))
    if not overlap.size:
        return hit, counted
    free = np.ones((len(OVERLAPS), len(crowd)), dtype=bool)
    levels = np.arange(len(OVERLAPS))
    for index in np.flatnonzero(overlap.max(axis=1) >= OVERLAPS[0]):
        open_ = np.where(free & (overlap[index] >= OVERLAPS[:, None]), overlap[index], -1.0)
        real = np.where(ignored, -1.0, open_)
        hit[:, index] = real.max(axis=1) >= 0
        # an object that counts comes first, however well another one fits
        chosen = np.where(hit[:, index], real.argmax(axis=1), open_.argmax(axis=1))
        any_ = open_.max(axis=1) >= 0
        counted[:, index] = hit[:, index] | (counted[:, index] & ~any_)
        taken = levels[any_]
        free[taken, chosen[taken]] = crowd[chosen[taken]]  # a crowd has room for more
    return hit, counted


def weighted_precision(
    matched: Matched, weights: np.ndarray, overlaps: Sequence[int] = range(len(OVERLAPS))
) -> np.ndarray:
    """Average precision of one class for images that count several times or not at all.

    Args:
        matched: detections of the class.
        weights: (R, N) how often each image counts.
        overlaps: which of `OVERLAPS` count.

    Returns:
        (R,) in [0, 1]; NaN where no object of the class counts.
    """
    objects = weights @ matched.objects
    total, rows = np.zeros(len(weights)), np.arange(len(weights))[:, None]
    if not len(matched.image):
        return np.where(objects > 0, total, np.nan)
    drawn = weights[:, matched.image]
    for level in overlaps:
        right = np.cumsum(drawn * matched.hit[level], axis=1)
        wrong = np.cumsum(drawn * (matched.counted[level] & ~matched.hit[level]), axis=1)
        precision = right / np.maximum(right + wrong, 1e-12)
        best_later = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # one search for all rows, each in a range of its own; the first one stays exact
        recall = right / np.maximum(objects, 1)[:, None] + 2 * rows
        place = np.searchsorted(recall.ravel(), RECALLS + 2 * rows) - rows * right.shape[1]
        reached = place < right.shape[1]
        kept = np.take_along_axis(best_later, np.where(reached, place, 0), axis=1)
        total += (kept * reached).sum(axis=1) / len(RECALLS)
    return np.where(objects > 0, total / len(overlaps), np.nan)


def precision_by_class(
    matched: Sequence[Matched], overlaps: Sequence[int] = range(len(OVERLAPS))
) -> np.ndarray:
    """(C,) average precision of each class; NaN for classes without objects."""
    ones = np.ones((1, len(matched[0].objects)))
    return np.array([weighted_precision(one, ones, overlaps)[0] for one in matched])


def precision_of_all(
    matched: Sequence[Matched], overlaps: Sequence[int] = range(len(OVERLAPS))
) -> float:
    """Mean average precision over the classes that have objects; NaN without any."""
    found = precision_by_class(matched, overlaps)
    known = found[~np.isnan(found)]
    return float(known.mean()) if len(known) else float("nan")


def size_limits(middle: float) -> dict[str, tuple[float, float]]:
    """Areas in square pixels of small, medium and large objects; see `average_precision`."""
    small, large = ((side * middle / COCO_MIDDLE) ** 2 for side in (32, 96))
    return {"small": (0.0, small), "medium": (small, large), "large": (large, np.inf)}


def summarised(
    predictions: Sequence[dict[str, Tensor]],
    targets: Sequence[dict[str, Tensor]],
    classes: Sequence[int],
    matched: Sequence[Matched],
    middle: float | None,
) -> Precision:
    """The same values as `mmforget.metrics.average_precision`, from boxes matched already.

    Args:
        predictions: see `match`.
        targets: see `match`.
        classes: see `match`.
        matched: what `match` gave.
        middle: side in pixels of an object of middle size; None leaves sizes out.
    """
    by_class = precision_by_class(matched)
    known = ~np.isnan(by_class)
    limits = {} if middle is None else size_limits(middle)
    by_size = {
        size: precision_of_all(match(predictions, targets, classes, areas))
        for size, areas in limits.items()
    }
    return Precision(
        float(by_class[known].mean()) if known.any() else None,
        precision_of_all(matched, [0]) if known.any() else None,
        {int(c): float(by_class[i]) for i, c in enumerate(classes) if known[i]},
        {size: value for size, value in by_size.items() if not np.isnan(value)},
        int(sum(one.objects.sum() for one in matched)),
    )


def resampled_precision(
    matched: Sequence[Matched], replicates: int, seed: int, purpose: str
) -> np.ndarray:
    """(R,) mean average precision of resampled sets of images; NaN without any object.

    The draws depend on the seed, the purpose and the number of images only, so that models can be
    compared replicate by replicate.
    """
    count = len(matched[0].objects)
    chance = generator(seed, f"bootstrap/{purpose}")
    picked = torch.randint(count, (replicates, count), generator=chance).numpy()
    weights = np.stack([np.bincount(row, minlength=count) for row in picked]).astype(np.float64)
    found = np.stack([weighted_precision(one, weights) for one in matched])
    known = (~np.isnan(found)).sum(0)
    return np.asarray(np.nansum(found, axis=0) / np.where(known > 0, known, np.nan))


def percentile_interval(values: np.ndarray) -> Interval | None:
    """The middle 95 % of replicates; None where too few of them are defined."""
    known = values[~np.isnan(values)]
    if len(known) < 20:
        return None
    low, high = np.quantile(known, (0.025, 0.975))
    return Interval(float(low), float(high), f"bootstrap over images, {len(known)} replicates")
