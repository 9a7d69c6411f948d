"""Average precision of detections over some classes, by size of the objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COCO_MIDDLE = (32 * 96) ** 0.5
"""Side in pixels that lies in the middle, on a log scale, of what COCO calls a medium object."""

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Precision:
    """Average precision over a set of classes.

    Attributes:
        value: mean over the classes of the average over the overlaps 0.50, 0.55 … 0.95, in [0, 1];
            None where no class has an object.
        at_50: the same at overlap 0.50 alone.
        by_class: per class index; classes without objects are absent.
        by_size: ``small``, ``medium``, ``large``; sizes without objects are absent.
        objects: number of labelled objects, crowds not counted.
    """

    value: float | None
    at_50: float | None
    by_class: dict[int, float]
    by_size: dict[str, float]
    objects: int


def average_precision(
    predictions: Sequence[dict[str, Tensor]],
    targets: Sequence[dict[str, Tensor]],
    classes: Sequence[int],
    middle: float = COCO_MIDDLE,
    most: int = 100,
) -> Precision:
    """COCO's average precision of detections, by torchmetrics, for some classes only.

    Detections and objects of other classes are left out before anything is counted, so that the
    most confident `most` detections of an image are shared by the given classes only.

    Args:
        predictions: per image ``boxes`` (D, 4) in pixels, ``scores`` (D,), ``labels`` (D,).
        targets: per image ``boxes`` (K, 4), ``labels`` (K,), ``iscrowd`` (K,).
        classes: class indices that count.
        middle: side in pixels of an object of middle size: small is below 0.58, large above 1.73
            times that, which for 55 pixels are COCO's 32 and 96.
        most: detections per image that count.

    Raises:
        ValueError: no image.

    Reference:
        Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014, arXiv 1405.0312.
    """
    from torchmetrics.detection import MeanAveragePrecision

    if not targets:
        raise ValueError("average precision needs at least one image")
    chosen = torch.tensor(sorted(classes))
    predictions = [_only(one, chosen) for one in predictions]
    targets = [_only(one, chosen) for one in targets]
    objects = sum(int((one["iscrowd"] == 0).sum()) for one in targets)
    if not objects:
        return Precision(None, None, {}, {}, 0)
    scale = COCO_MIDDLE / middle  # sizes are fixed in the metric, the pixels are not
    metric = MeanAveragePrecision(  # `class_metrics` would evaluate everything twice
        extended_summary=True, max_detection_thresholds=[1, min(10, most), most]
    )
    metric.warn_on_many_detections = False
    for found, there in zip(predictions, targets, strict=True):
        metric.update(
            [found | {"boxes": found["boxes"] * scale}], [there | {"boxes": there["boxes"] * scale}]
        )
    values = metric.compute()
    # (overlaps, recalls, classes, sizes, limits); -1 for classes without objects
    precision = values["precision"][:, :, :, 0, -1].mean(dim=(0, 1))
    by_class = {
        int(index): float(value)
        for index, value in zip(values["classes"].reshape(-1), precision, strict=True)
        if value >= 0
    }
    by_size = {size: float(values[f"map_{size}"]) for size in SIZES if values[f"map_{size}"] >= 0}
    # not its own mean, which is -1 whenever 100 detections were not asked for
    mean = sum(by_class.values()) / len(by_class)
    return Precision(mean, float(values["map_50"]), by_class, by_size, objects)


def _only(one: dict[str, Tensor], classes: Tensor) -> dict[str, Tensor]:
    kept = torch.isin(one["labels"].cpu(), classes)
    return {key: value.cpu()[kept] for key, value in one.items()}
