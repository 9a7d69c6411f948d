"""Losses, matching and training paths of DETR and its descendants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.models.detector import Detector
from mmforget.models.detectors.query_based import Pairs, _denoised, _focal
from mmforget.testing.tiny_detectors import tiny_detector

KINDS = ("detr", "conditional_detr", "deformable_detr", "rt_detr")
every_kind = pytest.mark.parametrize("kind", KINDS)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    """Cross-entropy of a score that should be 0; of `-x`, of one that should be 1."""
    return math.log1p(math.exp(x))


def noise(counts: tuple[int, ...] = (3, 1), classes: int = 10) -> dict[str, Tensor]:
    """Pictures of noise with that many boxes each."""
    generator = torch.Generator().manual_seed(1)
    size = len(counts)
    corner = torch.rand(size, max(counts), 2, generator=generator) * 30
    label = torch.randint(classes, (size, max(counts)), generator=generator)
    for row, count in enumerate(counts):
        label[row, count:] = -1
    return {
        "image": torch.rand(size, 3, 64, 64, generator=generator),
        "extent": torch.full((size, 2), 64),
        "boxes": torch.cat([corner, corner + 4 + corner.flip(2)], 2),
        "label": label,
        "crowd": torch.zeros_like(label, dtype=torch.bool),
        "id": torch.arange(size),
        "weight": torch.ones(size),
    }


def library_total(model: Detector, batch: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    targets = model.kind._targets(batch["image"], batch["extent"], model.objects(batch))
    network: Any = model.network
    output = network(**model.kind._inputs(batch["image"], batch["extent"]), labels=targets)
    parts = {key: float(value.detach()) for key, value in output.loss_dict.items()}
    if model.kind.kind == "rt_detr":
        return float(output.loss.detach()), parts
    twice = model.kind.kind in ("conditional_detr", "deformable_detr")
    focal = sum(value for key, value in parts.items() if key.startswith("loss_ce"))
    return float(output.loss.detach()) + twice * focal, parts


# ---- formulas -----------------------------------------------------------------------------------

# one image with one object of class 1; two queries, of which the second one is matched. Its box is
# twice as wide as the object's: L1 0.2, IoU = GIoU = 0.5.
TARGETS = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
BOXES = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.4, 0.4]]])
PAIRS = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
SCORES = [[-1.0, 0.5], [0.25, 2.0]]


def test_focal_loss() -> None:
    wanted = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    found = _focal(torch.tensor([SCORES]), wanted, 0.25)
    expected = 0.25 * (1 - sigmoid(2.0)) ** 2 * softplus(-2.0)
    expected += sum(0.75 * sigmoid(x) ** 2 * softplus(x) for x in (-1.0, 0.5, 0.25))
    assert found.shape == (1,) and float(found) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["conditional_detr", "deformable_detr"])
def test_parts_with_focal_loss(kind: Any) -> None:
    network = tiny_detector(kind, num_classes=2).kind
    parts = network.criterion(torch.tensor([SCORES]), BOXES, TARGETS, PAIRS)
    expected = 0.25 * (1 - sigmoid(2.0)) ** 2 * softplus(-2.0)
    expected += sum(0.75 * sigmoid(x) ** 2 * softplus(x) for x in (-1.0, 0.5, 0.25))
    assert float(parts.recognition) == pytest.approx(2 * expected, rel=1e-5)
    assert float(parts.rest) == pytest.approx(5 * 0.2 + 2 * 0.5, rel=1e-5)


def test_parts_with_varifocal_loss() -> None:
    network = tiny_detector("rt_detr", num_classes=2).kind
    parts = network.criterion(torch.tensor([SCORES]), BOXES, TARGETS, PAIRS)
    # the score of the object is to be the overlap of its box
    expected = 0.5 * (0.5 * softplus(-2.0) + 0.5 * softplus(2.0))
    expected += sum(0.75 * sigmoid(x) ** 2 * softplus(x) for x in (-1.0, 0.5, 0.25))
    assert float(parts.recognition) == pytest.approx(expected, rel=1e-5)
    assert float(parts.rest) == pytest.approx(5 * 0.2 + 2 * 0.5, rel=1e-5)


def test_parts_with_cross_entropy() -> None:
    network = tiny_detector("detr", num_classes=2).kind
    scores = [[-1.0, 0.5, 1.5], [0.25, 2.0, 0.0]]
    parts = network.criterion(torch.tensor([scores]), BOXES, TARGETS, PAIRS)

    def entropy(row: list[float], label: int) -> float:
        return math.log(sum(math.exp(x) for x in row)) - row[label]

    expected = (0.1 * entropy(scores[0], 2) + entropy(scores[1], 1)) / 1.1
    assert float(parts.recognition) == pytest.approx(expected, rel=1e-5)
    assert float(parts.rest) == pytest.approx(5 * 0.2 + 2 * 0.5, rel=1e-5)


def test_an_image_counts_once_however_many_objects_it_holds() -> None:
    network = tiny_detector("deformable_detr", num_classes=2).kind
    two = [{key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in TARGETS[0].items()}]
    empty = [{"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}]
    pairs = Pairs(torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([0, 1]))
    same = BOXES[:, [1, 1]]
    parts = network.criterion(torch.tensor([SCORES]), same, two, pairs)
    assert float(parts.rest) == pytest.approx(5 * 0.2 + 2 * 0.5, rel=1e-5)  # the mean of equals
    none = Pairs(*[torch.zeros(0, dtype=torch.long)] * 3)
    parts = network.criterion(torch.tensor([SCORES]), BOXES, empty, none)
    flat = SCORES[0] + SCORES[1]
    expected = 2 * sum(0.75 * sigmoid(x) ** 2 * softplus(x) for x in flat)
    assert float(parts.rest) == 0
    assert float(parts.recognition) == pytest.approx(expected, rel=1e-5)
    # in the same batch, each by its own number
    both = Pairs(torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([0, 1]))
    parts = network.criterion(torch.tensor([SCORES] * 2), same.repeat(2, 1, 1), two + empty, both)
    assert float(parts.recognition[1]) == pytest.approx(expected, rel=1e-5)
    assert parts.rest[1] == 0
    # denoising pairs each object `groups` times
    parts = network.criterion(torch.tensor([SCORES]), BOXES, TARGETS, PAIRS, groups=4)
    assert float(parts.rest) == pytest.approx((5 * 0.2 + 2 * 0.5) / 4, rel=1e-5)


@every_kind
def test_matching_gives_each_object_its_query_in_the_order_of_the_objects(kind: Any) -> None:
    network = tiny_detector(kind, num_classes=2).kind
    boxes = torch.tensor(
        [[0.2, 0.2, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2], [0.8, 0.3, 0.2, 0.1], [0.7, 0.7, 0.3, 0.3]]
    )
    outputs = 3 if kind == "detr" else 2
    targets = [
        {"class_labels": torch.tensor([1, 0, 1]), "boxes": boxes[[3, 0, 2]]},
        {"class_labels": torch.tensor([], dtype=torch.long), "boxes": boxes[:0]},
        {"class_labels": torch.tensor([0]), "boxes": boxes[[1]]},
    ]
    pairs = network.match(torch.zeros(3, 4, outputs), boxes.repeat(3, 1, 1), targets)
    assert pairs.image.tolist() == [0, 0, 0, 2]
    assert pairs.query.tolist() == [3, 0, 2, 1]
    assert pairs.place.tolist() == [0, 1, 2, 0]
    # equal boxes: the class decides
    scores = torch.full((1, 4, outputs), -5.0)
    scores[0, 2, 1], scores[0, 1, 0] = 5.0, 5.0
    same = boxes[[0]].repeat(4, 1)
    target = {"class_labels": torch.tensor([0, 1]), "boxes": same[:2]}
    assert network.match(scores, same[None], [target]).query.tolist() == [1, 2]


@every_kind
@torch.no_grad()
def test_more_objects_than_queries(kind: Any) -> None:
    model = tiny_detector(kind, num_queries=2).eval()
    batch = noise((3, 1))
    seen = model.instances(batch)
    assert seen.row.tolist() == [0, 0, 1] and seen.features.shape == (3, 32)
    assert seen.label[2] == batch["label"][1, 0]
    assert torch.isfinite(seen.loss.total).all()
    matched = seen.label[:2].tolist()
    assert matched in [batch["label"][0, keep].tolist() for keep in ([0, 1], [0, 2], [1, 2])]
    assert torch.isfinite(model.training_loss(batch)).all()


# ---- training -----------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_training_loss_is_the_library_s(kind: Any, auxiliary: bool) -> None:
    model = tiny_detector(kind, auxiliary_loss=auxiliary).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    batch = noise((3,))
    torch.manual_seed(3)
    expected, parts = library_total(model, batch)
    torch.manual_seed(3)
    found = model.training_loss(batch)
    assert found.shape == (1,) and float(found.detach()) == pytest.approx(expected, rel=1e-4)
    assert any(key.endswith("_0") for key in parts) == auxiliary
    if kind == "rt_detr":
        assert any("_dn_" in key for key in parts) == auxiliary
    if auxiliary:
        assert float(found.detach()) > float(model.loss(batch).detach())


@every_kind
@torch.no_grad()
def test_each_image_of_a_batch_trains_as_if_alone(kind: Any) -> None:
    settings = {"num_denoising": 0} if kind == "rt_detr" else {"auxiliary_loss": True}
    model = tiny_detector(kind, **settings).eval()
    batch = noise((3, 0, 1))
    whole = model.training_loss(batch)
    for row in range(3):
        alone = model.training_loss({key: value[[row]] for key, value in batch.items()})
        assert torch.allclose(alone, whole[[row]], rtol=1e-4)


def test_denoised_objects() -> None:
    # two groups of two objects, then of one; each group has as many noisy doubles of nothing
    meta = {
        "dn_positive_idx": [torch.tensor([0, 1, 4, 5]), torch.tensor([0, 4]), torch.tensor([])],
        "dn_num_group": 2,
    }
    targets = [{"class_labels": torch.zeros(count)} for count in (2, 1, 0)]
    pairs = _denoised(meta, targets)
    assert pairs.image.tolist() == [0, 0, 0, 0, 1, 1]
    assert pairs.query.tolist() == [0, 1, 4, 5, 0, 4]
    assert pairs.place.tolist() == [0, 1, 0, 1, 0, 0]


def test_denoising_is_part_of_the_training_loss_only() -> None:
    model = tiny_detector("rt_detr").train()
    plain = tiny_detector("rt_detr", num_denoising=0).train()
    batch = noise((3, 0, 1))
    torch.manual_seed(0)
    with_noise = model.training_loss(batch)
    assert (with_noise > plain.training_loss(batch)).all()
    with_noise.sum().backward()
    layer: Any = model.network.model.denoising_class_embed  # type: ignore[union-attr]
    assert layer.weight.grad is not None and layer.weight.grad.any()
    empty = noise((1, 1))
    empty["label"][:] = -1  # nothing to be denoised in the whole batch
    assert torch.isfinite(model.training_loss(empty)).all()
    model.eval()  # no noise outside of training
    assert torch.equal(model.training_loss(batch), model.training_loss(batch))


# ---- variants of Deformable DETR ----------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"with_box_refine": False},
    "refined": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 12},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_deformable_detr(settings: dict[str, Any]) -> None:
    model = tiny_detector("deformable_detr", **settings).eval()
    batch = noise((3,))
    names = model.kind.head_names
    assert names[:2] == ("class_embed.1", "class_embed.0")  # the last decoder layer first
    # a two-stage network has one more, which scores proposals
    assert names[2:] == (("class_embed.2",) if "two_stage" in settings else ())
    expected, _ = library_total(model, batch)
    assert float(model.loss(batch).detach()) == pytest.approx(expected, rel=1e-4)
    seen = model.instances(batch)
    assert torch.allclose(model.head(seen.features), seen.logits, atol=1e-5)
    assert len(model.detect(batch)[0].labels) == 100
    own = (*names, *model.kind.hidden_names)
    kept = [site.name for site in model.sites("all")]
    assert not [n for n in kept if "class_embed" in n or "bbox_embed" in n or n.startswith(own)]


# ---- pixels -------------------------------------------------------------------------------------


def test_pixels_are_normalised_and_padding_is_black() -> None:
    model = Detector(tiny_detector("detr").network, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image = torch.full((1, 3, 4, 6), 0.7)
    given = model.kind._inputs(image, torch.tensor([[2, 5]]))
    inside = given["pixel_values"][0, :, :2, :5]
    assert torch.allclose(inside, torch.tensor([1.0, 1.0, 1.0])[:, None, None].expand(3, 2, 5))
    assert given["pixel_values"].sum() == pytest.approx(30)
    assert given["pixel_mask"].sum() == 10 and given["pixel_mask"][0, :2, :5].all()


@pytest.mark.parametrize(("kind", "size"), [("detr", (40, 20)), ("rt_detr", (64, 32))])
def test_boxes_are_shares_of_what_the_network_sees(kind: Any, size: tuple[int, int]) -> None:
    """RT-DETR reads no mask, so it cannot know where the picture ends."""
    model, batch = tiny_detector(kind), noise((1,))
    batch["image"], batch["extent"] = batch["image"][..., :32], torch.tensor([[40, 20]])
    batch["boxes"] = torch.tensor([[[5.0, 10, 15, 30]]])
    (target,) = model.kind._targets(batch["image"], batch["extent"], model.objects(batch))
    height, width = size
    expected = torch.tensor([[10 / width, 20 / height, 10 / width, 20 / height]])
    assert torch.allclose(target["boxes"], expected)
