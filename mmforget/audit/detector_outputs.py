"""What a detector finds in a data set, computed once; all metrics are functions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.audit.outputs import evaluating
from mmforget.data.base import ForgetDataModule, Stage
from mmforget.data.detection import DetectionDataModule, DetectionDataset
from mmforget.errors import CapabilityError, DataError, ModelError
from mmforget.metrics.average_precision import Precision, average_precision
from mmforget.models.base import Model, state_hash
from mmforget.models.detector import Detector

ROLES = ("forget", "retain", "previous")


@dataclass(frozen=True)
class Findings:
    """What one detector finds in images, in ascending order of the ids, on the CPU.

    Attributes:
        id: (N,) image ids.
        predictions: per image ``boxes`` (D, 4) in pixels, ``scores`` (D,), ``labels`` (D,).
    """

    id: np.ndarray
    predictions: list[dict[str, Tensor]]

    def of(self, ids: np.ndarray) -> list[dict[str, Tensor]]:
        """Predictions of some images, in the given order."""
        place = {int(sample): row for row, sample in enumerate(self.id)}
        return [self.predictions[place[int(sample)]] for sample in ids]


def find(model: Model, dataset: DetectionDataset, batch_size: int = 32) -> Findings:
    """Run a detector once over a data set, in eval mode, without gradients.

    With `torch.distributed` the images are divided among the processes, and every process gets the
    findings of all.

    Raises:
        CapabilityError: the model is no detector.
        DataError: there are no images.
        ModelError: the model changed its own weights or buffers while it was evaluated.
    """
    if not isinstance(model, Detector):
        raise CapabilityError(
            f"an audit of detections needs a Detector, but this is a {type(model).__name__}"
        )
    if not len(dataset):
        raise DataError(f"'{dataset.name}' has no images; an audit needs some")
    before = state_hash(model)
    world, rank = 1, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    positions = np.arange(len(dataset))[rank::world]
    own: list[tuple[int, dict[str, Tensor]]] = []
    for start in range(0, len(positions), batch_size):
        batch = dataset[positions[start : start + batch_size].tolist()]
        moved = {key: value.to(model.device) for key, value in batch.items()}
        with evaluating(model), torch.autocast(model.device.type, enabled=False):
            found = model.detect(moved)
        own += [
            (
                int(sample),
                {
                    "boxes": one.boxes.cpu(),
                    "scores": one.scores.cpu(),
                    "labels": one.labels.cpu(),
                },
            )
            for sample, one in zip(batch["id"], found, strict=True)
        ]
    if state_hash(model) != before:
        raise ModelError(
            f"{type(model).__name__} changed its weights or buffers while it was evaluated; "
            "its forward pass must not do so in eval mode"
        )
    parts: list[Any] = [own]
    if world > 1:
        parts = [own] * world
        torch.distributed.all_gather_object(parts, own)
    rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
    return Findings(np.array([row[0] for row in rows]), [row[1] for row in rows])


def objects_of(dataset: DetectionDataset) -> list[dict[str, Tensor]]:
    """The shown objects per image: ``boxes`` (K, 4), ``labels`` (K,), ``iscrowd`` (K,)."""
    found = []
    for position in range(len(dataset)):
        boxes, labels, crowd = dataset.objects(position)
        found.append(
            {
                "boxes": torch.from_numpy(boxes),
                "labels": torch.from_numpy(labels),
                "iscrowd": torch.from_numpy(crowd).long(),
            }
        )
    return found


def precision_of(
    findings: Findings, part: DetectionDataset, classes: Sequence[int], middle: float, most: int
) -> Precision:
    """Average precision on the images of a role with the boxes of that role."""
    return average_precision(findings.of(part.ids), objects_of(part), classes, middle, most)


def middle_size(dataset: DetectionDataset) -> float:
    """Median side in pixels (root of the area) of the labelled objects of a data set."""
    left, top, right, bottom = dataset.annotations.boxes.T
    return float(np.median(np.sqrt((right - left) * (bottom - top))))


def role_precision(
    model: Model, data: ForgetDataModule, stage: Stage = "test", batch_size: int = 32
) -> list[dict[str, Any]]:
    """Average precision on forget, retain and previously forgotten classes of a stage.

    Args:
        model: a `Detector`.
        data: with a request that names classes.
        stage: ``test`` or ``val``.
        batch_size: of the forward passes.

    Returns:
        One row per role that has objects: ``{"split", "average_precision" in [0, 1], "n"}``, where
        n counts the objects.

    Raises:
        ConfigurationError: the data has no request.
    """
    assert isinstance(data, DetectionDataModule)  # what a detector is trained on
    whole = data.dataset(stage)
    assert isinstance(whole, DetectionDataset)
    findings = find(model, whole, batch_size)
    middle, most = middle_size(whole), int(getattr(model, "most", 100))
    rows = []
    for role in ROLES:
        part = data.subset(stage, role, whole=True)  # type: ignore[arg-type]
        classes = role_classes(data, role)
        if len(part) and classes:
            found = precision_of(findings, part, classes, middle, most)
            if found.value is not None:
                rows.append({"split": role, "average_precision": found.value, "n": found.objects})
    return rows


def role_classes(data: DetectionDataModule, role: str) -> tuple[int, ...]:
    """The classes of a role; a request that names images forgets all of their classes."""
    split = data.split
    assert split is not None  # `subset` has refused data without a request
    chosen = {
        "forget": split.forget_classes,
        "retain": split.retain_classes,
        "previous": split.previous_classes,
    }[role]
    if role == "forget" and not chosen:
        return tuple(range(len(split.class_names)))
    return chosen
