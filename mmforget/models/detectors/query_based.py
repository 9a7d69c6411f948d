"""Detectors of transformers that match queries to objects: DETR and its descendants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss

from mmforget.errors import ModelError
from mmforget.models.base import Instances, LossParts
from mmforget.models.detectors.base import DetectionNetwork, Detections, Objects, log_odds

Targets = list[dict[str, Tensor]]
"""Per image ``class_labels`` (K,) and ``boxes`` (K, 4), centre and size as shares of the image."""


class Pairs(NamedTuple):
    """Which query belongs to which object, over a whole batch.

    Attributes:
        image: (M,) row of the batch.
        query: (M,) row of the queries.
        place: (M,) row of the objects of that image.
    """

    image: Tensor
    query: Tensor
    place: Tensor


class QueryDetector(DetectionNetwork):
    """DETR, Conditional DETR, Deformable DETR and RT-DETR of transformers.

    Per image, with n its number of objects (at least 1), over all queries q and the pairs that the
    library's Hungarian matcher finds::

        recognition = w_class * (cross-entropy, focal or varifocal loss of all queries)
        rest = w_box * sum |box - target|_1 / n + w_giou * sum (1 - GIoU) / n

    The library divides by the objects of the whole batch instead, so that an image counts by how
    many objects it holds; for a single image the two agree.

    Differs from the library in one number: the focal loss of Conditional and Deformable DETR counts
    twice, as in the authors' code and in GS-LoRA's; in transformers it counts once.

    Args:
        network: ``...ForObjectDetection``.
        mean, std: (3,) normalisation of the pixels.

    Raises:
        ModelError: not one of these networks.

    Reference:
        Carion et al., End-to-End Object Detection with Transformers, ECCV 2020, arXiv 2005.12872;
        Zhu et al., Deformable DETR, ICLR 2021, arXiv 2010.04159; Meng et al., Conditional DETR,
        ICCV 2021, arXiv 2108.06152; Zhao et al., DETRs Beat YOLOs on Real-time Object Detection,
        CVPR 2024, arXiv 2304.08069.
    """

    library: ClassVar[str] = "transformers"

    KINDS: ClassVar[tuple[str, ...]] = ("detr", "conditional_detr", "deformable_detr", "rt_detr")

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__(network)
        config: Any = network.config
        self.kind: str = config.model_type
        if self.kind not in self.KINDS:
            raise ModelError(
                f"'{self.kind}' is not one of the detectors that mmforget knows from transformers "
                f"({', '.join(self.KINDS)}); take one of these, or one of torchvision"
            )
        self.config = config
        self.mean, self.std = mean, std
        self.num_classes = config.num_labels
        self.num_features = config.d_model
        # a picture's boxes are shares of the picture, or of the canvas where no mask is read
        self.masked = self.kind != "rt_detr"
        if self.kind in ("detr", "conditional_detr"):
            self.head_names, self.hidden_names = ("class_labels_classifier",), ("bbox_predictor",)
        else:
            where = "model.decoder." if self.kind == "rt_detr" else ""
            layers = len(network.get_submodule(f"{where}class_embed"))  # type: ignore[arg-type]
            last = config.decoder_layers - 1  # two-stage networks have one more, for proposals
            order = [last, *(i for i in range(layers) if i != last)]
            self.head_names = tuple(f"{where}class_embed.{i}" for i in order)
            self.hidden_names = tuple(
                name
                for name in ("bbox_embed", "model.decoder.bbox_embed", "model.decoder.class_embed",
                             "model.enc_score_head", "model.enc_bbox_head")
                if _has(network, name) and not self.head_names[0].startswith(name)
            )  # fmt: skip
        self.matcher = self._matcher()

    def _matcher(self) -> nn.Module:
        config = self.config
        if self.kind == "rt_detr":
            from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

            return RTDetrHungarianMatcher(config)
        if self.kind == "detr":
            from transformers.loss.loss_for_object_detection import HungarianMatcher as Matcher
        else:
            from transformers.loss.loss_deformable_detr import (
                DeformableDetrHungarianMatcher as Matcher,
            )
        return Matcher(
            class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
        )

    @property
    def weights(self) -> tuple[float, float, float]:
        """Weights of class, box and GIoU loss."""
        config = self.config
        if self.kind == "rt_detr":
            return config.weight_loss_vfl, config.weight_loss_bbox, config.weight_loss_giou
        label = 1.0 if self.kind == "detr" else 2.0
        return label, config.bbox_loss_coefficient, config.giou_loss_coefficient

    # ---- forward --------------------------------------------------------------------------------

    def _inputs(self, images: Tensor, extent: Tensor) -> dict[str, Tensor]:
        """Normalised pixels, grey beyond the picture, and the mask of the picture."""
        height, width = self._canvas(images)
        missing = (0, width - images.shape[-1], 0, height - images.shape[-2])
        images = F.pad(images, missing)
        rows = torch.arange(height, device=images.device) < extent[:, :1]
        columns = torch.arange(width, device=images.device) < extent[:, 1:]
        mask = rows[:, :, None] & columns[:, None, :]
        images = images.to(self.mean)  # the precision of the network
        mean, std = (value.view(1, -1, 1, 1) for value in (self.mean, self.std))
        pixels = (images - mean) / std * mask[:, None]
        return {"pixel_values": pixels, "pixel_mask": mask.long()}

    def _canvas(self, images: Tensor) -> tuple[int, int]:
        """Height and width of what the network sees: RT-DETR's levels must halve evenly."""
        step = 1 if self.masked else max(self.config.feat_strides)
        height, width = (-(-side // step) * step for side in images.shape[-2:])
        return height, width

    def _size(self, images: Tensor, extent: Tensor) -> Tensor:
        """(B, 4) what boxes are shares of: width, height, width, height in pixels."""
        height, width = extent.T.to(images.dtype)
        if not self.masked:
            rows, columns = self._canvas(images)
            height, width = torch.full_like(height, rows), torch.full_like(width, columns)
        return torch.stack([width, height, width, height], dim=1)

    def _targets(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Targets:
        sizes = self._size(images, extent)
        return [
            {
                "class_labels": one.labels,
                "boxes": box_convert(one.boxes, "xyxy", "cxcywh").to(images) / size,
            }
            for one, size in zip(objects, sizes, strict=True)
        ]

    def _hidden(self, output: Any) -> Tensor:
        """(B, Q, d) what enters the last class layer."""
        return output.last_hidden_state

    # ---- losses ---------------------------------------------------------------------------------

    def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Pairs:
        """Pair queries with objects; see `Pairs`.

        Args:
            logits: (B, Q, C) or (B, Q, C + 1).
            boxes: (B, Q, 4) as shares.
            targets: per image.
        """
        # The matcher computes in single precision and stops at what is not finite; whoever trains
        # shall see the loss, which is not finite either.
        given = {
            "logits": logits.float().nan_to_num(),
            "pred_boxes": boxes.float().nan_to_num(),
        }
        goals = [one | {"boxes": one["boxes"].float()} for one in targets]
        found = self.matcher(given, goals)
        image, query, place = [], [], []
        for row, (queries, places) in enumerate(found):
            order = places.argsort()  # objects in the order in which they were given
            image.append(torch.full_like(queries, row))
            query.append(queries[order])
            place.append(places[order])
        device = logits.device
        return Pairs(*(torch.cat(parts).to(device) for parts in (image, query, place)))

    def criterion(
        self, logits: Tensor, boxes: Tensor, targets: Targets, pairs: Pairs, groups: int = 1
    ) -> LossParts:
        """(B,) weighted loss parts of the predictions of one decoder layer.

        Args:
            logits: (B, Q, C) or (B, Q, C + 1) class scores.
            boxes: (B, Q, 4) predicted boxes as shares.
            targets: per image.
            pairs: who belongs to whom.
            groups: how often each object is paired (denoising repeats them).
        """
        logits, boxes = _precise(logits), _precise(boxes)
        size = len(targets)
        counts = torch.tensor([len(t["class_labels"]) for t in targets], device=logits.device)
        normaliser = counts.clamp(min=1).float() * groups
        starts = counts.cumsum(0) - counts
        flat = starts[pairs.image] + pairs.place
        label = torch.cat([t["class_labels"] for t in targets])[flat]
        target = torch.cat([t["boxes"] for t in targets])[flat].to(boxes)
        found = boxes[pairs.image, pairs.query]
        corners, goal = (box_convert(value, "cxcywh", "xyxy") for value in (found, target))
        distance = _per_image((found - target).abs().sum(1), pairs.image, size) / normaliser
        overlap = generalized_box_iou_loss(corners, goal, reduction="none")
        overlap = _per_image(overlap, pairs.image, size) / normaliser
        if self.kind == "detr":
            recognition = self._cross_entropy(logits, label, pairs)
        else:
            wanted = torch.zeros_like(logits)
            if self.kind == "rt_detr":
                iou = box_iou(corners.detach(), goal).diagonal()
                wanted[pairs.image, pairs.query, label] = iou
                recognition = self._varifocal(logits, wanted, pairs, label)
            else:
                wanted[pairs.image, pairs.query, label] = 1.0
                recognition = _focal(logits, wanted, self.config.focal_alpha)
            recognition = recognition / normaliser
        w_class, w_box, w_giou = self.weights
        return LossParts(w_class * recognition, w_box * distance + w_giou * overlap)

    def _cross_entropy(self, logits: Tensor, label: Tensor, pairs: Pairs) -> Tensor:
        """(B,) weighted mean over the queries; unmatched ones are to say that nothing is there."""
        target = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        target[pairs.image, pairs.query] = label
        weight = torch.ones(self.num_classes + 1, device=logits.device)
        weight[-1] = self.config.eos_coefficient
        loss = F.cross_entropy(logits.transpose(1, 2), target, weight, reduction="none")
        return loss.sum(1) / weight[target].sum(1)

    def _varifocal(self, logits: Tensor, wanted: Tensor, pairs: Pairs, label: Tensor) -> Tensor:
        """(B,) cross-entropy towards the overlap of the box, weighted by it or by the score."""
        config = self.config
        positive = torch.zeros_like(logits)
        positive[pairs.image, pairs.query, label] = 1.0
        score = logits.detach().sigmoid()
        weight = config.focal_loss_alpha * score.pow(config.focal_loss_gamma) * (1 - positive)
        loss = F.binary_cross_entropy_with_logits(
            logits, wanted, weight=weight + wanted, reduction="none"
        )
        return loss.sum((1, 2))

    def instances(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Instances:
        """Matched queries of the last decoder layer; see `DetectionNetwork.instances`."""
        targets = self._targets(images, extent, objects)
        output = self.network(**self._inputs(images, extent))
        pairs = self.match(output.logits, output.pred_boxes, targets)
        loss = self.criterion(output.logits, output.pred_boxes, targets, pairs)
        labels = [one.labels[pairs.place[pairs.image == row]] for row, one in enumerate(objects)]
        return Instances(
            features=self._hidden(output)[pairs.image, pairs.query],
            logits=output.logits[pairs.image, pairs.query, : self.num_classes],
            label=torch.cat(labels) if labels else pairs.place,
            row=pairs.image,
            loss=loss,
        )

    def training_loss(self, images: Tensor, extent: Tensor, objects: Sequence[Objects]) -> Tensor:
        """The loss of all decoder layers and of denoised objects, as the library's recipe has it.

        (B,), each layer with a matching of its own.
        """
        targets = self._targets(images, extent, objects)
        inputs = self._inputs(images, extent)
        if self.kind == "rt_detr":
            return self._training_loss_with_denoising(inputs, targets)
        if not self.config.auxiliary_loss:
            output = self.network(**inputs)
            layers = [(output.logits, output.pred_boxes)]
        else:  # the library gives earlier layers only together with its own loss
            output = self.network(**inputs, labels=targets)
            earlier = [(a["logits"], a["pred_boxes"]) for a in output.auxiliary_outputs]
            layers = [(output.logits, output.pred_boxes), *earlier]
        return self._sum(layers, targets)

    def _sum(self, layers: Sequence[tuple[Tensor, Tensor]], targets: Targets) -> Tensor:
        parts = [
            self.criterion(logits, boxes, targets, self.match(logits, boxes, targets)).total
            for logits, boxes in layers
        ]
        return torch.stack(parts).sum(0)

    def _training_loss_with_denoising(self, inputs: dict[str, Tensor], targets: Targets) -> Tensor:
        output: Any = self.network.model(**inputs, labels=targets)  # type: ignore[operator]
        logits, boxes = output.intermediate_logits, output.intermediate_reference_points
        noise = output.denoising_meta_values
        layers, noisy = range(logits.shape[1]), 0
        if noise is not None:
            noisy = noise["dn_num_split"][0]
        if not self.config.auxiliary_loss:  # the library then takes the last layer and nothing else
            return self._sum([(logits[:, -1, noisy:], boxes[:, -1, noisy:])], targets)
        total = self._sum(
            [(logits[:, i, noisy:], boxes[:, i, noisy:]) for i in layers]
            + [(output.enc_topk_logits, output.enc_topk_bboxes)],
            targets,
        )
        if noise is None:
            return total
        pairs = _denoised(noise, targets)
        for i in layers:
            part = logits[:, i, :noisy], boxes[:, i, :noisy]
            total = total + self.criterion(*part, targets, pairs, noise["dn_num_group"]).total
        return total

    # ---- answers --------------------------------------------------------------------------------

    def _class_scores(self, logits: Tensor) -> Tensor:
        """(B, Q, C) probabilities, without that of nothing."""
        if self.kind == "detr":
            return logits.float().softmax(-1)[..., : self.num_classes]
        return logits.float().sigmoid()

    def logits(self, images: Tensor, extent: Tensor) -> Tensor:
        """(B, C) the highest score of any query, as a logit."""
        output = self.network(**self._inputs(images, extent))
        if self.kind != "detr":
            return output.logits.amax(1)
        return log_odds(output.logits)[..., : self.num_classes].amax(1)

    def detect(self, images: Tensor, extent: Tensor, most: int) -> list[Detections]:
        """The best pairs of query and class; `DetectionNetwork.detect`."""
        output = self.network(**self._inputs(images, extent))
        scores = self._class_scores(output.logits)
        boxes = box_convert(output.pred_boxes.float(), "cxcywh", "xyxy")
        boxes = boxes * self._size(images, extent)[:, None]
        limits = extent.flip(1).repeat(1, 2).to(boxes)
        boxes = torch.minimum(boxes.clamp(min=0), limits[:, None])
        flat = scores.flatten(1)
        best, index = flat.topk(min(most, flat.shape[1]), dim=1)
        query, label = index // self.num_classes, index % self.num_classes
        found = []
        for row, score in enumerate(best):
            real = score > 0  # a masked class is found nowhere
            own = boxes[row, query[row][real]]
            found.append(Detections(own, score[real], label[row][real]))
        return found

    def class_rows(self, classes: Sequence[int]) -> list[tuple[nn.Module, list[int]]]:
        """Rows of the last class layer; DETR's last row says that nothing is there."""
        return [(self.head, list(classes))]


def _has(network: nn.Module, name: str) -> bool:
    try:
        return isinstance(network.get_submodule(name), nn.Module)
    except AttributeError:
        return False


def _precise(values: Tensor) -> Tensor:
    """Half precision is too coarse for losses; single and double stay as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _per_image(values: Tensor, image: Tensor, size: int) -> Tensor:
    """Sums (B,) of values (M,) by the image they belong to."""
    return torch.zeros(size, device=values.device, dtype=values.dtype).index_add(0, image, values)


def _focal(logits: Tensor, wanted: Tensor, alpha: float, gamma: float = 2.0) -> Tensor:
    """(B,) focal loss, summed over queries and classes; Lin et al., ICCV 2017, arXiv 1708.02002."""
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(logits, wanted, alpha, gamma, reduction="none").sum((1, 2))


def _denoised(noise: dict[str, Any], targets: Targets) -> Pairs:
    """The objects from which the denoising queries were made."""
    image, query, place = [], [], []
    for row, (target, queries) in enumerate(zip(targets, noise["dn_positive_idx"], strict=True)):
        count = len(target["class_labels"])
        image.append(torch.full_like(queries, row))
        query.append(queries)
        place.append(torch.arange(count, device=queries.device).repeat(noise["dn_num_group"]))
    return Pairs(torch.cat(image), torch.cat(query), torch.cat(place))
