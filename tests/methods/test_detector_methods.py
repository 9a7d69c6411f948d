"""The methods of classifiers on detectors: what is reversed, what is kept, per object."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmforget.data.digit_scenes import DigitScenes
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods import (
    SCRUB,
    SSD,
    GSLoRA,
    GSLoRAPlusPlus,
    HeadOnly,
    LogitMask,
    NegGradPlus,
    RandomLabels,
    Retrain,
)
from mmforget.methods.gs_lora_plus_plus import prototype_divergence
from mmforget.models.base import LossParts
from mmforget.models.detector import Detector
from mmforget.request import ForgetRequest

BACKBONE = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16],
    "depths": [1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3"],
    "downsample_in_first_stage": False,
}
NETWORK = {
    "backbone_config": BACKBONE,
    "freeze_backbone_batch_norms": False,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 12, 16],
    "feat_strides": [4, 8, 16],
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "hidden_expansion": 0.5,
    "d_model": 32,
    "num_queries": 12,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "num_denoising": 6,
}
SEVEN = 7


@pytest.fixture(scope="module")
def model() -> Detector:
    return Detector("rt_detr", num_classes=10, network_args=NETWORK).fresh(0).eval()


@pytest.fixture
def data() -> DigitScenes:
    found = DigitScenes(scenes=40, eval_scenes=8, batch_size=4, side=64)
    found.request(ForgetRequest(classes=("seven",)))
    return found


@pytest.fixture
def batch(data: DigitScenes) -> dict[str, Any]:
    return {
        role: data.subset("train", role)[list(range(4))]  # type: ignore[arg-type]
        for role in ("forget", "retain")
    }


def terms_of(method: Any, data: DigitScenes, batch: dict[str, Any]) -> dict[str, float]:
    method.bind(data)
    method.model.eval()
    with torch.no_grad():
        return {name: float(value) for name, value in method.losses(batch).items()}


def test_only_the_recognition_of_forgotten_objects_is_reversed(model, data, batch) -> None:
    found = terms_of(GSLoRA(model, beta=0.5, bound=15.0, sparsity=0.0), data, batch)
    forget, retain = (model.loss_parts(batch[role]) for role in ("forget", "retain"))
    assert found["retain"] == pytest.approx(float(retain.total.mean()), rel=1e-4)
    assert found["forget"] == pytest.approx(0.5 * (15 - float(forget.recognition.mean())), rel=1e-4)
    assert found["forget_rest"] == pytest.approx(0.5 * float(forget.rest.mean()), rel=1e-4)


def test_beyond_the_bound_the_recognition_is_left_alone(model, data, batch) -> None:
    found = terms_of(GSLoRA(model, bound=1e-3), data, batch)
    assert found["forget"] == 0
    assert found["forget_rest"] > 0


def test_the_bound_of_a_detector_is_the_published_one(model) -> None:
    assert GSLoRA(model).bound == 15
    assert GSLoRA(model, bound=4).bound == 4


def test_neg_grad_plus_keeps_the_boxes_of_what_it_forgets(model, data, batch) -> None:
    found = terms_of(NegGradPlus(model, alpha=0.9), data, batch)
    forget, retain = (model.loss_parts(batch[role]) for role in ("forget", "retain"))
    assert found["retain"] == pytest.approx(0.9 * float(retain.total.mean()), rel=1e-4)
    assert found["forget"] == pytest.approx(-0.1 * float(forget.recognition.mean()), rel=1e-4)
    assert found["forget_rest"] == pytest.approx(0.1 * float(forget.rest.mean()), rel=1e-4)


def test_a_loss_without_other_parts_has_no_other_term() -> None:
    parts = LossParts(torch.ones(3))
    assert parts.rest is None
    assert torch.equal(parts.total, torch.ones(3))


def test_prototypes_of_the_head_are_its_rows(model, data, batch) -> None:
    method = GSLoRAPlusPlus(model, prototype_data="head", w_forget=0.5, w_retain=0.25)
    method.bind(data)
    method.compute_prototypes()
    assert torch.equal(method.prototypes, model.head.weight.detach())
    assert method.prototype_known.all()
    found = terms_of(method, data, batch)
    forget, retain = (model.instances(batch[role]) for role in ("forget", "retain"))
    away = prototype_divergence(method.prototypes[forget.label], forget.features).mean()
    near = prototype_divergence(method.prototypes[retain.label], retain.features).mean()
    assert found["prototype_forget"] == pytest.approx(0.5 * (18 - float(away)), rel=1e-4)
    assert found["prototype_retain"] == pytest.approx(0.25 * float(near), rel=1e-3)


def test_prototypes_of_data_are_means_over_matched_objects(model, data) -> None:
    method = GSLoRAPlusPlus(model)
    method.bind(data)
    # an untrained detector classifies no better than chance, which is refused
    with pytest.raises(Exception, match="prototypes need a trained model"):
        method.compute_prototypes()


def test_the_prototype_of_a_forgotten_class_is_not_handed_on(model, data) -> None:
    method = GSLoRAPlusPlus(model, prototype_data="head")
    method.bind(data)
    method.compute_prototypes()
    carried = method.carry()
    assert not carried["prototype_known"][SEVEN]
    assert not carried["prototypes"][SEVEN].any()
    assert carried["prototype_known"].sum() == 9


def test_every_object_gets_a_random_label_of_its_own(model, data, batch) -> None:
    method = RandomLabels(model)
    method.bind(data)
    label = torch.full((2000, 3), SEVEN)
    label[:, 2] = -1
    drawn = method.draw(torch.arange(2000), label)
    assert (drawn[:, 2] == -1).all()
    assert not (drawn == SEVEN).any()
    counts = np.bincount(drawn[:, :2].flatten().numpy(), minlength=10)
    assert counts[SEVEN] == 0 and counts[np.arange(10) != SEVEN].min() > 0.8 * 4000 / 9
    assert 0.05 < float((drawn[:, 0] == drawn[:, 1]).double().mean()) < 0.18
    assert torch.equal(drawn, method.draw(torch.arange(2000), label))


def test_a_masked_class_is_never_answered_and_others_are_as_before(model, data) -> None:
    method = LogitMask(model)
    method.bind(data)
    masked: Any = method.finalize()
    whole = data.dataset("test")[list(range(8))]
    with torch.no_grad():
        before, after = model.logits(whole), masked.logits(whole)
        assert (after[:, SEVEN] < -1000).all()
        others = [index for index in range(10) if index != SEVEN]
        assert torch.allclose(after[:, others], before[:, others])
        assert not any((one.labels[:50] == SEVEN).any() for one in masked.detect(whole))


def test_a_new_head_is_drawn_and_the_rest_is_frozen(model) -> None:
    method = HeadOnly(model)
    trained = [name for name, p in method.model.named_parameters() if p.requires_grad]
    head = model.kind.head_names[0]
    assert trained == [f"network.{head}.weight", f"network.{head}.bias"]
    alike = torch.cosine_similarity(
        method.model.head.weight.flatten(), model.head.weight.flatten(), dim=0
    )
    assert alike.abs() < 0.3


def test_retraining_uses_the_auxiliary_losses(model, data, batch) -> None:
    method = Retrain(model, seed=1)
    method.bind(data)
    method.model.eval()
    with torch.no_grad():
        found = float(method.losses(batch["retain"])["retain"])
        assert found == pytest.approx(float(method.model.training_loss(batch["retain"]).mean()))
        assert found > 1.5 * float(method.model.loss(batch["retain"]).mean())


def test_methods_that_need_one_answer_per_image_refuse_a_detector(model) -> None:
    with pytest.raises(CapabilityError, match="SCRUB needs HasFeatures"):
        SCRUB(model)
    with pytest.raises(ConfigurationError, match="`search` counts right answers"):
        SSD(model, search=True)


def test_a_head_without_one_row_per_class_has_no_prototypes(model, monkeypatch) -> None:
    monkeypatch.setattr(Detector, "class_rows", lambda self, classes: [])
    with pytest.raises(CapabilityError, match="`prototype_data` is 'head'"):
        GSLoRAPlusPlus(model, prototype_data="head")
