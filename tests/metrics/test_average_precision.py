"""Average precision on a few boxes against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmforget.metrics.average_precision import COCO_MIDDLE, average_precision

FAR = [60.0, 60.0, 70.0, 70.0]
SQUARE = [0.0, 0.0, 10.0, 10.0]
"""Boxes without overlap."""


def found(*boxes: tuple[list[float], float, int]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([box for box, _, _ in boxes]).reshape(-1, 4),
        "scores": torch.tensor([score for _, score, _ in boxes]),
        "labels": torch.tensor([label for _, _, label in boxes], dtype=torch.int64),
    }


def there(*boxes: tuple[list[float], int], crowd: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor([box for box, _ in boxes]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label in boxes], dtype=torch.int64),
        "iscrowd": torch.tensor(crowd or (0,) * len(boxes), dtype=torch.int64),
    }


def test_a_hit_is_one_and_a_miss_nothing() -> None:
    hit = average_precision([found((SQUARE, 0.9, 0))], [there((SQUARE, 0))], [0])
    assert (hit.value, hit.at_50, hit.objects) == (pytest.approx(1), pytest.approx(1), 1)
    miss = average_precision([found((FAR, 0.9, 0))], [there((SQUARE, 0))], [0])
    assert (miss.value, miss.at_50) == (0, 0)


def test_overlaps_from_half_to_nearly_all() -> None:
    """7.2 of 10 pixels wide: an overlap of 0.72, enough for 0.50, 0.55, 0.60, 0.65 and 0.70."""
    narrow = found(([0.0, 0.0, 7.2, 10.0], 0.9, 0))
    precision = average_precision([narrow], [there((SQUARE, 0))], [0])
    assert precision.value == pytest.approx(0.5)
    assert precision.at_50 == pytest.approx(1)


def test_a_more_confident_false_box_halves_it() -> None:
    """Precision is 1/2 at every recall."""
    precision = average_precision(
        [found((FAR, 0.9, 0), (SQUARE, 0.8, 0))], [there((SQUARE, 0))], [0]
    )
    assert precision.value == pytest.approx(0.5)


def test_a_less_confident_false_box_costs_nothing() -> None:
    precision = average_precision(
        [found((FAR, 0.7, 0), (SQUARE, 0.8, 0))], [there((SQUARE, 0))], [0]
    )
    assert precision.value == pytest.approx(1)


def test_one_of_two_objects() -> None:
    """Precision 1 at the recalls 0 to 0.50, which are 51 of 101."""
    precision = average_precision([found((SQUARE, 0.9, 0))], [there((SQUARE, 0), (FAR, 0))], [0])
    assert precision.value == pytest.approx(51 / 101)


def test_an_object_is_matched_once() -> None:
    """The second box on it is false; it comes last and costs nothing, and finds nothing."""
    precision = average_precision(
        [found((SQUARE, 0.9, 0), (SQUARE, 0.8, 0))], [there((SQUARE, 0), (FAR, 0))], [0]
    )
    assert precision.value == pytest.approx(51 / 101)


def test_only_the_given_classes_count() -> None:
    predictions = [found((SQUARE, 0.9, 0), (FAR, 0.95, 2))]
    targets = [there((SQUARE, 0), (FAR, 1))]
    assert average_precision(predictions, targets, [0]).value == pytest.approx(1)
    both = average_precision(predictions, targets, [0, 1])
    assert both.value == pytest.approx(0.5)
    assert both.by_class == {0: pytest.approx(1), 1: 0}
    assert both.objects == 2


def test_a_class_without_objects_is_absent() -> None:
    precision = average_precision([found((SQUARE, 0.9, 0))], [there((SQUARE, 0))], [0, 1])
    assert precision.by_class == {0: pytest.approx(1)}
    assert precision.value == pytest.approx(1)


def test_a_crowd_is_neither_missed_nor_false() -> None:
    targets = [there((SQUARE, 0), (FAR, 0), crowd=(0, 1))]
    inside = [62.0, 62.0, 66.0, 66.0]
    precision = average_precision([found((inside, 0.95, 0), (SQUARE, 0.9, 0))], targets, [0])
    assert precision.value == pytest.approx(1)
    assert precision.objects == 1
    nobody = average_precision([found((inside, 0.95, 0))], [there((FAR, 0), crowd=(1,))], [0])
    assert nobody.value is None and nobody.by_class == {}


def test_nothing_found_and_nothing_there() -> None:
    assert average_precision([found()], [there((SQUARE, 0))], [0]).value == 0
    empty = average_precision([found((SQUARE, 0.9, 0))], [there()], [0])
    assert (empty.value, empty.at_50, empty.by_size, empty.objects) == (None, None, {}, 0)
    with pytest.raises(ValueError, match="at least one image"):
        average_precision([], [], [0])


def test_an_image_without_objects_still_counts_false_boxes() -> None:
    predictions = [found((SQUARE, 0.9, 0)), found((SQUARE, 0.95, 0))]
    precision = average_precision(predictions, [there((SQUARE, 0)), there()], [0])
    assert precision.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("side", "size"), [(5.7, "small"), (5.9, "medium"), (17.2, "medium"), (17.4, "large")]
)
def test_sizes_follow_the_middle(side: float, size: str) -> None:
    """With a middle of 10 pixels, small ends at 5.77 and large begins at 17.32."""
    box = [0.0, 0.0, side, side]
    precision = average_precision([found((box, 0.9, 0))], [there((box, 0))], [0], middle=10.0)
    assert precision.by_size == {size: pytest.approx(1)}


def test_the_usual_sizes_are_those_of_coco() -> None:
    assert pytest.approx(55.4, abs=0.1) == COCO_MIDDLE
    for side, size in ((31.0, "small"), (33.0, "medium"), (95.0, "medium"), (97.0, "large")):
        box = [0.0, 0.0, side, side]
        precision = average_precision([found((box, 0.9, 0))], [there((box, 0))], [0])
        assert list(precision.by_size) == [size]


def test_at_most_so_many_boxes_count() -> None:
    predictions = [found((FAR, 0.9, 0), (SQUARE, 0.8, 0))]
    assert average_precision(predictions, [there((SQUARE, 0))], [0], most=1).value == 0
