"""What every detection network can do, whoever built it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmforget.models.base import Instances, LossParts


@dataclass(frozen=True)
class Objects:
    """The labelled objects of one image.

    Attributes:
        boxes: (K, 4) left, top, right, bottom in pixels.
        labels: (K,) int64 class indices.
    """

    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image, best first.

    Attributes:
        boxes: (D, 4) left, top, right, bottom in pixels.
        scores: (D,) in [0, 1].
        labels: (D,) int64 class indices.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def above(self, score: float) -> Detections:
        """Those with at least this score."""
        chosen = self.scores >= score
        return Detections(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


class DetectionNetwork(ABC):
    """One kind of network: its losses, its matched objects, its detections, its head.

    Pictures come as (B, 3, H, W) floats in [0, 1], of which ``extent`` (B, 2) says the true height
    and width; boxes are in pixels. A value of one image depends on this image alone, not on the
    others of the batch (batch normalisation in training mode excepted).

    Args:
        network: the native network. Not a submodule of this object: the family registers it.

    Attributes:
        num_classes: classes without background.
        num_features: size of what enters the head.
        head_names: qualified names of the layers that score classes, the last one of the decoder
            or the detection head first.
        hidden_names: further layers that no method may adapt, such as those that draw boxes.
        library: who loads what is saved.
    """

    library: ClassVar[str]
    num_classes: int
    num_features: int
    head_names: tuple[str, ...]
    hidden_names: tuple[str, ...] = ()

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @abstractmethod
    def instances(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Instances:
        """The objects as the network sees them: matched queries, or features at their boxes.

        Objects come in the order of the images, and within an image in the given one. One that
        nothing can be matched to (more objects than queries) is left out.

        Returns:
            With ``loss`` (B,): what the library's loss is for this image alone, without the losses
            of earlier decoder layers.
        """

    def losses(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> LossParts:
        """(B,) parts of the loss; override where features at objects would cost more."""
        return self.instances(images, extent, objects).loss

    @abstractmethod
    def training_loss(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Tensor:
        """(B,) what training from scratch minimises, auxiliary losses included."""

    @abstractmethod
    def logits(self, images: Tensor, extent: Tensor) -> Tensor:
        """(B, C) the highest score of each class anywhere in the image, as a logit."""

    @abstractmethod
    def detect(self, images: Tensor, extent: Tensor, most: int) -> list[Detections]:
        """At most `most` detections per image; boxes are clipped to the picture."""

    @abstractmethod
    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """See `mmforget.models.base.Model.class_rows`: the layers of the final scores."""

    @property
    def head(self) -> nn.Module:
        """The layer that gives the final class scores."""
        return self.network.get_submodule(self.head_names[0])


def log_odds(scores: Tensor) -> Tensor:
    """What a sigmoid needs to give the probabilities of a softmax over the last dimension.

    Args:
        scores: (..., C) logits of classes that exclude each other.

    Returns:
        (..., C) logits, each of a class against all others together.
    """
    return odds_of(scores.float().log_softmax(-1))


def odds_of(share: Tensor) -> Tensor:
    """Logits of probabilities that are given as logarithms."""
    return share - torch.log1p(-share.exp().clamp(max=1 - 1e-6))
