"""Detectors of torchvision: what Faster R-CNN, RetinaNet and FCOS have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from mmforget.errors import ModelError
from mmforget.models.base import Instances, LossParts
from mmforget.models.detectors.base import DetectionNetwork, Detections, Objects

BACKGROUND = 1
"""Classes of torchvision before the first of ours: class 0 is the background."""

Target = dict[str, Tensor]
"""``boxes`` (K, 4) in pixels and ``labels`` (K,) as torchvision counts them."""


def torchvision_detector(network: nn.Module) -> TorchvisionDetector:
    """Put a network of torchvision behind the common contract.

    Args:
        network: Faster R-CNN, RetinaNet or FCOS, whatever its backbone.

    Raises:
        ModelError: another network, or one whose head mmforget cannot read.
    """
    from torchvision.models import detection

    from mmforget.models.detectors.dense_detectors import FCOSDetector, RetinaNetDetector
    from mmforget.models.detectors.faster_rcnn import FasterRCNNDetector

    masks = isinstance(network, detection.MaskRCNN | detection.KeypointRCNN)
    if isinstance(network, detection.FasterRCNN) and not masks:
        return FasterRCNNDetector(network)
    if isinstance(network, detection.RetinaNet):
        return RetinaNetDetector(network)
    if isinstance(network, detection.FCOS):
        return FCOSDetector(network)
    raise ModelError(
        f"{type(network).__name__} is not one of the detectors that mmforget knows from "
        "torchvision (FasterRCNN, RetinaNet, FCOS); take one of these, or one of transformers"
    )


class Seen(NamedTuple):
    """One picture and its objects.

    Attributes:
        recognition: () classification part of the loss.
        rest: () the other parts.
        features: (K, d) one row per object.
        logits: (K, C) one row per object.
    """

    recognition: Tensor
    rest: Tensor
    features: Tensor
    logits: Tensor


class TorchvisionDetector(DetectionNetwork):
    """Base of the detectors of torchvision; pictures are normalised and resized by the network.

    Pictures are cut out of the canvas and given to the network's own transform. In evaluation mode,
    those that the transform pads to one size run together; thus a value of a picture does not
    depend on the size of the others. In training mode all pictures of a batch run together, as in
    the library's own training, and `training_loss` is the loss itself.

    Our class c is class c + 1 of the network. Faster R-CNN keeps class 0 for the background.
    RetinaNet and FCOS have no background, but torchvision's recipe counts one all the same; what
    they find of class 0 is left out.

    `detect` gives what the network itself gives: above its ``score_thresh``, and no more than its
    ``detections_per_img``.

    Args:
        network: the native network.

    Raises:
        ModelError: the network has no class besides the background.
    """

    library: ClassVar[str] = "torchvision"

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.outputs = self._outputs()
        self.num_classes = self.outputs - BACKGROUND
        if self.num_classes < 1:
            raise ModelError(
                f"{type(network).__name__} has {self.outputs} classes including the background, so "
                "it can find nothing; build it with at least 2"
            )

    @abstractmethod
    def _outputs(self) -> int:
        """Number of classes as the network counts them; raise `ModelError` for unknown heads."""

    @abstractmethod
    def _see(self, pictures: list[Tensor], targets: list[Target], matched: bool) -> list[Seen]:
        """Losses, and if `matched` features and logits of the objects."""

    @abstractmethod
    def _highest(self, pictures: list[Tensor]) -> Tensor:
        """(B, C) highest scores as logits."""

    def _deciding(self) -> list[nn.Module]:
        """Modules whose `training` flag decides between losses and detections."""
        return [self.network, self.network.transform]  # type: ignore[list-item]

    # ---- pictures -------------------------------------------------------------------------------

    def _groups(self, images: Tensor, extent: Tensor) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Rows and pictures that run together."""
        sizes = [(int(height), int(width)) for height, width in extent.tolist()]
        kinds: list[Any] = [None] * len(sizes)
        if not self.network.training and len(set(sizes)) > 1:
            padded = {size: self._padded(size) for size in set(sizes)}
            kinds = [padded[size] for size in sizes]
        for kind in dict.fromkeys(kinds):
            rows = [row for row, own in enumerate(kinds) if own == kind]
            yield rows, [images[row, :, : sizes[row][0], : sizes[row][1]] for row in rows]

    def _padded(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of a picture as it enters the backbone; nothing is computed."""
        network: Any = self.network
        found, _ = network.transform([torch.empty(3, *size, device="meta")])
        return tuple(found.tensors.shape)

    def _features(self, pictures: Any) -> dict[str, Tensor]:
        network: Any = self.network
        found = network.backbone(pictures.tensors)
        return {"0": found} if isinstance(found, Tensor) else found

    # ---- contract -------------------------------------------------------------------------------

    def _seen(
        self, images: Tensor, extent: Tensor, objects: Sequence[Objects], matched: bool
    ) -> list[Seen]:
        targets = [
            {"boxes": one.boxes.to(images), "labels": one.labels + BACKGROUND} for one in objects
        ]
        seen: dict[int, Seen] = {}
        for rows, pictures in self._groups(images, extent):
            own = [targets[row] for row in rows]
            seen.update(zip(rows, self._see(pictures, own, matched), strict=True))
        return [seen[row] for row in range(len(images))]

    def instances(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Instances:
        """Every object at its box; see `DetectionNetwork.instances`."""
        seen = self._seen(images, extent, objects, matched=True)
        counts = torch.tensor([len(one.labels) for one in objects])
        rows = torch.arange(len(seen)).repeat_interleave(counts)
        return Instances(
            features=torch.cat([one.features for one in seen]),
            logits=torch.cat([one.logits for one in seen]),
            label=torch.cat([one.labels for one in objects]),
            row=rows.to(images.device),
            loss=_stacked(seen),
        )

    def losses(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> LossParts:
        """(B,) parts of the loss, by the library's own code on each picture."""
        return _stacked(self._seen(images, extent, objects, matched=False))

    def training_loss(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Tensor:
        """(B,) the loss: there are no auxiliary ones."""
        return self.losses(images, extent, objects).total

    def logits(self, images: Tensor, extent: Tensor) -> Tensor:
        """(B, C) the highest score of each class in the picture, as a logit."""
        found: dict[int, Tensor] = {}
        with switched(self._deciding(), training=False):
            for rows, pictures in self._groups(images, extent):
                found.update(zip(rows, self._highest(pictures), strict=True))
        return torch.stack([found[row] for row in range(len(images))])

    def detect(self, images: Tensor, extent: Tensor, most: int) -> list[Detections]:
        """What the network finds by itself, best first; `DetectionNetwork.detect`."""
        found: dict[int, Detections] = {}
        with switched(self._deciding(), training=False):
            for rows, pictures in self._groups(images, extent):
                for row, picture, one in zip(rows, pictures, self.network(pictures), strict=True):
                    real = one["labels"] >= BACKGROUND
                    boxes = clip_boxes_to_image(one["boxes"][real], picture.shape[-2:])
                    found[row] = Detections(
                        boxes[:most],
                        one["scores"][real][:most],
                        one["labels"][real][:most] - BACKGROUND,
                    )
        return [found[row] for row in range(len(images))]


def _stacked(seen: Sequence[Seen]) -> LossParts:
    return LossParts(
        torch.stack([one.recognition for one in seen]), torch.stack([one.rest for one in seen])
    )


@contextmanager
def switched(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Set the `training` flag of some modules for a while, and of none of their children."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode
