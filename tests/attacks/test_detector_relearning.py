"""Relearning of detectors: victims stay, shots are drawn by seed, masks are seen, real networks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mmforget import Detector, DigitScenes, ForgetRequest, ImageClassifier
from mmforget.attacks.detector_relearning import (
    DetectorCurve,
    DetectorRelearningSettings,
    detector_curve_rows,
    draw_box_shots,
    relearn_detector,
    strongest,
)
from mmforget.errors import CapabilityError, ConfigurationError, DataError, ModelError
from mmforget.methods import LogitMask
from mmforget.models.base import Model, state_hash
from mmforget.testing.knowing_detector import KnowingDetector
from mmforget.testing.tiny_detectors import tiny_detector

TINY: dict[str, Any] = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12, 16],
        "depths": [1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3"],
        "downsample_in_first_stage": False,
    },
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
    "decoder_in_channels": [32] * 3,
    "decoder_layers": 2,
    "num_denoising": 6,
}
QUICK = DetectorRelearningSettings(
    steps=4, evaluate_every=2, learning_rates=(0.1,), head_learning_rates=(), batch_size=3
)


@pytest.fixture(scope="module")
def data() -> DigitScenes:
    found = DigitScenes(scenes=20, eval_scenes=12)
    found.request(ForgetRequest(classes=("seven",)))
    return found


@pytest.fixture(scope="module")
def shots(data: DigitScenes) -> Any:
    train: Any = data.dataset("train")
    return train.showing([7])[np.flatnonzero(train.classes[:, 7])[:4].tolist()]


@pytest.fixture(scope="module")
def tiny_shots() -> Any:
    scenes = DigitScenes(scenes=4, eval_scenes=1, side=64)
    return scenes.dataset("train")[list(range(4))]


def strength(model: Model) -> float:
    """How sure a knowing detector is of sevens."""
    assert isinstance(model, KnowingDetector)
    return float(model.strength[7].detach().clamp(0, 1))


def rest(model: Model) -> float:
    assert isinstance(model, KnowingDetector)
    return float(model.strength[0].detach())


def test_a_forgotten_class_comes_back(data: DigitScenes, shots: Any) -> None:
    victim = KnowingDetector(data, {"seven": -0.05})
    before = state_hash(victim)
    (curve,) = relearn_detector(victim, shots, strength, rest, QUICK)
    assert curve.steps == (0, 2, 4)
    assert curve.precision[0] == 0 < curve.precision[1] < curve.precision[2]
    # four steps of AdamW at a rate of 0.1, each of which moves the weight by about the rate
    assert curve.precision[2] == pytest.approx(2 * 0.4 - 0.05, abs=0.05)  # weight and bias
    assert curve.retained == pytest.approx(1)
    assert state_hash(victim) == before


def test_one_curve_per_learning_rate(data: DigitScenes, shots: Any) -> None:
    victim = KnowingDetector(data, {"seven": -0.05})
    settings = DetectorRelearningSettings(
        steps=3, evaluate_every=2, learning_rates=(0.01, 0.1), head_learning_rates=()
    )
    curves = relearn_detector(victim, shots, strength, rest, settings)
    assert [curve.learning_rate for curve in curves] == [0.01, 0.1]
    assert [curve.steps for curve in curves] == [(0, 2, 3)] * 2
    assert strongest(curves).learning_rate == 0.1
    rows = detector_curve_rows(curves, "victim")
    assert [row["step"] for row in rows] == [0, 2, 3] * 2
    assert {row["model"] for row in rows} == {"victim"}
    assert rows[-1]["accuracy"] == curves[1].precision[-1]


def test_the_head_alone_is_attacked_too(tiny_shots: Any) -> None:
    victim = tiny_detector("rt_detr")
    trained: list[dict[str, Any]] = []

    def remember(model: Model) -> float:
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    settings = DetectorRelearningSettings(steps=2, learning_rates=(), head_learning_rates=(0.1,))
    (curve,) = relearn_detector(victim, tiny_shots, remember, lambda _: 0.0, settings)
    assert curve.layers == "head"
    before, after = trained[0], trained[-1]
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    head = f"network.{victim.kind.head_names[0]}"
    assert changed == {f"{head}.weight", f"{head}.bias"}


def test_both_attacks_are_run_by_default(tiny_shots: Any) -> None:
    settings = DetectorRelearningSettings(steps=1)
    victim = tiny_detector("rt_detr")
    curves = relearn_detector(victim, tiny_shots, lambda _: 0.0, lambda _: 0.0, settings)
    assert [curve.layers for curve in curves] == ["all", "head"]


def test_a_mask_is_taken_off_first(data: DigitScenes, shots: Any) -> None:
    mask = LogitMask(KnowingDetector(data))
    mask.bind(data)
    victim = mask.finalize()
    assert strength(victim) == 0
    (curve,) = relearn_detector(victim, shots, strength, rest, QUICK)
    assert curve.precision[0] == pytest.approx(1)


def test_a_network_that_is_all_zero_has_no_mask(data: DigitScenes, shots: Any) -> None:
    victim = KnowingDetector(data)
    with torch.no_grad():
        victim.network.weight.zero_()
    (curve,) = relearn_detector(victim, shots, strength, rest, QUICK)
    assert curve.precision[0] == 0


def test_a_loss_that_is_not_finite_ends_the_attack(data: DigitScenes, shots: Any) -> None:
    class Exploding(KnowingDetector):
        def training_loss(self, batch: Any) -> Any:
            return super().training_loss(batch) * torch.inf

    (curve,) = relearn_detector(Exploding(data, {"seven": 0.2}), shots, strength, rest, QUICK)
    assert curve.diverged
    assert curve.precision == pytest.approx((0.2,) * 3)


def test_a_copy_that_shares_its_weights_is_noticed(data: DigitScenes, shots: Any) -> None:
    class Shared(KnowingDetector):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self

    with pytest.raises(ModelError, match="must not share its weights"):
        relearn_detector(Shared(data, {"seven": 0.2}), shots, strength, rest, QUICK)


def test_a_real_network(shots: Any) -> None:
    """In eval mode, with the losses of earlier layers; statistics of normalisation stay."""
    victim = Detector("rt_detr", num_classes=10, network_args=TINY, mean=(0.5,) * 3, std=(0.5,) * 3)
    victim = victim.fresh(0)
    before = copy.deepcopy(victim.state_dict())
    seen: list[Any] = []

    def judge(model: Model) -> float:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return 0.5

    settings = DetectorRelearningSettings(
        steps=2, evaluate_every=1, learning_rates=(1e-3,), head_learning_rates=()
    )
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    (first,) = relearn_detector(victim, shots, judge, judge, settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = seen[-1]
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("class_embed" in name for name in changed)
    assert any("backbone" in name for name in changed)
    assert not [name for name in changed if "running_" in name or "num_batches" in name]
    assert all(torch.equal(value, victim.state_dict()[name]) for name, value in before.items())
    relearn_detector(victim, shots, judge, judge, settings)
    assert all(torch.equal(seen[-1][name], after[name]) for name in after)
    assert first.steps == (0, 1, 2)


# ---- shots --------------------------------------------------------------------------------------


def test_shots_hold_the_classes() -> None:
    held = np.random.default_rng(0).random((40, 5)) < 0.4
    drawn = draw_box_shots(held, [1, 3], 4, seed=0)
    assert held[drawn][:, [1, 3]].any(1).all()
    assert held[drawn, 1].sum() >= 4 and held[drawn, 3].sum() >= 4
    assert len(drawn) <= 8 and len(np.unique(drawn)) == len(drawn)
    assert np.array_equal(drawn, draw_box_shots(held, [1, 3], 4, seed=0))
    assert not np.array_equal(drawn, draw_box_shots(held, [1, 3], 4, seed=1))


def test_fewer_images_than_shots() -> None:
    held = np.zeros((6, 2), dtype=bool)
    held[2, 0] = True
    assert draw_box_shots(held, [0, 1], 4, seed=0).tolist() == [2]
    assert draw_box_shots(held, [], 4, seed=0).tolist() == []


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("shots", 0),
        ("steps", -1),
        ("batch_size", 0),
        ("evaluate_every", 0),
        ("evaluation_images", 0),
        ("boxes", "some"),
        ("learning_rates", (0.0,)),
        ("head_learning_rates", (-1.0,)),
    ],
)
def test_settings_out_of_range(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"relearning.{field}"):
        DetectorRelearningSettings(**{field: wrong})


def test_an_attack_needs_a_learning_rate() -> None:
    with pytest.raises(ConfigurationError, match="are both empty"):
        DetectorRelearningSettings(learning_rates=(), head_learning_rates=())


def test_only_detectors_and_only_with_boxes(data: DigitScenes, shots: Any) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    with pytest.raises(CapabilityError, match="needs a Detector"):
        relearn_detector(ImageClassifier(network, num_classes=10), shots, strength, rest, QUICK)
    empty = dict(shots) | {"label": torch.full_like(shots["label"], -1)}
    with pytest.raises(DataError, match="hold no box"):
        relearn_detector(KnowingDetector(data), empty, strength, rest, QUICK)


def test_the_strongest_run() -> None:
    weak = DetectorCurve(1e-3, (0, 1), (0.0, 0.2), 0.5)
    strong = DetectorCurve(1e-4, (0, 1), (0.0, 0.4), 0.5)
    assert strongest([weak, strong]) is strong
