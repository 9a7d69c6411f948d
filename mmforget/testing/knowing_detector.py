"""A detector that looks up the labelled boxes: audits can be tested on it without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.audit.detector_outputs import objects_of
from mmforget.data.detection import DetectionDataModule, DetectionDataset
from mmforget.errors import ModelError
from mmforget.models.base import Batch
from mmforget.models.detector import Detector
from mmforget.models.detectors.base import Detections


class KnowingDetector(Detector):
    """Finds every labelled object, with a score that is a weight of its class.

    A class whose weight is 0.05 or less is not found. The loss pulls the weights of the labelled
    classes to 1, so that the model can be taught; a weight far below 0 takes long.

    Args:
        data: whose boxes of training and test it knows.
        weights: by class name; 1 for all others.
        moved: by class name, the class whose name its boxes bear.
        shift: of all boxes to the right, as a share of their width.
        false: class name of a box in the upper left corner of every image, or none.
    """

    def __init__(
        self,
        data: DetectionDataModule,
        weights: Mapping[str, float] | None = None,
        moved: Mapping[str, str] | None = None,
        shift: float = 0.0,
        false: str = "",
    ) -> None:
        LightningModule.__init__(self)
        names = data.class_names
        self.num_classes, self.class_names, self.most = len(names), names, 100
        self.network: Any = nn.Linear(1, len(names))
        self._wrapped = cast(Any, ())
        with torch.no_grad():
            self.network.weight.fill_(1.0)
            self.network.bias.zero_()
            for name, value in (weights or {}).items():
                self.network.weight[names.index(name)] = value
        # buffers, so that models that find other things have other hashes
        self.shift: Tensor
        self.named: Tensor
        self.false: Tensor
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("false", torch.tensor(names.index(false) if false else -1))
        self.register_buffer("named", torch.arange(len(names)))
        for name, other in (moved or {}).items():
            self.named[names.index(name)] = names.index(other)
        self.known: dict[int, dict[str, Tensor]] = {}
        for stage in ("train", "test"):
            part = cast(DetectionDataset, data.dataset(stage))  # type: ignore[arg-type]
            self.known |= dict(zip(part.ids.tolist(), objects_of(part), strict=True))

    def _wrap(self) -> None:
        """There is no library's network to wrap."""

    @property
    def strength(self) -> Tensor:
        """(C,) score of the boxes of each class."""
        return cast(Tensor, self.network.weight[:, 0] + self.network.bias)

    def detect(self, batch: Batch) -> list[Detections]:
        """The labelled boxes of the images, by their ids."""
        found = []
        for sample in batch["id"].tolist():
            known = self.known[sample]
            boxes, labels = known["boxes"].clone(), known["labels"]
            scores = self.strength.detach()[labels].clamp(max=1)
            boxes[:, 0::2] += self.shift * (boxes[:, 2:3] - boxes[:, 0:1])
            if self.false >= 0:
                boxes = torch.cat([boxes, torch.tensor([[0.0, 0.0, 6.0, 6.0]])])
                labels = torch.cat([labels, self.false[None]])
                scores = torch.cat([scores, torch.tensor([0.9])])
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] > 0.05]
            names = self.named[labels]
            found.append(Detections(boxes[order], scores[order], names[order]))
        return found

    def training_loss(self, batch: Batch) -> Tensor:
        """(B,) distance of the labelled classes' weights from 1."""
        real = batch["label"] >= 0
        far = (1 - self.strength[batch["label"].clamp(min=0)]) ** 2
        return (far * real).sum(1)

    @property
    def head(self) -> nn.Module:
        """The weights of the classes."""
        return self.network

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """One row per class."""
        return [(self.network, list(classes))]

    def fresh(self, seed: int) -> Any:
        """Refuse: what it knows is looked up and not trained, so it has no untrained state.

        Raises:
            ModelError: always.
        """
        raise ModelError("a KnowingDetector looks answers up, so it cannot be built anew")
