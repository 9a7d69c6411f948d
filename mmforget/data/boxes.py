"""Boxes as a file gives them, checked and brought onto the canvas of a detection data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mmforget.data.detection import Annotations
from mmforget.errors import DataError, suggest

logger = logging.getLogger(__name__)

BadBoxes = Literal["refuse", "drop"]

JITTER = 0.01
"""A box that leaves its picture by less, in pixels, is clipped without a word: mere rounding."""


@dataclass(frozen=True)
class RawBoxes:
    """The M boxes of N pictures in any order, as read from a file.

    Attributes:
        image: (M,) int64 row of the picture.
        boxes: (M, 4) float64, left, top, right, bottom in pixels of the picture.
        labels: (M,) int64 class indices.
        crowd: (M,) bool.
        describe: names box m for messages, such as ``annotation 7 of image 3 (a.jpg) in 'a.json'``.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    describe: Callable[[int], str]


def xyxy(boxes: np.ndarray) -> np.ndarray:
    """Turn (M, 4) left, top, width, height into left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def canvas_of(size: int | Sequence[int] | None, sizes: np.ndarray) -> tuple[int, int]:
    """Resolve the option `size` of detection data into height and width.

    Args:
        size: height and width; one number for both; None for the largest ones of the pictures.
        sizes: (N, 2) heights and widths of the pictures.

    Raises:
        DataError: not one or two positive numbers.
    """
    if size is None:
        height, width = sizes.max(axis=0).tolist()
        return height, width
    given = (size, size) if isinstance(size, int) else tuple(size)
    if len(given) != 2 or min(given) < 1:
        raise DataError(
            f"`size` is {size}, it must be height and width, or one number for both, at least 1"
        )
    return given


def fit(sizes: np.ndarray, canvas: tuple[int, int], enlarge: bool) -> np.ndarray:
    """Heights and widths (N, 2) of pictures on a canvas; the aspect is kept up to rounding.

    Args:
        sizes: (N, 2) heights and widths of the pictures.
        canvas: height and width.
        enlarge: also scale smaller pictures up.
    """
    scale = (np.array(canvas) / sizes).min(axis=1)
    if not enlarge:
        scale = np.minimum(scale, 1)
    fitted = np.rint(sizes * scale[:, None]).astype(np.int64)
    return np.clip(fitted, 1, np.array(canvas))


def check_bad_boxes(bad_boxes: str) -> None:
    """Refuse an unknown value of the option `bad_boxes`.

    Raises:
        DataError: neither ``refuse`` nor ``drop``.
    """
    if bad_boxes not in get_args(BadBoxes):
        raise DataError(f"`bad_boxes` is '{bad_boxes}', {suggest(bad_boxes, get_args(BadBoxes))}")


def annotations_of(
    raw: RawBoxes, sizes: np.ndarray, extents: np.ndarray, bad_boxes: BadBoxes, owner: str
) -> Annotations:
    """Clip, check and scale boxes, and put them into the order of the pictures.

    What leaves the picture is cut off, with one warning. A box that is not finite, has no area or
    lies wholly outside is no annotation at all.

    Args:
        raw: the boxes.
        sizes: (N, 2) heights and widths of the pictures.
        extents: (N, 2) the same on the canvas.
        bad_boxes: ``refuse`` raises at the first box that is no annotation, ``drop`` leaves all of
            them out, with one warning.
        owner: the file or split, for warnings.

    Raises:
        DataError: a box that is no annotation, with `bad_boxes` ``refuse``.
    """
    limit = np.tile(sizes[raw.image][:, ::-1], 2).astype(np.float64)  # width, height, twice
    boxes = np.clip(raw.boxes, 0, limit)
    scaled = (boxes * (np.tile(extents[raw.image][:, ::-1], 2) / limit)).astype(np.float32)
    flaws = {
        "is not finite": ~np.isfinite(raw.boxes).all(axis=1),
        "has no area": ~(raw.boxes[:, :2] < raw.boxes[:, 2:]).all(axis=1),
        "lies outside of its picture": ~(scaled[:, :2] < scaled[:, 2:]).all(axis=1),
    }
    bad = np.any(list(flaws.values()), axis=0)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        flaw = next(words for words, rows in flaws.items() if rows[first])
        width, height = limit[first, :2].astype(int)
        shown = [round(float(value), 3) for value in raw.boxes[first]]
        text = (
            f"{raw.describe(first)} has the box {shown} (left, top, right, bottom), which {flaw}; "
            f"the picture has {width}x{height} pixels"
        )
        if bad_boxes == "refuse":
            more = f" ({int(bad.sum()) - 1} more like it)" if bad.sum() > 1 else ""
            raise DataError(f"{text}{more}; mend it, or set `bad_boxes` to 'drop'")
        logger.warning("%s: %d box(es) left out, first: %s", owner, int(bad.sum()), text)
    cut = ~bad & (np.abs(boxes - raw.boxes).max(axis=1, initial=0) > JITTER)
    if cut.any():
        first = int(np.flatnonzero(cut)[0])
        logger.warning(
            "%s: %d box(es) clipped to their pictures, first: %s",
            owner,
            int(cut.sum()),
            raw.describe(first),
        )
    kept = np.flatnonzero(~bad)
    kept = kept[np.argsort(raw.image[kept], kind="stable")]
    counts = np.bincount(raw.image[kept], minlength=len(sizes))
    return Annotations(
        scaled[kept],
        raw.labels[kept].astype(np.int64),
        raw.crowd[kept].astype(bool),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
