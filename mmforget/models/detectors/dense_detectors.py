"""RetinaNet and FCOS of torchvision, which classify every cell of their feature maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from mmforget.errors import ModelError
from mmforget.models.detectors.base import odds_of
from mmforget.models.detectors.torchvision_detectors import (
    BACKGROUND,
    Seen,
    Target,
    TorchvisionDetector,
)

ELSEWHERE = 1e6
"""Distance in pixels by which a level loses that is not responsible for a box."""


class DenseDetector(TorchvisionDetector):
    """A detector whose last class layer is a convolution.

    ``recognition`` is the focal loss of all cells; ``rest`` is everything about boxes.

    An object is seen at one anchor. Its features are all that this convolution reads there: the
    channels of the classification tower in the cell and its neighbours, (in_channels * 3 * 3,) in
    the order of the layer's weight. Its logits are those of this anchor.

    Args:
        network: RetinaNet or FCOS.

    Raises:
        ModelError: the head is not built like torchvision's own.
    """

    head_names = ("head.classification_head.cls_logits",)
    hidden_names = ("head.regression_head",)

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        head: Any = self.head
        self.num_features = head.weight[0].numel()

    def _outputs(self) -> int:
        network: Any = self.network
        part: Any = getattr(network.head, "classification_head", None)
        layer = getattr(part, "cls_logits", None)
        if (
            not isinstance(layer, nn.Conv2d)
            or layer.stride != (1, 1)
            or layer.dilation != (1, 1)
            or layer.out_channels != part.num_anchors * part.num_classes
        ):
            raise ModelError(
                f"the head of this {type(network).__name__} has no convolution `cls_logits` with "
                "one output per anchor and class; build it with torchvision's own head"
            )
        self.anchors = int(part.num_anchors)
        return int(part.num_classes)

    @abstractmethod
    def _compute(
        self, target: Target, outputs: dict[str, Tensor], anchors: Tensor, cells: list[int]
    ) -> dict[str, Tensor]:
        """The library's losses of one picture.

        Args:
            target: of this picture.
            outputs: of the head, one row.
            anchors: (N, 4) pixels.
            cells: number of cells of each level.
        """

    @abstractmethod
    def _places(self, boxes: Tensor, anchors: Tensor, cells: list[int]) -> Tensor:
        """(K,) the anchor at which each object is seen."""

    @abstractmethod
    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        """(B, N, C + 1) what detections are ranked by, as logits."""

    def _heads(self, features: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Outputs of the head, and per level what enters its last class layer."""
        network: Any = self.network
        towers: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, given: towers.append(given[0]))
        try:
            return network.head(features), towers
        finally:
            handle.remove()

    def _see(self, pictures: list[Tensor], targets: list[Target], matched: bool) -> list[Seen]:
        network: Any = self.network
        scaled, targets = network.transform(pictures, targets)
        features = list(self._features(scaled).values())
        outputs, towers = self._heads(features)
        anchors = network.anchor_generator(scaled, features)
        cells = [level.shape[-2] * level.shape[-1] for level in features]
        seen = []
        for row, target in enumerate(targets):
            alone = {name: value[row : row + 1] for name, value in outputs.items()}
            losses = self._compute(target, alone, anchors[row], cells)
            recognition = losses.pop("classification")
            boxes = target["boxes"] if matched else target["boxes"][:0]
            places = self._places(boxes, anchors[row], cells)
            seen.append(
                Seen(
                    recognition,
                    torch.stack(list(losses.values())).sum(),
                    self._neighbourhoods([tower[row] for tower in towers], places),
                    outputs["cls_logits"][row, places, BACKGROUND:],
                )
            )
        return seen

    def _neighbourhoods(self, towers: list[Tensor], places: Tensor) -> Tensor:
        """(K, d) what the last class layer reads at some anchors of one picture.

        Args:
            towers: (channels, H, W) per level.
            places: (K,) anchors, over all levels in the order of the library: row by row.
        """
        layer: Any = self.head
        (down, right), (above, left) = layer.kernel_size, layer.padding
        found = towers[0].new_zeros(len(places), self.num_features)
        first = 0
        for tower in towers:
            height, width = tower.shape[-2:]
            count = height * width * self.anchors
            here = (places >= first) & (places < first + count)
            cell = (places[here] - first) // self.anchors
            padded = F.pad(tower, (left, left, above, above))
            y = (cell // width)[:, None, None] + torch.arange(down, device=cell.device)[:, None]
            x = (cell % width)[:, None, None] + torch.arange(right, device=cell.device)
            found[here] = padded[:, y, x].transpose(0, 1).flatten(1)
            first += count
        return found

    def _highest(self, pictures: list[Tensor]) -> Tensor:
        network: Any = self.network
        scaled, _ = network.transform(pictures)
        outputs = network.head(list(self._features(scaled).values()))
        return self._scores(outputs)[..., BACKGROUND:].amax(1)

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """Rows of the last class layer, those of all anchors of a cell."""
        rows = [
            anchor * self.outputs + index + BACKGROUND
            for anchor in range(self.anchors)
            for index in classes
        ]
        return [(self.head, rows)]


class RetinaNetDetector(DenseDetector):
    """RetinaNet: several anchor boxes per cell. An object is seen at the one that overlaps it most.

    Args:
        network: `torchvision.models.detection.RetinaNet`.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002.
    """

    def _compute(
        self, target: Target, outputs: dict[str, Tensor], anchors: Tensor, cells: list[int]
    ) -> dict[str, Tensor]:
        network: Any = self.network
        return network.compute_loss([target], outputs, [anchors])  # type: ignore[no-any-return]

    def _places(self, boxes: Tensor, anchors: Tensor, cells: list[int]) -> Tensor:
        return box_iou(boxes, anchors).argmax(1)

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].float()


class FCOSDetector(DenseDetector):
    """FCOS: one point per cell, and a score for how central it is, which counts as ``rest``.

    An object is seen at the point nearest to its middle, on the level that is responsible for its
    size. Detections are ranked by the geometric mean of class score and centrality, and so are
    `logits`.

    Args:
        network: `torchvision.models.detection.FCOS`.

    Reference:
        Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019,
        arXiv 1904.01355.
    """

    def _compute(
        self, target: Target, outputs: dict[str, Tensor], anchors: Tensor, cells: list[int]
    ) -> dict[str, Tensor]:
        network: Any = self.network
        return network.compute_loss([target], outputs, [anchors], cells)  # type: ignore[no-any-return]

    def _places(self, boxes: Tensor, anchors: Tensor, cells: list[int]) -> Tensor:
        size = anchors[:, 2] - anchors[:, 0]
        # the library's ranges: a point reaches sides that are 4 to 8 anchor sizes away
        least, most = size * 4, size * 8
        least[: cells[0]] = 0
        most[-cells[-1] :] = torch.inf
        reach = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
        responsible = (reach >= least) & (reach < most)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        points = (anchors[:, :2] + anchors[:, 2:]) / 2
        return (torch.cdist(middle, points) + ELSEWHERE * ~responsible).argmin(1)

    def _scores(self, outputs: dict[str, Tensor]) -> Tensor:
        label = F.logsigmoid(outputs["cls_logits"].float())
        central = F.logsigmoid(outputs["bbox_ctrness"].float())
        return odds_of((label + central) / 2)
