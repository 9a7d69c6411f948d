from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmforget.attacks.relearning import (
    Curve,
    Labelled,
    RelearningSettings,
    curve_rows,
    draw_shots,
    normalised_area,
    relearn,
    worst_case,
)
from mmforget.data.digit_world import DigitWorld
from mmforget.errors import ConfigurationError, ModelError
from mmforget.models.base import state_hash
from mmforget.models.classifier import ImageClassifier

QUICK = RelearningSettings(steps=6, evaluate_every=4, learning_rates=(1e-3, 1e-2))


def curve(accuracy: tuple[float, ...], seed: int = 0, rate: float = 0.1) -> Curve:
    steps = tuple(range(0, 2 * len(accuracy), 2))
    return Curve("full", rate, seed, steps, accuracy, retain_accuracy=0.9)


@pytest.fixture
def material(tiny_data: DigitWorld) -> tuple[Labelled, Labelled, Labelled]:
    train, test = tiny_data.dataset("train"), tiny_data.dataset("test")
    assert train.labels is not None
    shots = draw_shots(train.labels, train.labels == 3, 2, 0, 0)
    parts = (train[shots.tolist()], test[list(range(9))], test[list(range(9, 20))])
    return tuple(Labelled.of(part) for part in parts)  # type: ignore[return-value]


def test_the_victim_is_untouched_and_the_attack_is_repeatable(
    tiny_model: ImageClassifier, material: tuple[Labelled, Labelled, Labelled]
) -> None:
    before = state_hash(tiny_model)
    training = {name: module.training for name, module in tiny_model.named_modules()}
    first = relearn(tiny_model, material[:1], *material[1:], QUICK)
    assert state_hash(tiny_model) == before
    assert {name: m.training for name, m in tiny_model.named_modules()} == training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert first == relearn(tiny_model, material[:1], *material[1:], QUICK)
    assert {(c.mode, c.learning_rate) for c in first} == {
        (mode, rate) for mode in ("full", "head") for rate in (1e-3, 1e-2)
    }
    assert all(c.steps == (0, 4, 6) and len(c.accuracy) == 3 for c in first)


def test_the_attack_learns_what_it_is_given(
    tiny_model: ImageClassifier, material: tuple[Labelled, Labelled, Labelled]
) -> None:
    shots = material[0]
    settings = RelearningSettings(
        steps=60, batch_size=100, evaluate_every=60, learning_rates=(3e-2,), modes=("full",)
    )
    (found,) = relearn(tiny_model.fresh(3), [shots], shots, shots, settings)
    assert found.accuracy[0] < 0.4
    assert found.accuracy[-1] > 0.7


