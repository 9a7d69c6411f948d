"""Controls of models that answer in words: a ban on tokens, and an edit of the head alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmforget import DigitQuestions, ForgetRequest, MultimodalLM, load_multimodal
from mmforget.audit.controls import make_controls
from mmforget.audit.multimodal_answers import listen
from mmforget.errors import CapabilityError, ConfigurationError, RequestError
from mmforget.methods import AnswerBan, AnswerHead
from mmforget.models.base import state_hash
from mmforget.testing.tiny_multimodal import tiny_multimodal

HENRY = ForgetRequest(classes=("henry",))


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    network, processor = tiny_multimodal("llava", words=DigitQuestions.words)
    return MultimodalLM(network, processor, max_new_tokens=3).eval()


@pytest.fixture
def data() -> DigitQuestions:
    data = DigitQuestions(
        strokes=10, scenes=0, eval_scenes=0, variants=1, text_copies=1, batch_size=8
    )
    data.request(HENRY)
    return data


def banned(model: Any) -> list[str]:
    ids = model.network.generation_config.suppress_tokens or []
    return model.processor.tokenizer.convert_ids_to_tokens(ids)  # type: ignore[no-any-return]


def test_the_names_are_banned_and_nothing_else(model: MultimodalLM, data: DigitQuestions) -> None:
    """*Yes* is a forgotten answer too, but no word of the forgotten, whatever is retained."""
    harmless = DigitQuestions(
        strokes=10, scenes=0, eval_scenes=0, variants=1, text_copies=1, retain_questions="harmless"
    )
    harmless.request(HENRY)
    (control,) = make_controls(model, harmless, ["answer_ban"])
    assert banned(control.model) == ["henry"]
    method = AnswerBan(model)
    method.bind(data)
    result = method.finalize()
    assert banned(result) == ["henry"]
    assert banned(model) == [] and state_hash(result) == state_hash(model)
    assert not method.no_op
    data.request(ForgetRequest(classes=("anna",)), HENRY)
    (control,) = make_controls(model, data, ["answer_ban"])
    assert sorted(banned(control.model)) == ["anna", "henry"]


def test_the_ban_is_obeyed_and_saved(
    model: MultimodalLM, data: DigitQuestions, tmp_path: Path
) -> None:
    """A head that says *henry* to everything, loaded with transformers alone."""
    loud = AnswerBan(model).model
    token = loud.processor.tokenizer.convert_tokens_to_ids("henry")
    part = data.probe("test", "name")
    with torch.no_grad():
        states = loud.features(part[list(range(len(part)))])
        loud.head.weight[token] = 100 * states.mean(0)
    assert set(loud.answer(part.pictures(range(len(part))), part.questions)) == {
        "henry henry henry"
    }
    method = AnswerBan(loud)
    method.bind(data)
    result = method.finalize()
    result.save_native(tmp_path)
    again = load_multimodal(tmp_path, max_new_tokens=3)
    for one in (result, again):
        said = one.answer(part.pictures(range(len(part))), part.questions)  # type: ignore[operator]
        assert not any("henry" in text for text in said)
    before, after = (listen(one, part, answers=False).total for one in (loud, again))
    assert torch.allclose(before, after, atol=1e-5)


def test_restore_lifts_the_ban(model: MultimodalLM, data: DigitQuestions) -> None:
    method = AnswerBan(model, copy=False)
    method.bind(data)
    method.finalize()
    assert banned(model) == ["henry"]
    assert method.restore() is model and banned(model) == []


def test_only_the_head_changes(model: MultimodalLM, data: DigitQuestions) -> None:
    (control,) = make_controls(model, data, ["head_only"])
    edited = control.model
    first = dict(model.network.named_parameters())
    changed = {n for n, p in edited.network.named_parameters() if not p.equal(first[n])}
    assert changed == {"lm_head.weight"}
    assert all(
        p.requires_grad == first[n].requires_grad for n, p in edited.network.named_parameters()
    )
    gone, kept = data.probe("train", "name", "forget"), data.subset("train", "retain")
    assert loss_of(edited, gone) > 0.95 * model.forget_bound
    before, after = (loss_of(one, kept) for one in (model, edited))
    assert after < before - 1
    count = len(data.subset("train", "forget")) + len(kept)
    assert control.entry.cost["sample_passes"] == count


def loss_of(model: Any, part: Any) -> float:
    return float(listen(model, part, answers=False).loss.mean())


def test_the_loss_is_that_of_the_model(model: MultimodalLM, data: DigitQuestions) -> None:
    """Answers of one and of several tokens, each with the weight of one."""
    scenes = DigitQuestions(strokes=10, scenes=4, eval_scenes=1, variants=1, text_copies=1)
    scenes.request(HENRY)
    method = AnswerHead(model, bound=1e3)
    method.bind(scenes)
    forget, retain = method._states("forget"), method._states("retain")
    gone, kept = (loss_of(model, scenes.subset("train", role)) for role in ("forget", "retain"))
    assert method.loss(forget, retain).item() == pytest.approx(1e3 - gone + kept, rel=1e-5)
    closed = AnswerHead(model, bound=1e-9)
    assert closed.loss(forget, retain).item() == pytest.approx(kept, rel=1e-5)


def test_mistakes(model: MultimodalLM, data: DigitQuestions) -> None:
    for wrong in ("bound", "records", "steps", "lr"):
        with pytest.raises(ConfigurationError, match=f"`{wrong}` is -1"):
            AnswerHead(model, **{wrong: -1})
    for method in (AnswerBan, AnswerHead):
        with pytest.raises(CapabilityError, match="needs Answers"):
            method(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    train = data.questions("train")
    numbers = [row for row, answer in enumerate(train.answers) if answer == "no"][:1]
    data.request(ForgetRequest(samples=tuple(train.ids[numbers].tolist())))
    other = AnswerBan(model)
    other.bind(data)
    with pytest.raises(RequestError, match="found no word"):
        other.finalize()
