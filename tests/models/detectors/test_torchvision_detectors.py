"""Faster R-CNN, RetinaNet and FCOS of torchvision: what is particular to each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

from mmforget.errors import ModelError
from mmforget.models.detectors.base import log_odds
from mmforget.models.detectors.torchvision_detectors import switched, torchvision_detector
from mmforget.testing.tiny_detectors import tiny_detector

KINDS = ("faster_rcnn", "retinanet", "fcos")
every_kind = pytest.mark.parametrize("kind", KINDS)


def pictures(*sizes: tuple[int, int]) -> dict[str, Tensor]:
    """Noise of these heights and widths in a common corner, each with one box."""
    generator = torch.Generator().manual_seed(2)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    count = len(sizes)
    return {
        "image": torch.rand(count, 3, height, width, generator=generator),
        "extent": torch.tensor(sizes),
        "boxes": torch.tensor([[[6.0, 8.0, 30.0, 40.0]]] * count),
        "label": torch.tensor([[4]] * count),
        "crowd": torch.zeros(count, 1, dtype=torch.bool),
        "id": torch.arange(count),
        "weight": torch.ones(count),
    }


# ---- pictures -----------------------------------------------------------------------------------


@every_kind
def test_pictures_of_one_padded_size_run_together(kind: Any) -> None:
    model = tiny_detector(kind, min_size=32, max_size=96).eval()
    shapes: list[tuple[int, ...]] = []
    network: Any = model.network
    network.backbone.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    model.loss(pictures((64, 64), (64, 64)))
    assert shapes == [(2, 3, 32, 32)]
    shapes.clear()
    # scaled to 32 x 32, 32 x 50 and 32 x 57: the latter two are both padded to 64
    batch = pictures((64, 64), (64, 100), (60, 107))
    model.loss(batch)
    assert shapes == [(1, 3, 32, 32), (2, 3, 32, 64)]
    shapes.clear()
    model.train().training_loss(batch)  # as the library trains: all padded to the largest
    assert shapes == [(3, 3, 32, 64)]


def test_normalisation_is_the_networks_own() -> None:
    given: list[Tensor] = []
    model = tiny_detector("fcos", image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).eval()
    network: Any = model.network
    network.backbone.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.logits(pictures((64, 64)) | {"image": torch.full((1, 3, 64, 64), 0.7)})
    assert torch.allclose(given[0], torch.ones(1, 3, 64, 64), atol=1e-5)


@every_kind
def test_boxes_come_back_in_pixels_of_the_picture(kind: Any) -> None:
    settings = {"box_score_thresh": 0.0} if kind == "faster_rcnn" else {"score_thresh": 0.0}
    model = tiny_detector(kind, min_size=128, max_size=128, **settings).eval()
    batch = pictures((64, 48))
    model.most = 1000
    found = model.detect(batch)[0]  # the network sees it twice as large
    height, width = 64, 48
    with torch.no_grad():
        own = model.network([batch["image"][0]])[0]
    kept = own["labels"] > 0
    assert torch.allclose(found.boxes, own["boxes"][kept].clamp(max=64), atol=1e-4)
    assert found.boxes[:, 2].max() <= width and found.boxes[:, 3].max() <= height
    assert torch.equal(found.labels, own["labels"][kept] - 1)


# ---- classes ------------------------------------------------------------------------------------


def test_rows_of_the_class_layers() -> None:
    rows = {kind: tiny_detector(kind, num_classes=3).class_rows([2, 0]) for kind in KINDS}
    assert [found for _, found in rows["faster_rcnn"]] == [[3, 1]]
    assert [found for _, found in rows["fcos"]] == [[3, 1]]
    # six anchors per cell, each with the unused class and ours
    assert [found for _, found in rows["retinanet"]] == [
        [3, 1, 7, 5, 11, 9, 15, 13, 19, 17, 23, 21]
    ]


@every_kind
@torch.no_grad()
def test_rows_of_a_class_move_its_logits_only(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), pictures((64, 64))
    before = model.instances(batch).logits
    layer: Any
    for layer, rows in model.class_rows([4]):
        layer.bias[rows] += 3
    after = model.instances(batch)
    assert after.label.tolist() == [4]
    moved = torch.zeros(1, 10)
    moved[0, 4] = 3
    assert torch.allclose(after.logits - before, moved, atol=1e-4)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@torch.no_grad()
def test_what_is_found_of_the_unused_class_is_dropped(kind: Any) -> None:
    model, batch = tiny_detector(kind, num_classes=3).eval(), pictures((64, 64))
    batch["label"][:] = 2
    head: Any = model.head
    before = model.logits(batch)
    head.bias.view(-1, 4)[:, 0] = 9.0
    native = model.network([batch["image"][0]])[0]
    assert (native["labels"] == 0).any()
    found = model.detect(batch)[0]
    assert len(found.labels) == int((native["labels"] > 0).sum())
    assert found.labels.min() >= 0 if len(found.labels) else True
    assert torch.equal(model.logits(batch), before)


def test_log_odds() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [-1e4, 0.0, 0.0]])
    assert torch.allclose(log_odds(scores).sigmoid(), scores.softmax(1), atol=1e-6)
    assert log_odds(scores)[1, 0] == -1e4 - math.log(2)
    assert torch.isfinite(log_odds(torch.tensor([0.0, 1e4]))).all()


# ---- Faster R-CNN -------------------------------------------------------------------------------


def test_proposals_are_drawn_anew_in_training_only() -> None:
    model, batch = tiny_detector("faster_rcnn", box_batch_size_per_image=8), pictures((64, 64))
    model.eval()
    assert torch.equal(model.loss(batch), model.loss(batch))
    twice = model.loss({key: torch.cat([value, value]) for key, value in batch.items()})
    assert torch.allclose(twice[0], twice[1])
    model.train()
    torch.manual_seed(0)
    first = model.loss(batch)
    second = model.loss(batch)
    torch.manual_seed(0)
    again = model.loss(batch)
    assert torch.allclose(first, again) and not torch.allclose(first, second)


def test_the_parts_of_faster_r_cnn() -> None:
    model, batch = tiny_detector("faster_rcnn").eval(), pictures((64, 64))
    parts, network = model.loss_parts(batch), model.network
    objectness: Any = network.rpn.head.cls_logits  # type: ignore[union-attr]
    loss = (parts.recognition.sum(), parts.rest.sum())
    grads = [
        torch.autograd.grad(part, objectness.weight, retain_graph=True, allow_unused=True)[0]
        for part in loss
    ]
    assert grads[0] is None and grads[1] is not None and grads[1].any()


@torch.no_grad()
def test_nothing_proposed() -> None:
    """Proposals can be filtered by their score, so that none is left."""
    model = tiny_detector("faster_rcnn", rpn_score_thresh=1.1).eval()
    batch = pictures((64, 64), (64, 64))
    batch["label"][1] = -1
    parts = model.loss_parts(batch)
    assert torch.isfinite(parts.total).all() and parts.recognition[1] == 0
    assert (model.logits(batch) == -1e4).all()
    assert [len(one.labels) for one in model.detect(batch)] == [0, 0]
    assert model.instances(batch).row.tolist() == [0]


# ---- where dense detectors see an object --------------------------------------------------------


def test_retinanet_sees_an_object_at_the_anchor_that_overlaps_it_most() -> None:
    kind = tiny_detector("retinanet").kind
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 20], [10, 10, 20, 20]])
    boxes = torch.tensor([[0.0, 0, 19, 18], [11, 10, 20, 20], [1, 1, 9, 9]])
    assert kind._places(boxes, anchors, []).tolist() == [1, 2, 0]
    assert kind._places(boxes[:0], anchors, []).tolist() == []


def test_fcos_sees_an_object_in_its_middle_on_the_level_for_its_size() -> None:
    kind = tiny_detector("fcos").kind
    points = [(x, y, 4.0) for y in (2.0, 6.0) for x in (2.0, 6.0)] + [(4.0, 4.0, 8.0)]
    anchors = torch.tensor([[x - s / 2, y - s / 2, x + s / 2, y + s / 2] for x, y, s in points])
    # the fine level draws sides up to 8 * 4 pixels away, the coarse one all others
    boxes = torch.tensor([[4.0, 0, 10, 6], [-10, -9, 14, 20], [-40, -40, 48, 48.0]])
    assert kind._places(boxes, anchors, [4, 1]).tolist() == [1, 2, 4]


@torch.no_grad()
def test_fcos_trains_the_points_at_which_it_sees_objects() -> None:
    model, batch = tiny_detector("fcos").eval(), pictures((64, 64), (64, 56), (56, 64))
    matched: list[Tensor] = []
    head: Any = model.network.head
    compute = head.compute_loss

    def spy(targets: Any, outputs: Any, anchors: Any, found: list[Tensor]) -> Any:
        matched.extend(found)
        return compute(targets, outputs, anchors, found)

    head.compute_loss = spy
    places: list[Tensor] = []
    kind, where = model.kind, model.kind._places
    kind._places = lambda *args: places.append(where(*args)) or places[-1]
    model.instances(batch)
    assert len(places) == len(matched) == 3
    assert all(found[place] == 0 for found, place in zip(matched, places, strict=True))


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_features_are_what_the_layer_reads_around_the_place(kind: Any) -> None:
    wrapped = tiny_detector(kind).kind
    count = wrapped.anchors
    tower = torch.arange(32.0)[:, None, None] * 100 + torch.arange(12.0).reshape(1, 3, 4)
    places = torch.tensor([(12 + 0) * count, 5 * count + count - 1])
    found = wrapped._neighbourhoods([tower, tower + 0.5], places).reshape(2, 32, 3, 3)
    corner = torch.tensor([[0.0, 0, 0], [0, 0.5, 1.5], [0, 4.5, 5.5]])  # of the second level
    middle = torch.tensor([[0.0, 1, 2], [4, 5, 6], [8, 9, 10]])
    assert torch.equal(found[0, 0], corner) and torch.equal(found[1, 0], middle)
    assert torch.equal(found[1, 7], middle + 700)


def test_fcos_ranks_by_class_and_centrality() -> None:
    kind = tiny_detector("fcos", num_classes=1).kind
    outputs = {
        "cls_logits": torch.tensor([[[0.0, 2.0], [0.0, -1.0]]]),
        "bbox_ctrness": torch.tensor([[[-1.0], [3.0]]]),
    }
    found = kind._scores(outputs)[0, :, 1].sigmoid()
    expected = [
        math.sqrt(1 / (1 + math.exp(-2)) / (1 + math.exp(1))),
        math.sqrt(1 / (1 + math.exp(1)) / (1 + math.exp(-3))),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_needs_a_class(kind: Any) -> None:
    with pytest.raises(ModelError, match=r"has 1 classes including the background.*at least 2"):
        tiny_detector(kind, num_classes=0)


def test_other_networks_are_refused() -> None:
    backbone = tiny_detector("fcos").network.backbone
    masks = detection.MaskRCNN(backbone, 3)  # which is a Faster R-CNN too
    for network in (masks, detection.ssdlite320_mobilenet_v3_large(weights_backbone=None)):
        with pytest.raises(ModelError, match=r"is not one of the detectors .* from torchvision"):
            torchvision_detector(network)


def test_other_heads_are_refused() -> None:
    model: Any = tiny_detector("faster_rcnn").network
    model.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(ModelError, match="no linear layer `cls_score`"):
        torchvision_detector(model)
    for kind in ("retinanet", "fcos"):
        model = tiny_detector(kind).network  # type: ignore[arg-type]
        model.head.classification_head.cls_logits = nn.Conv2d(32, 5, 3, padding=1)
        with pytest.raises(ModelError, match="no convolution `cls_logits`"):
            torchvision_detector(model)
        model.head = nn.Identity()
        with pytest.raises(ModelError, match="no convolution `cls_logits`"):
            torchvision_detector(model)


def test_flags_are_put_back_after_an_error() -> None:
    outer = nn.Sequential(nn.Dropout())
    with pytest.raises(ValueError), switched([outer], training=False):
        assert not outer.training and outer[0].training
        raise ValueError
    assert outer.training