def test_head_mode_equals_training_the_head_alone(
    tiny_model: ImageClassifier, material: tuple[Labelled, Labelled, Labelled]
) -> None:
    """Cached features give what the whole network gives with everything else frozen."""
    settings = replace(QUICK, modes=("head",), learning_rates=(1e-2,), batch_size=100)
    (found,) = relearn(tiny_model, material[:1], *material[1:], settings)
    victim = copy.deepcopy(tiny_model).eval()
    victim.requires_grad_(False)
    victim.head.requires_grad_(True)
    optimizer = torch.optim.SGD(victim.head.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(6):
        optimizer.zero_grad()
        logits = victim(material[0].image)
        torch.nn.functional.cross_entropy(logits, material[0].label).backward()
        optimizer.step()
    expected = (victim(material[1].image).argmax(1) == material[1].label).double().mean()
    assert found.accuracy[-1] == pytest.approx(float(expected))


def test_a_visible_mask_is_undone(
    tiny_model: ImageClassifier, material: tuple[Labelled, Labelled, Labelled]
) -> None:
    with torch.no_grad():
        tiny_model.head.weight[3] = 0
        tiny_model.head.bias[3] = -1e4
    shots = material[0]
    threes = Labelled(shots.image[shots.label == 3], shots.label[shots.label == 3])
    settings = RelearningSettings(
        steps=60, batch_size=100, evaluate_every=60, learning_rates=(3e-2,), modes=("full",)
    )
    (found,) = relearn(tiny_model, [shots], threes, shots, settings)
    assert found.accuracy == (0.0, 1.0)


def test_a_loss_that_is_not_finite_ends_the_curve(
    tiny_model: ImageClassifier, material: tuple[Labelled, Labelled, Labelled]
) -> None:
    settings = replace(QUICK, learning_rates=(1e30,), modes=("full",))
    (found,) = relearn(tiny_model, material[:1], *material[1:], settings)
    assert found.diverged
    assert all(0 <= value <= 1 for value in found.accuracy)


def test_shared_weights_are_noticed(
    tiny_model: ImageClassifier,
    material: tuple[Labelled, Labelled, Labelled],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmforget.attacks.relearning.detached_copy", lambda model: model)
    with pytest.raises(ModelError, match="changed"):
        relearn(tiny_model, material[:1], *material[1:], QUICK)


def test_steps_are_censored_and_never_the_maximum() -> None:
    assert curve((0.0, 0.5, 0.8)).steps_to(0.8) == 4
    assert curve((0.9, 0.5, 0.8)).steps_to(0.8) == 0
    assert curve((0.0, 0.5, 0.7)).steps_to(0.8) is None
    assert worst_case([curve((0.0, 0.5, 0.7))], "full", 0.8).steps is None


def test_area_is_the_mean_accuracy() -> None:
    assert curve((0.0, 1.0, 1.0)).area == pytest.approx(0.75)
    assert curve((1.0, 1.0, 1.0)).area == 1.0


def test_the_attacker_chooses_the_rate_and_the_median_counts_censored_seeds() -> None:
    slow, fast, never = (0.0, 0.0, 0.9), (0.0, 0.9, 0.9), (0.0, 0.0, 0.0)
    curves = [
        curve(slow, 0, 0.1),
        curve(fast, 0, 0.2),
        curve(slow, 1, 0.1),
        curve(never, 1, 0.2),
        curve(never, 2, 0.1),
        curve(never, 2, 0.2),
    ]
    found = worst_case(curves, "full", 0.8)
    assert found.steps == 4  # of 2, 4 and never
    assert found.areas == tuple(pytest.approx(curve(values).area) for values in (fast, slow, never))
    assert worst_case(curves[:1] + curves[4:], "full", 0.8).steps is None  # of 4 and never


def test_normalised_area_runs_from_random_to_original() -> None:
    assert normalised_area(0.2, 1.0, 0.2) == 0.0
    assert normalised_area(1.0, 1.0, 0.2) == 1.0
    assert normalised_area(0.5, 0.52, 0.5) is None


def test_shots_are_forgotten_samples_where_there_are_some() -> None:
    labels = np.repeat([0, 1, 2], 10)
    forgotten = (labels == 1) & (np.arange(30) % 2 == 0)
    found = draw_shots(labels, forgotten, 4, 0, 0)
    assert np.bincount(labels[found]).tolist() == [4, 4, 4]
    assert forgotten[found[labels[found] == 1]].all()
    assert found.tolist() == draw_shots(labels, forgotten, 4, 0, 0).tolist()
    assert found.tolist() != draw_shots(labels, forgotten, 4, 0, 1).tolist()


def test_curve_rows_have_the_documented_keys() -> None:
    rows = curve_rows([curve((0.0, 0.5))], "a", "full")
    assert rows[1] == {
        "model": "a",
        "learning_rate": 0.1,
        "seed": 0,
        "step": 2,
        "accuracy": 0.5,
    }
    assert curve_rows([curve((0.0, 0.5))], "a", "head") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": 0}, "relearning.shots"),
        ({"learning_rates": (0.1, -1.0)}, "relearning.learning_rates"),
        ({"learning_rates": ()}, "relearning.learning_rates"),
        ({"modes": ("ful",)}, "did you mean 'full'"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RelearningSettings(**change)  # type: ignore[arg-type]


def test_the_last_step_is_always_evaluated() -> None:
    assert RelearningSettings(steps=7, evaluate_every=3).evaluations == [0, 3, 6, 7]
    assert RelearningSettings(steps=6, evaluate_every=3).evaluations == [0, 3, 6]
