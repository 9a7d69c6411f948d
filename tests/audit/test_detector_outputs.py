"""What detectors find, what becomes of objects, and the bootstrap of average precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmforget import DigitScenes, ForgetRequest, ImageClassifier
from mmforget.audit.detector_boxes import NOTHING, boxes_of, fates_of
from mmforget.audit.detector_intervals import (
    match,
    percentile_interval,
    precision_of_all,
    resampled_precision,
    summarised,
    weighted_precision,
)
from mmforget.audit.detector_outputs import find, middle_size, objects_of, role_precision
from mmforget.errors import CapabilityError, ConfigurationError, DataError, ModelError
from mmforget.metrics.average_precision import average_precision
from mmforget.models.base import Batch
from mmforget.models.detectors.base import Detections
from mmforget.testing.knowing_detector import KnowingDetector

LEFT, RIGHT = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]


@pytest.fixture(scope="module")
def data() -> DigitScenes:
    found = DigitScenes(scenes=30, eval_scenes=30)
    found.request(ForgetRequest(classes=("three",)), ForgetRequest(classes=("seven",)))
    return found


def predicted(
    boxes: list[list[float]], scores: list[float], labels: list[int]
) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def labelled(boxes: list[list[float]], labels: list[int], crowd: list[int]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.tensor(crowd, dtype=torch.int64),
    }


def noisy(
    data: DigitScenes, crowds: bool
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Shaken boxes with random scores, some names exchanged, and false boxes among them."""
    chance = torch.Generator().manual_seed(0)
    targets = objects_of(data.dataset("test"))  # type: ignore[arg-type]
    predictions = []
    for row, one in enumerate(targets):
        count = len(one["labels"])
        corner = torch.rand(8, 2, generator=chance) * 50
        size = 5 + torch.rand(8, 2, generator=chance) * 25
        shaken = one["boxes"] + 2 * torch.randn(count, 4, generator=chance)
        predictions.append(
            {
                "boxes": torch.cat([shaken, torch.cat([corner, corner + size], 1)]),
                "scores": torch.rand(count + 8, generator=chance),
                "labels": torch.cat([one["labels"], torch.arange(8)]),
            }
        )
        if crowds and row % 3 == 0:
            one["iscrowd"][0] = 1
    return predictions, targets


# ---- findings ---------------------------------------------------------------------------------


def test_findings_come_by_id(data: DigitScenes) -> None:
    model, whole = KnowingDetector(data), data.dataset("test")
    shuffled = whole.subset(np.random.default_rng(0).permutation(len(whole)))
    findings = find(model, shuffled, batch_size=7)  # type: ignore[arg-type]
    assert findings.id.tolist() == sorted(whole.ids.tolist())
    assert len(findings.of(whole.ids[3:5])) == 2
    boxes, _, _ = whole.objects(3)  # type: ignore[attr-defined]
    found = findings.of(whole.ids[3:4])[0]["boxes"]
    assert sorted(found.tolist()) == sorted(torch.from_numpy(boxes).tolist())


def test_a_model_that_changes_itself_is_refused(data: DigitScenes) -> None:
    class Restless(KnowingDetector):
        def detect(self, batch: Batch) -> list[Detections]:
            with torch.no_grad():
                self.network.bias += 1e-3
            return super().detect(batch)

    with pytest.raises(ModelError, match="changed its weights"):
        find(Restless(data), data.dataset("test"))  # type: ignore[arg-type]


def test_only_detectors_and_only_images(data: DigitScenes) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    classifier = ImageClassifier(network, num_classes=10)
    with pytest.raises(CapabilityError, match="needs a Detector"):
        find(classifier, data.dataset("test"))  # type: ignore[arg-type]
    nothing = data.dataset("test").subset(np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="has no images"):
        find(KnowingDetector(data), nothing)  # type: ignore[arg-type]


def test_precision_by_role(data: DigitScenes) -> None:
    rows = role_precision(KnowingDetector(data, {"seven": 0.0, "three": 0.0}), data)
    values = {row["split"]: row["average_precision"] for row in rows}
    assert values == {"forget": 0, "previous": 0, "retain": pytest.approx(1)}
    objects = np.concatenate([one["labels"] for one in objects_of(data.dataset("test"))])  # type: ignore[arg-type]
    counts = {row["split"]: row["n"] for row in rows}
    assert counts["forget"] == (objects == 7).sum()
    assert sum(counts.values()) == len(objects)


def test_precision_by_role_needs_a_request() -> None:
    free = DigitScenes(scenes=4, eval_scenes=4)
    with pytest.raises(ConfigurationError, match="request"):
        role_precision(KnowingDetector(free), free)


def test_middle_size_is_the_median_side(data: DigitScenes) -> None:
    boxes = torch.cat([one["boxes"] for one in objects_of(data.dataset("test"))])  # type: ignore[arg-type]
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    assert middle_size(data.dataset("test")) == pytest.approx(float(np.median(sides)))  # type: ignore[arg-type]


