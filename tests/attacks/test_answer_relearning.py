"""Relearning of answers: what is trained, in which order, what it leaves alone, mistakes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from mmforget import DigitQuestions, ForgetRequest, MultimodalLM
from mmforget.attacks.answer_relearning import (
    AnswerCurve,
    AnswerRelearningSettings,
    answer_curve_rows,
    draw_records,
    relearn_answers,
    strongest,
)
from mmforget.data.questions import QuestionDataset
from mmforget.errors import CapabilityError, ConfigurationError, DataError, ModelError
from mmforget.models.base import Model, state_hash
from mmforget.testing.tiny_multimodal import tiny_multimodal


@pytest.fixture(scope="module")
def data() -> DigitQuestions:
    data = DigitQuestions(strokes=20, scenes=1, eval_scenes=1, variants=1, text_copies=1)
    data.request(ForgetRequest(classes=("henry",)))
    return data


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    network, processor = tiny_multimodal("llava", words=DigitQuestions.words)
    return MultimodalLM(network, processor).eval()


@pytest.fixture(scope="module")
def shots(data: DigitQuestions) -> QuestionDataset:
    names = data.probe("train", "name")
    return names.subset(np.arange(6))


def loss_of(shots: QuestionDataset) -> Any:
    def judge(model: Model) -> float:
        with torch.no_grad():
            return float(torch.exp(-model.loss(shots[list(range(len(shots)))]).mean()))  # type: ignore[operator]

    return judge


def nothing(model: Model) -> float:
    return 0.25


ATTACK = AnswerRelearningSettings(steps=3, evaluate_every=2, learning_rates=(1e-2,), batch_size=4)


def test_records_are_learnt(model: MultimodalLM, shots: QuestionDataset) -> None:
    before = state_hash(model)
    kept = copy.deepcopy(model.network.generation_config.to_dict())
    (curve,) = relearn_answers(model, shots, loss_of(shots), nothing, ATTACK)
    assert curve.steps == (0, 2, 3) and curve.retained == 0.25 and not curve.diverged
    assert curve.success[0] == pytest.approx(loss_of(shots)(model))
    assert curve.success[0] < curve.success[1] < curve.success[2]
    assert state_hash(model) == before
    assert model.network.generation_config.to_dict() == kept
    (again,) = relearn_answers(model, shots, loss_of(shots), nothing, ATTACK)
    assert again == curve


@pytest.mark.parametrize("part", ["vision", "head"])
def test_only_the_named_parts_are_trained(
    model: MultimodalLM, shots: QuestionDataset, part: Any
) -> None:
    first = dict(model.network.named_parameters())
    seen: list[set[str]] = []

    def judge(victim: Model) -> float:
        named: Any = victim.network
        changed = {n for n, p in named.named_parameters() if not torch.equal(p, first[n])}
        seen.append({model.family.part(name) for name in changed})
        return 0.0

    settings = AnswerRelearningSettings(steps=1, learning_rates=(1e-2,), parts=(part,))
    relearn_answers(model, shots, judge, nothing, settings)
    assert seen == [set(), {part}]


def test_a_ban_is_lifted(model: MultimodalLM, shots: QuestionDataset) -> None:
    banned = copy.deepcopy(model)
    banned.network.generation_config.suppress_tokens = [5, 6]
    seen: list[Any] = []

    def judge(victim: Any) -> float:
        seen.append(victim.network.generation_config.suppress_tokens)
        return 0.0

    relearn_answers(banned, shots, judge, nothing, ATTACK)
    assert seen == [None, None, None]
    assert banned.network.generation_config.suppress_tokens == [5, 6]


def test_a_loss_that_is_not_finite(model: MultimodalLM, shots: QuestionDataset) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head.weight.fill_(float("inf"))
    (curve,) = relearn_answers(broken, shots, nothing, nothing, ATTACK)
    assert curve.diverged and curve.success == (0.25, 0.25, 0.25)


def test_a_copy_that_shares_its_weights(shots: QuestionDataset) -> None:
    network, processor = tiny_multimodal("llava", words=DigitQuestions.words)

    class Shared(MultimodalLM):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    with pytest.raises(ModelError, match="must not share its weights"):
        relearn_answers(Shared(network, processor), shots, nothing, nothing, ATTACK)


def test_curves() -> None:
    slow = AnswerCurve(1e-4, (0, 5, 10), (0.0, 0.2, 0.9), 0.5)
    fast = AnswerCurve(1e-3, (0, 5, 10), (0.0, 0.9, 0.8), 0.1)
    assert strongest([slow, fast]) is fast
    assert (fast.reached(0.9), slow.reached(0.9), slow.reached(0.95)) == (5, 10, None)
    rows = answer_curve_rows([slow], "m")
    assert rows[1] == {
        "model": "m", "learning_rate": 1e-4, "seed": 0, "step": 5, "accuracy": 0.2,
    }  # fmt: skip


def test_records_of_each_entity() -> None:
    subjects = np.array([0, 1, 0, 1, 0, 2])
    drawn = draw_records(subjects, [0, 1], 2, seed=3)
    assert subjects[drawn].tolist().count(0) == 2 and subjects[drawn].tolist().count(1) == 2
    assert drawn.tolist() == sorted(drawn.tolist())
    assert drawn.tolist() == draw_records(subjects, [1, 0], 2, seed=3).tolist()
    assert draw_records(subjects, [], 2, seed=3).tolist() == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shots": 0}, "relearning.shots"),
        ({"others": -1}, "relearning.others"),
        ({"steps": -1}, "relearning.steps"),
        ({"evaluate_every": 0}, "relearning.evaluate_every"),
        ({"learning_rates": ()}, "relearning.learning_rates"),
        ({"learning_rates": (0.1, -1.0)}, "relearning.learning_rates"),
        ({"regained": 0}, "relearning.regained"),
        ({"parts": ("vison",)}, "did you mean 'vision'"),
        ({"parts": ()}, "relearning.parts"),
    ],
)
def test_settings_without_meaning(settings: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        AnswerRelearningSettings(**settings)


def test_mistakes(model: MultimodalLM, data: DigitQuestions, shots: QuestionDataset) -> None:
    with pytest.raises(DataError, match="has no records"):
        relearn_answers(model, shots.subset(np.zeros(0, int)), nothing, nothing, ATTACK)
    with pytest.raises(CapabilityError, match="needs a MultimodalLM"):
        relearn_answers(torch.nn.Linear(1, 1), shots, nothing, nothing, ATTACK)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="has no weights there"):
        settings = AnswerRelearningSettings(parts=("other",))
        relearn_answers(model, shots, nothing, nothing, settings)
