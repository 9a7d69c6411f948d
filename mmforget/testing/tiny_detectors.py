"""Tiny detectors of every supported kind, built with random weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, suggest
from mmforget.models.detector import Detector

TinyDetectorKind = Literal[
    "detr", "conditional_detr", "deformable_detr", "rt_detr", "faster_rcnn", "retinanet", "fcos"
]
WIDTH = 32
SPREAD = 0.08
"""Standard deviation of the weights of heads; theirs of 0.01 would make all scores alike."""


def tiny_detector(
    kind: TinyDetectorKind, num_classes: int = 10, seed: int = 0, **settings: Any
) -> Detector:
    """Build a detector of some ten thousand random weights for pictures of 48 to 128 pixels.

    Args:
        kind: type of a network of transformers; ``faster_rcnn``, ``retinanet`` or ``fcos`` of
            torchvision with a backbone of two layers, which is given as an object.
        num_classes: without background.
        seed: of the weights.
        **settings: fields of the configuration (transformers), arguments of the network
            (torchvision).

    Raises:
        ConfigurationError: an unknown kind.
    """
    if kind not in get_args(TinyDetectorKind):
        raise ConfigurationError(f"`kind` is '{kind}', {suggest(kind, get_args(TinyDetectorKind))}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind in ("faster_rcnn", "retinanet", "fcos"):
            return Detector(_torchvision(kind, num_classes + 1, settings))
        return Detector(kind, num_classes, network_args=query_settings(kind) | settings)


def query_settings(kind: str) -> dict[str, Any]:
    """Fields of the configuration of a tiny network of transformers."""
    shared = {
        "d_model": WIDTH,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": 12,
    }
    if kind == "rt_detr":
        stages = [8, 12, 16]
        backbone = {
            "model_type": "rt_detr_resnet",
            "embedding_size": 8,
            "hidden_sizes": stages,
            "depths": [1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3"],
            "downsample_in_first_stage": False,
        }
        return shared | {
            "backbone_config": backbone,
            "freeze_backbone_batch_norms": False,
            "encoder_hidden_dim": WIDTH,
            "encoder_in_channels": stages,
            "decoder_in_channels": [WIDTH] * 3,
            "feat_strides": [4, 8, 16],
            "hidden_expansion": 0.5,
            "num_denoising": 6,
        }
    backbone = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16, 24],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    }
    own: dict[str, Any] = {}
    if kind == "deformable_detr":
        backbone["out_features"] = ["stage2", "stage3", "stage4"]
        own = {"num_feature_levels": 3, "with_box_refine": True}
    names = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return shared | names | {"encoder_layers": 2, "backbone_config": backbone} | own


def tiny_scenes() -> dict[str, Tensor]:
    """A batch of noise on a canvas of 64 x 80 pixels.

    It has a full picture with three objects, a small one with one, a full one without any, and a
    narrow one with an object and a crowd; ten classes.
    """
    generator = torch.Generator().manual_seed(5)
    extent = torch.tensor([[64, 80], [48, 60], [64, 80], [64, 72]])
    image = torch.rand(4, 3, 64, 80, generator=generator)
    for row, (height, width) in enumerate(extent.tolist()):
        image[row, :, height:] = 0
        image[row, :, :, width:] = 0
    boxes = torch.zeros(4, 3, 4)
    boxes[0] = torch.tensor([[4.0, 6, 20, 30], [30, 10, 62, 50], [50, 40, 78, 63]])
    boxes[1, 0] = torch.tensor([10.0, 8, 40, 40])
    boxes[3, :2] = torch.tensor([[2.0, 2, 18, 16], [20, 20, 70, 60]])
    label = torch.tensor([[3, 0, 9], [5, -1, -1], [-1, -1, -1], [2, 7, -1]])
    crowd = torch.zeros(4, 3, dtype=torch.bool)
    crowd[3, 1] = True
    return {
        "image": image,
        "extent": extent,
        "boxes": boxes,
        "label": label,
        "crowd": crowd,
        "id": torch.arange(4),
        "weight": torch.ones(4),
    }


class _TwoLevels(nn.Module):
    """Feature maps of a quarter and an eighth of the size."""

    out_channels = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.quarter = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 4, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.eighth = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.ReLU())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps by name."""
        fine = self.quarter(images)
        return {"0": fine, "1": self.eighth(fine)}


def _torchvision(kind: str, outputs: int, settings: dict[str, Any]) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    shapes = ((0.5, 1.0, 2.0),) * 2
    args: dict[str, Any] = {"min_size": 64, "max_size": 128}
    if kind == "faster_rcnn":
        args |= {
            "rpn_anchor_generator": AnchorGenerator(((16,), (32,)), shapes),
            "box_roi_pool": MultiScaleRoIAlign(["0", "1"], 4, 2),
            "box_head": TwoMLPHead(WIDTH * 16, 48),
            "box_predictor": FastRCNNPredictor(48, outputs),
            "rpn_batch_size_per_image": 32,
            "box_batch_size_per_image": 32,
        }
        network: Any = detection.FasterRCNN(_TwoLevels(), **(args | settings))
        heads = [network.rpn, network.roi_heads]
    elif kind == "retinanet":
        anchors = AnchorGenerator(((12, 20), (28, 40)), shapes)
        args |= {"anchor_generator": anchors}
        network = detection.RetinaNet(_TwoLevels(), outputs, **(args | settings))
        heads = [network.head]
    else:
        anchors = AnchorGenerator(((4,), (8,)), ((1.0,),) * 2)
        args |= {"anchor_generator": anchors}
        network = detection.FCOS(_TwoLevels(), outputs, **(args | settings))
        heads = [network.head]
    for head in heads:
        for layer in head.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=SPREAD)
    return network  # type: ignore[no-any-return]