# ---- what becomes of objects --------------------------------------------------------------------


def test_found_moved_and_vanished() -> None:
    shifted = [6.0, 0.0, 16.0, 10.0]  # 4 of 16 pixels in common with the left box
    predictions = [
        predicted([LEFT, LEFT, RIGHT], [0.9, 0.95, 0.6], [0, 1, 1]),
        predicted([shifted, RIGHT], [0.9, 0.2], [0, 0]),
        predicted([], [], []),
    ]
    targets = [
        labelled([LEFT, RIGHT], [0, 0], [0, 0]),
        labelled([LEFT, RIGHT], [0, 0], [0, 0]),
        labelled([LEFT, RIGHT], [2, 2], [0, 1]),
    ]
    fates = fates_of(predictions, targets)
    assert fates.label.tolist() == [0, 0, 0, 0, 2]  # the crowd is left out
    assert fates.image.tolist() == [0, 0, 1, 1, 2]
    assert fates.found(0.3).tolist() == [True, False, False, False, False]
    assert fates.moved(0.3).tolist() == [False, True, False, False, False]
    assert fates.vanished(0.3).tolist() == [False, False, True, True, True]
    assert fates.named(0.3).tolist() == [0, 1, NOTHING, NOTHING, NOTHING]
    assert fates.found(0.1).tolist() == [True, False, False, True, False]
    total = fates.found(0.5) + 0 + fates.moved(0.5) + fates.vanished(0.5)
    assert total.tolist() == [1] * 5


def test_no_objects_at_all() -> None:
    assert len(fates_of([predicted([LEFT], [0.9], [0])], [labelled([], [], [])])) == 0


def test_boxes_of_some_classes() -> None:
    predictions = [
        predicted([LEFT, RIGHT, RIGHT], [0.9, 0.2, 0.5], [0, 0, 2]),
        predicted([], [], []),
    ]
    assert boxes_of(predictions, [0, 1], 0.3).tolist() == [1, 0]
    assert boxes_of(predictions, [0, 2], 0.1).tolist() == [3, 0]


# ---- bootstrap ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crowds", "middle", "sizes"),
    [(False, 30.0, {"small", "medium"}), (True, 12.0, {"medium", "large"})],
)
def test_equal_weights_give_the_value_of_torchmetrics(
    data: DigitScenes, crowds: bool, middle: float, sizes: set[str]
) -> None:
    predictions, targets = noisy(data, crowds)
    classes = list(range(10))
    expected = average_precision(predictions, targets, classes, middle)
    matched = match(predictions, targets, classes)
    assert expected.value is not None and 0.1 < expected.value < 0.9
    assert precision_of_all(matched) == pytest.approx(expected.value, abs=1e-6)
    own = summarised(predictions, targets, classes, matched, middle)
    assert set(expected.by_size) == sizes
    assert own.by_class == pytest.approx(expected.by_class, abs=1e-6)
    assert own.by_size == pytest.approx(expected.by_size, abs=1e-6)
    assert own.at_50 == pytest.approx(expected.at_50, abs=1e-6)
    assert own.objects == expected.objects


def test_weights_are_repeated_images(data: DigitScenes) -> None:
    predictions, targets = noisy(data, False)
    weights = np.random.default_rng(1).integers(0, 3, len(targets))
    weights[:3] = (0, 1, 2)
    rows = np.repeat(np.arange(len(targets)), weights)
    expected = average_precision([predictions[i] for i in rows], [targets[i] for i in rows], [1])
    stacked = np.stack([np.ones(len(targets)), weights])  # a second row, searched with the first
    found = weighted_precision(match(predictions, targets, [1])[0], stacked)[1]
    assert found == pytest.approx(expected.value, abs=1e-3)  # equal scores lie in another order


def test_replicates_lie_around_the_value_and_repeat(data: DigitScenes) -> None:
    predictions, targets = noisy(data, False)
    matched = match(predictions, targets, range(10))
    first, again = (resampled_precision(matched, 100, 3, "test") for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, resampled_precision(matched, 100, 4, "test"))
    interval = percentile_interval(first)
    assert interval is not None
    assert interval.low < precision_of_all(matched) < interval.high
    assert "100 replicates" in interval.method


def test_nothing_found_or_nothing_there() -> None:
    targets = [labelled([LEFT], [0], [0])]
    nothing = match([predicted([], [], [])], targets, [0, 1])
    assert weighted_precision(nothing[0], np.ones((2, 1))).tolist() == [0, 0]
    assert np.isnan(weighted_precision(nothing[1], np.ones((1, 1)))).all()
    assert precision_of_all(nothing) == 0
    assert np.isnan(precision_of_all(nothing[1:]))
    assert percentile_interval(np.full(100, np.nan)) is None
