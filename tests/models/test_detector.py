"""Detectors of all kinds behind one contract; training; bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mmforget.data.digit_scenes import DigitScenes
from mmforget.errors import (
    AccessError,
    CapabilityError,
    ConfigurationError,
    ModelError,
)
from mmforget.methods.logit_mask import MASKED
from mmforget.models.base import HasHead, HasLogits, HasLoss, Sites, check_capabilities, state_hash
from mmforget.models.detector import Detector, compared
from mmforget.models.detectors.torchvision_detectors import switched
from mmforget.seeds import derive
from mmforget.testing.tiny_detectors import (
    TinyDetectorKind,
    query_settings,
    tiny_detector,
    tiny_scenes,
)

KINDS = get_args(TinyDetectorKind)
TORCHVISION = ("faster_rcnn", "retinanet", "fcos")
QUERIES = tuple(kind for kind in KINDS if kind not in TORCHVISION)
every_kind = pytest.mark.parametrize("kind", KINDS)
BUILDER = "fasterrcnn_mobilenet_v3_large_320_fpn"

LABELS, ROWS = [3, 0, 9, 5, 2], [0, 0, 0, 1, 3]  # objects of `tiny_scenes` that are no crowd


def rows(batch: dict[str, Tensor], *chosen: int) -> dict[str, Tensor]:
    return {key: value[list(chosen)] for key, value in batch.items()}


def library_loss(model: Detector, batch: dict[str, Tensor], row: int) -> dict[str, float]:
    """What the library itself says about one image: the parts and the total."""
    one = rows(batch, row)
    objects = model.objects(one)
    network: Any = model.network
    if model.kind.library == "torchvision":
        height, width = one["extent"][0].tolist()
        picture = one["image"][0, :, :height, :width]
        target = {"boxes": objects[0].boxes, "labels": objects[0].labels + 1}
        deciding = [network]
        if hasattr(network, "rpn"):
            deciding += [network.rpn, network.roi_heads]
        with torch.random.fork_rng(), switched(deciding, training=True):
            torch.manual_seed(derive(0, "proposals"))
            found = network([picture], [target])
        label = "loss_classifier" if hasattr(network, "rpn") else "classification"
        values = {key: float(value.detach()) for key, value in found.items()}
        return {"recognition": values[label], "total": sum(values.values())}
    targets = model.kind._targets(one["image"], one["extent"], objects)
    output = network(**model.kind._inputs(one["image"], one["extent"]), labels=targets)
    values = {key: float(value.detach()) for key, value in output.loss_dict.items()}
    if model.kind.kind == "rt_detr":  # weighted already; the library adds auxiliary losses
        total = values["loss_vfl"] + values["loss_bbox"] + values["loss_giou"]
        return {"recognition": values["loss_vfl"], "total": total}
    weight = 1.0 if model.kind.kind == "detr" else 2.0
    total = float(output.loss.detach())
    if weight == 2:  # the factor of the authors, which transformers leaves out
        total += values["loss_ce"]
    return {"recognition": weight * values["loss_ce"], "total": total}


# ---- losses -------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_losses_are_those_of_the_library_for_each_image_alone(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    parts = model.loss_parts(batch)
    assert parts.recognition.shape == parts.rest.shape == (4,)
    assert torch.equal(parts.total, model.loss(batch))
    for row in range(4):
        expected = library_loss(model, batch, row)
        assert float(parts.recognition[row]) == pytest.approx(expected["recognition"], rel=1e-4)
        assert float(parts.total[row]) == pytest.approx(expected["total"], rel=1e-4)


@every_kind
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    whole, seen, logits = model.loss(batch), model.instances(batch), model.logits(batch)
    found = model.detect(batch)
    for row in range(4):
        one = rows(batch, row)
        alone = model.instances(one)
        assert torch.allclose(model.loss(one)[0], whole[row], rtol=1e-4)
        assert torch.allclose(alone.features, seen.features[seen.row == row], atol=1e-4)
        assert torch.allclose(alone.logits, seen.logits[seen.row == row], atol=1e-4)
        assert torch.allclose(model.logits(one)[0], logits[row], atol=1e-4)
        assert torch.allclose(model.detect(one)[0].scores, found[row].scores, atol=1e-5)
    mixed = model.loss(rows(batch, 2, 1, 3, 0))
    assert torch.allclose(mixed, whole[[2, 1, 3, 0]], rtol=1e-4)


@every_kind
@torch.no_grad()
def test_what_lies_outside_of_the_picture_is_not_seen(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    dirty = batch | {"image": batch["image"].clone()}
    for row, (height, width) in enumerate(batch["extent"].tolist()):
        dirty["image"][row, :, height:] = 0.7
        dirty["image"][row, :, :, width:] = 0.7
    assert not torch.equal(dirty["image"], batch["image"])
    assert torch.equal(model.loss(dirty), model.loss(batch))
    assert torch.equal(model.logits(dirty), model.logits(batch))
    assert torch.equal(model.instances(dirty).features, model.instances(batch).features)
    for a, b in zip(model.detect(dirty), model.detect(batch), strict=True):
        assert torch.equal(a.boxes, b.boxes)


@every_kind
def test_each_part_of_the_loss_trains_its_own_layers(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    parts = model.loss_parts(batch)
    boxes = {
        "faster_rcnn": "roi_heads.box_predictor.bbox_pred",
        "retinanet": "head.regression_head",
        "fcos": "head.regression_head",
        "rt_detr": "model.decoder.bbox_embed.1",
        "deformable_detr": "bbox_embed.1",
    }.get(kind, "bbox_predictor")
    drawing = list(model.network.get_submodule(boxes).parameters())
    naming = list(model.head.parameters())

    def trains(loss: Tensor, weights: list[nn.Parameter]) -> bool:
        found = torch.autograd.grad(loss.sum(), weights, retain_graph=True, allow_unused=True)
        return any(value is not None and bool(value.any()) for value in found)

    assert trains(parts.recognition, naming) and not trains(parts.recognition, drawing)
    assert trains(parts.rest, drawing) and not trains(parts.rest, naming)


@every_kind
@torch.no_grad()
def test_images_without_objects(kind: Any) -> None:
    model, empty = tiny_detector(kind).eval(), rows(tiny_scenes(), 2, 2)
    parts, seen = model.loss_parts(empty), model.instances(empty)
    assert (parts.recognition > 0).all() and torch.isfinite(parts.total).all()
    if kind != "faster_rcnn":  # whose boxes include whether there is anything at all
        assert not parts.rest.any()
    assert seen.features.shape == (0, model.num_features)
    assert seen.logits.shape == (0, 10)
    assert torch.allclose(seen.loss.total, parts.total)
    assert torch.isfinite(model.train().training_loss(empty)).all()


@every_kind
def test_training_loss_reaches_every_trained_part(kind: Any) -> None:
    model = tiny_detector(kind).train()
    torch.manual_seed(0)
    loss = model.training_loss(tiny_scenes())
    assert loss.shape == (4,) and torch.isfinite(loss).all()
    loss.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]


def test_a_loss_needs_labels() -> None:
    batch = tiny_scenes()
    del batch["label"]
    with pytest.raises(AccessError, match="needs boxes and labels"):
        tiny_detector("fcos").loss(batch)


# ---- objects ------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_the_head_turns_features_of_objects_into_their_logits(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    seen = model.instances(batch)
    assert seen.label.tolist() == LABELS and seen.row.tolist() == ROWS
    assert seen.features.shape == (5, model.num_features)
    assert seen.logits.shape == (5, model.num_classes) == (5, 10)
    assert torch.allclose(seen.loss.recognition, model.loss_parts(batch).recognition, rtol=1e-5)
    assert torch.allclose(seen.loss.rest, model.loss_parts(batch).rest, rtol=1e-5)
    head: Any = model.head
    if kind in ("retinanet", "fcos"):
        patches = seen.features.reshape(5, -1, *head.kernel_size)
        scores = F.conv2d(patches, head.weight, head.bias).reshape(5, -1, 11)[..., 1:]
        close = torch.isclose(scores, seen.logits[:, None], atol=1e-5).all(2)
        assert close.any(1).all()  # one of the anchors of the cell
    else:
        scores = head(seen.features)
        scores = scores[:, 1:] if kind == "faster_rcnn" else scores[:, :10]
        assert torch.allclose(scores, seen.logits, atol=1e-5)


@every_kind
def test_features_of_objects_carry_gradients(kind: Any) -> None:
    model = tiny_detector(kind).eval()
    model.instances(tiny_scenes()).features.square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.network.parameters())


# ---- answers ------------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_detections(kind: Any) -> None:
    settings = {} if kind in QUERIES or kind == "faster_rcnn" else {"score_thresh": 0.0}
    model, batch = tiny_detector(kind, **settings).eval(), tiny_scenes()
    model.most = 7
    found = model.detect(batch)
    assert len(found) == 4
    for one, (height, width) in zip(found, batch["extent"].tolist(), strict=True):
        assert len(one.boxes) == len(one.scores) == len(one.labels) == 7
        assert one.boxes.min() >= 0
        assert one.boxes[:, 2].max() <= width and one.boxes[:, 3].max() <= height
        assert (one.boxes[:, 2:] >= one.boxes[:, :2]).all()
        assert (one.scores.diff() <= 0).all() and (one.scores > 0).all() and (one.scores < 1).all()
        assert set(one.labels.tolist()) <= set(range(10))
    assert len(found[0].above(float(found[0].scores[2])).labels) == 3
    best = torch.stack([one.scores[0] for one in found])
    assert torch.allclose(model.logits(batch).amax(1).sigmoid(), best, atol=1e-5)
    assert torch.equal(model(batch["image"], batch["extent"])[1].boxes, found[1].boxes)
    assert torch.equal(model(batch["image"])[0].boxes, found[0].boxes)  # a full canvas


@every_kind
@torch.no_grad()
def test_a_masked_class_is_never_found(kind: Any) -> None:
    model, batch = tiny_detector(kind, num_classes=3).eval(), tiny_scenes()
    batch["label"] = batch["label"].clamp(max=2)
    layer: Any
    for layer, found in model.class_rows([1]):
        layer.bias[found] += 8
    assert all((one.labels[:3] == 1).all() for one in model.detect(batch))
    before = model.logits(batch)
    for layer, found in model.class_rows([1]):
        layer.weight[found] = 0
        layer.bias[found] = MASKED
    model.most = 1000
    assert not any((one.labels == 1).any() for one in model.detect(batch))
    after = model.logits(batch)
    assert (after[:, 1] < -1000).all() and torch.isfinite(model.loss(batch)).all()
    if kind not in ("detr", "faster_rcnn"):  # where classes do not compete
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


@every_kind
@torch.no_grad()
def test_answering_leaves_no_trace(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    model.kind.network.train(kind in TORCHVISION)  # theirs have two behaviours, by their flags
    before = {name: module.training for name, module in model.named_modules()}
    state, hashed = torch.get_rng_state(), state_hash(model)
    assert len(model.detect(batch)) == 4 and model.logits(batch).shape == (4, 10)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.eval()
    if kind not in TORCHVISION:  # batch normalisation was in training mode
        assert state_hash(model) == hashed
    hashed = state_hash(model)
    model.loss(batch)
    model.instances(batch)
    assert not any(module.training for module in model.modules())
    assert state_hash(model) == hashed and torch.equal(torch.get_rng_state(), state)


# ---- layers -------------------------------------------------------------------------------------


@every_kind
def test_capabilities_and_sites(kind: Any) -> None:
    model = tiny_detector(kind)
    check_capabilities("test", model, (HasLoss, HasLogits, HasHead, Sites))
    if kind in ("retinanet", "fcos"):
        with pytest.raises(CapabilityError, match="no sites of kind 'ffn'"):
            model.sites("ffn")
    else:
        sites = model.sites("ffn")
        if kind == "faster_rcnn":
            assert [site.name for site in sites] == [
                "roi_heads.box_head.fc6",
                "roi_heads.box_head.fc7",
            ]
        else:  # two layers in each of the blocks of encoder and decoder
            encoders = 1 if kind == "rt_detr" else 2
            assert len(sites) == 2 * (encoders + 2)
            assert {site.module.weight.numel() for site in sites} == {32 * 48}
    own = (*model.kind.head_names, *model.kind.hidden_names)
    names = [site.name for site in model.sites("all")]
    assert names and not any(name == h or name.startswith(f"{h}.") for name in names for h in own)
    assert all(model.network.get_submodule(name) is not None for name in own)


@every_kind
def test_copies_stand_alone(kind: Any) -> None:
    model, batch = tiny_detector(kind).eval(), tiny_scenes()
    twin = copy.deepcopy(model)
    assert twin.kind.network is twin.network is not model.network
    assert torch.equal(twin.loss(batch), model.loss(batch))
    with torch.no_grad():
        twin.head.weight.mul_(2)  # type: ignore[operator]
    assert not torch.equal(twin.loss(batch), model.loss(batch))
    assert state_hash(twin) != state_hash(model)


@pytest.mark.parametrize("kind", QUERIES)  # those of torchvision: in test_detector_files.py
def test_fresh_weights(kind: Any) -> None:
    model = tiny_detector(kind)
    state = torch.get_rng_state()
    first, again, other = model.fresh(3), model.fresh(3), model.fresh(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert state_hash(first) == state_hash(again)
    assert len({state_hash(model), state_hash(first), state_hash(other)}) == 3
    assert first.training and first.num_classes == model.num_classes
    assert first.kind.network is first.network


def test_networks_given_as_objects_cannot_be_drawn_anew() -> None:
    with pytest.raises(ModelError, match="given as an object"):
        tiny_detector("fcos").fresh(0)


# ---- training -----------------------------------------------------------------------------------


def test_fit_resume_and_evaluate(quiet_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    data = DigitScenes(scenes=8, eval_scenes=4, batch_size=4)
    start = tiny_detector("rt_detr", num_denoising=0, seed=1)
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    straight = copy.deepcopy(start)
    trainer = quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[every])
    trainer.fit(straight, data)
    assert trainer.global_step == 4
    assert 0 <= float(trainer.callback_metrics["val/ap"]) <= 1
    assert state_hash(straight) != state_hash(start)
    resumed = tiny_detector("rt_detr", num_denoising=0, seed=2)
    trainer = quiet_trainer(max_epochs=2)
    half = tmp_path / "epoch=0.ckpt"
    trainer.fit(resumed, data, ckpt_path=half, weights_only=True)
    assert trainer.global_step == 4
    assert state_hash(resumed) == state_hash(straight)
    loaded = Detector.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert state_hash(loaded) == state_hash(straight)
    loaded.most = 5
    found = quiet_trainer().predict(loaded, data.loader(data.dataset("test")))
    assert [len(one["boxes"]) for one in found] == [4]  # type: ignore[arg-type, index]
    assert found[0]["scores"][0].shape == (5,)  # type: ignore[index, call-overload]


def test_padding_is_not_evaluated() -> None:
    model, batch = tiny_detector("detr").eval(), tiny_scenes()
    batch["weight"][3] = 0
    predictions, targets = compared(model.detect(batch), batch)
    assert len(predictions) == len(targets) == 3
    assert [len(one["labels"]) for one in targets] == [3, 1, 0]
    batch["weight"][3] = 1
    assert compared(model.detect(batch), batch)[1][3]["iscrowd"].tolist() == [0, 1]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "rt_detrr"}, r"no model type 'rt_detrr'.*rt_detr"),
        ({"network": "vit"}, r"'vit' is not one of the detectors"),
        ({"network": "fcos_resnet", "library": "torchvision"}, r"no detector 'fcos_resnet'.*fcos_"),
        ({"network": "ssd300_vgg16", "library": "torchvision"}, r"no detector 'ssd300_vgg16'"),
        ({"library": "timm"}, r"unknown `library` 'timm'"),
        ({"num_classes": 0}, r"`num_classes` is 0"),
        ({"most": 0}, r"`most` is 0"),
        ({"std": (0.0, 1.0, 1.0)}, r"`std` is \(0.0, 1.0, 1.0\)"),
        (
            {"network": BUILDER, "library": "torchvision", "network_args": {"minsize": 3}},
            r"has no argument 'minsize', did you mean 'min_size'",
        ),
        ({"network": nn.Linear(3, 3)}, r"Linear is not one of the detectors"),
        ({"class_names": ("a", "b")}, r"`class_names` has 2 names for 10 classes"),
    ],
)
def test_settings_that_have_no_meaning(arguments: dict[str, Any], message: str) -> None:
    settings = {"network": "rt_detr", "num_classes": 10} | arguments
    if settings["network"] == "rt_detr":
        settings["network_args"] = query_settings("rt_detr")
    if settings["network"] == BUILDER:
        settings["num_classes"] = 4
    with pytest.raises(ModelError, match=message):
        Detector(**settings)


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "warmup"])
def test_recipes_that_have_no_meaning(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`{setting}` is -1"):
        Detector(tiny_detector("detr").network, **{setting: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["detr", "faster_rcnn", "retinanet", "fcos"])
def test_class_counts_must_agree(kind: Any) -> None:
    network = tiny_detector(kind, num_classes=3).network
    assert Detector(network, 3).num_classes == 3
    with pytest.raises(ModelError, match=r"has 3 classes, but `num_classes` is 4"):
        Detector(network, 4)
    with pytest.raises(ModelError, match="`network_args` and `pretrained` go with"):
        Detector(network, network_args={"min_size": 3})
