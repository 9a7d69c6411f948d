"""Boxes by hand: what is clipped, what is refused, how they are scaled and put in order."""

from __future__ import annotations

import numpy as np
import pytest

from mmforget.data.boxes import RawBoxes, annotations_of, canvas_of, fit, xyxy
from mmforget.errors import DataError


def raw(images: list[int], boxes: list[list[float]]) -> RawBoxes:
    count = np.arange(len(images))
    return RawBoxes(
        np.array(images, dtype=np.int64),
        np.array(boxes, dtype=float).reshape(-1, 4),
        count,
        count == 1,
        lambda row: f"box {row}",
    )


def test_corners() -> None:
    assert xyxy(np.array([[1.0, 2, 3, 4]])).tolist() == [[1, 2, 4, 6]]
    assert xyxy(np.zeros((0, 4))).shape == (0, 4)


def test_pictures_are_fitted_with_their_aspect() -> None:
    sizes = np.array([(480, 640), (640, 480), (10, 20), (1, 3000), (240, 320)])
    fitted = [[240, 320], [240, 180], [10, 20], [1, 320], [240, 320]]
    assert fit(sizes, (240, 320), False).tolist() == fitted
    fitted[2] = [160, 320]
    assert fit(sizes, (240, 320), True).tolist() == fitted
    assert canvas_of(None, sizes) == (640, 3000)
    assert canvas_of(7, sizes) == (7, 7)
    assert canvas_of([3, 4], sizes) == (3, 4)


def test_boxes_are_scaled_clipped_and_ordered_by_picture() -> None:
    sizes, extents = np.array([(20, 40), (9, 9), (10, 10)]), np.array([(10, 20), (9, 9), (10, 10)])
    given = raw([2, 0, 2, 0], [[1, 1, 3, 3], [-4, 4, 50, 30], [0, 0, 5, 5], [1, 3, 2, 4]])
    marks = annotations_of(given, sizes, extents, "refuse", "f")
    assert marks.boxes.tolist() == [[0, 2, 20, 10], [0.5, 1.5, 1, 2], [1, 1, 3, 3], [0, 0, 5, 5]]
    assert marks.labels.tolist() == [1, 3, 0, 2]
    assert marks.crowd.tolist() == [True, False, False, False]
    assert marks.starts.tolist() == [0, 2, 2, 4]


def test_any_scale_leaves_boxes_within_the_picture() -> None:
    sizes = np.stack([np.arange(50, 950, 9), np.arange(950, 50, -9)], axis=1)
    extents = fit(sizes, (97, 131), False)
    whole = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1)
    marks = annotations_of(
        raw(list(range(len(sizes))), whole.tolist()), sizes, extents, "refuse", ""
    )
    assert np.array_equal(marks.boxes[:, 2:], extents[:, ::-1].astype(np.float32))


def test_no_boxes_at_all() -> None:
    marks = annotations_of(raw([], []), np.array([(5, 5)]), np.array([(5, 5)]), "refuse", "f")
    assert marks.boxes.shape == (0, 4)
    assert marks.starts.tolist() == [0, 0]


def test_a_box_that_vanishes_is_refused() -> None:
    given = raw([0], [[3, 3, 3 + 1e-12, 4]])
    with pytest.raises(DataError, match="box 0 has the box"):
        annotations_of(given, np.array([(9, 9)]), np.array([(9, 9)]), "refuse", "f")
