"""Faster R-CNN of torchvision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import ModelError
from mmforget.models.detectors.base import log_odds
from mmforget.models.detectors.torchvision_detectors import (
    BACKGROUND,
    Seen,
    Target,
    TorchvisionDetector,
    switched,
)
from mmforget.seeds import derive

CERTAINLY_NOT = -1e4
"""Logit of all classes in a picture in which nothing was proposed."""


class FasterRCNNDetector(TorchvisionDetector):
    """Faster R-CNN: proposals, which the box head then classifies.

    ``recognition`` is the classification loss of the box head. Whether a proposal shows any object
    at all knows no classes, so that this loss is in ``rest``, like those of the boxes. An object's
    features are those of the box head at its labelled box.

    The losses come from proposals that the library draws at random. In evaluation mode they are the
    same at every call and in every batch; in training mode they are drawn anew.

    Args:
        network: `torchvision.models.detection.FasterRCNN`.

    Raises:
        ModelError: its predictor has no linear layer ``cls_score``.

    Reference:
        Ren et al., Faster R-CNN, NeurIPS 2015, arXiv 1506.01497.
    """

    head_names = ("roi_heads.box_predictor.cls_score",)
    hidden_names = ("roi_heads.box_predictor.bbox_pred", "rpn")

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        head: Any = self.head
        self.num_features = head.in_features

    def _outputs(self) -> int:
        network: Any = self.network
        layer = getattr(network.roi_heads.box_predictor, "cls_score", None)
        if not isinstance(layer, nn.Linear):
            raise ModelError(
                "the box predictor of this Faster R-CNN has no linear layer `cls_score`; build it "
                "with torchvision's FastRCNNPredictor"
            )
        return layer.out_features

    def _deciding(self) -> list[nn.Module]:
        network: Any = self.network
        return [*super()._deciding(), network.rpn, network.roi_heads]

    @contextmanager
    def _draws(self, device: torch.device) -> Iterator[None]:
        """Random numbers of the sampling of proposals."""
        if self.network.training:
            yield
            return
        seed = derive(0, "proposals")
        if device.type != "cuda":
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                yield
            return
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            torch.default_generator.manual_seed(seed)
            torch.cuda.manual_seed(seed)
            yield

    def _see(self, pictures: list[Tensor], targets: list[Target], matched: bool) -> list[Seen]:
        from torchvision.models.detection.image_list import ImageList
        from torchvision.models.detection.roi_heads import fastrcnn_loss

        network: Any = self.network
        scaled, targets = network.transform(pictures, targets)
        features = self._features(scaled)
        chosen, labels, shifts, proposing = [], [], [], []
        with switched([network.rpn], training=True):  # else it gives no losses
            for row, target in enumerate(targets):
                alone = ImageList(scaled.tensors[row : row + 1], scaled.image_sizes[row : row + 1])
                maps = {name: value[row : row + 1] for name, value in features.items()}
                with self._draws(scaled.tensors.device):
                    proposals, losses = network.rpn(alone, maps, [target])
                    boxes, _, label, shift = network.roi_heads.select_training_samples(
                        proposals, [target]
                    )
                proposing.append(sum(losses.values()))
                chosen += boxes
                labels.append(label)
                shifts.append(shift)
        pooled = chosen
        if matched:  # the box head sees the labelled boxes after the drawn ones
            pooled = [torch.cat([a, b["boxes"]]) for a, b in zip(chosen, targets, strict=True)]
        hidden, scores, moves = self._classified(features, pooled, scaled.image_sizes)
        seen, start = [], 0
        for row, boxes in enumerate(pooled):
            middle, end = start + len(chosen[row]), start + len(boxes)
            drawn = slice(start, middle)
            recognition = drawing = scores[drawn].sum()  # 0 if there is no proposal
            if middle > start:
                recognition, drawing = fastrcnn_loss(
                    scores[drawn], moves[drawn], labels[row], shifts[row]
                )
            seen.append(
                Seen(
                    recognition,
                    proposing[row] + drawing,
                    hidden[middle:end],
                    scores[middle:end, BACKGROUND:],
                )
            )
            start = end
        return seen

    def _classified(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the predictor (M, d), its scores (M, C + 1) and its moves of the boxes."""
        network: Any = self.network
        hidden = network.roi_heads.box_head(network.roi_heads.box_roi_pool(features, boxes, sizes))
        scores, moves = network.roi_heads.box_predictor(hidden)
        return hidden.flatten(1), scores, moves

    def _highest(self, pictures: list[Tensor]) -> Tensor:
        network: Any = self.network
        scaled, _ = network.transform(pictures)
        features = self._features(scaled)
        boxes, _ = network.rpn(scaled, features)
        _, scores, _ = self._classified(features, boxes, scaled.image_sizes)
        odds = log_odds(scores)[:, BACKGROUND:]
        return torch.stack(
            [
                own.amax(0) if len(own) else own.new_full((self.num_classes,), CERTAINLY_NOT)
                for own in odds.split([len(one) for one in boxes])
            ]
        )

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """Rows of the box predictor; its first one is the background."""
        return [(self.head, [index + BACKGROUND for index in classes])]
