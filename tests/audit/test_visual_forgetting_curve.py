"""The visual-forgetting curve: what is removed, and what is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import mmforget
from mmforget.audit import visual_forgetting_curve as module
from mmforget.audit.visual_forgetting_curve import CutAnswers, cut_answers
from mmforget.data.digit_questions import DigitQuestions
from mmforget.data.digit_words import BRIDGE
from mmforget.errors import ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM, load_multimodal
from mmforget.retention.picture_context import Reader, prompts
from mmforget.retention.remembering_model import RememberingLM
from mmforget.retention.take_along import Reaffirmation
from mmforget.retention.visual_calibration import PeriodicVisualCalibration
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)
QUESTIONS = ["what is this ?", "what are this there please ?"]


def images(seed: int = 0) -> list[list[Tensor]]:
    one, two, three = tiny_pictures(3, seed)
    return [[one], [two, three]]


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param), max_new_tokens=6).eval()


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava"), max_new_tokens=6).eval()


def removed(model: MultimodalLM, removal: Any, shown: list[list[Tensor]]) -> Tensor:
    """Scores of the next token after three given tokens, with the picture taken away."""
    run = module._Cuts(model, 3, removal, None, torch.tensor([9, 9, 9]).byte(), 6)
    batch: dict[str, Any] = {"images": shown, "question": QUESTIONS}
    if removal == "blank":
        batch = run._blanked(batch)
    inputs = model.inputs(batch, padding="left", answers=False)
    kept = model.processor.tokenizer("one two red", add_special_tokens=False)["input_ids"]
    empty = run._extra(batch, inputs)
    bare = prompts(model, batch, pictures=False)
    return run._removed(inputs, bare, [kept, kept[:2]], empty)[1]


@torch.no_grad()
@pytest.mark.parametrize("removal", ["reprefill", "blank", "evict"])
def test_the_picture_is_gone(any_kind: MultimodalLM, removal: str) -> None:
    one, other = (removed(any_kind, removal, images(seed)) for seed in (0, 1))
    if removal == "evict":  # the text has kept something of it
        assert not torch.allclose(one, other, atol=1e-4)
    else:
        assert torch.equal(one, other)


@torch.no_grad()
def test_evicting_equals_a_mask(any_kind: MultimodalLM) -> None:
    """One pass over everything, in which the last token does not look at the picture."""
    model = any_kind
    kept = model.processor.tokenizer("one two red", add_special_tokens=False)["input_ids"]
    shown, asked = images()[:1], QUESTIONS[:1]
    inputs = model.inputs({"images": shown, "question": asked}, padding="left", answers=False)
    ids = torch.cat([inputs["input_ids"], torch.tensor([kept])], dim=1)
    length = ids.shape[1]
    mask = torch.ones(length, length).tril().bool()
    mask[-1] &= ~model.family.visual_mask(model.network, ids)[0]
    given = {**inputs, "input_ids": ids}
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = model.family.visual_mask(model.network, ids).int()
    positions = model.family.position_ids(
        model.network, given | {"attention_mask": torch.ones_like(ids)}
    )
    if positions is not None:
        given["position_ids"] = positions
    wanted = model.network(**given | {"attention_mask": mask[None, None]}).logits[0, -1]
    found = removed(model, "evict", images())[0]
    real = ~found.isinf()
    assert torch.allclose(found[real], wanted[real], atol=1e-5)


def test_a_blank_picture_keeps_the_template(any_kind: MultimodalLM) -> None:
    run = module._Cuts(any_kind, 3, "blank", None, torch.tensor([200, 9, 0]).byte(), 6)
    batch: dict[str, Any] = {"images": images(), "question": QUESTIONS}
    blanked = run._blanked(batch)
    for shown, empty in zip(batch["images"], blanked["images"], strict=True):
        assert [one.shape for one in shown] == [one.shape for one in empty]
    assert blanked["images"][1][1][:, 5, 7].tolist() == [200, 9, 0]
    own, other = (any_kind.inputs(one, answers=False) for one in (batch, blanked))
    assert torch.equal(own["input_ids"], other["input_ids"])
    assert not torch.equal(own["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize(
    ("kind", "removal"),
    [("llava", "reprefill"), ("llava", "blank"), ("llava", "evict"), ("qwen2_vl", "evict")],
)
def test_answers(kind: Any, removal: Any) -> None:
    model = MultimodalLM(*tiny_multimodal(kind), max_new_tokens=6).eval()
    found = cut_answers(model, images(), QUESTIONS, places=4, removal=removal)
    banned = list(model.family.image_token_ids(model.network))
    wanted = model.answer(images(), QUESTIONS, suppress_tokens=banned)
    assert list(found.full) == wanted == list(found.cut[-1]) == list(found.kept[-1])
    assert list(found.without) == model.answer([[], []], QUESTIONS, suppress_tokens=banned)
    if removal == "reprefill":
        assert found.cut[0] == found.without
    for place in range(4):
        for cut, kept, full in zip(found.cut[place], found.kept[place], found.full, strict=True):
            assert cut.startswith(kept) and full.startswith(kept)
    if kind == "llava":
        rows = cut_answers(model, images(), QUESTIONS, places=4, removal=removal, batch_size=1)
        assert rows == found


def test_showing_the_picture_again_is_moving_it(model: MultimodalLM) -> None:
    again = Reaffirmation("look again", 2)
    found = cut_answers(model, images(), QUESTIONS, places=3, again=again)
    moved = PeriodicVisualCalibration(model, at=(0.5,), pool=2, bridge="look again")
    assert found.again == again
    assert list(found.cut[1]) == moved.answer(images(), QUESTIONS)
    none = cut_answers(model, images(), QUESTIONS, places=3)
    assert none.cut[1] != found.cut[1] and none.full == found.full
    whole = cut_answers(model, images(), QUESTIONS, places=3, removal="evict", again=again)
    assert whole.cut[1] != found.cut[1]


def test_vision_remember_is_at_work() -> None:
    model = RememberingLM(*tiny_multimodal("internvl"), max_new_tokens=4).eval()
    for gate in model.remember.gates.values():
        gate.data.fill_(2.0)
    banned = list(model.family.image_token_ids(model.network))
    for removal in ("reprefill", "evict", "blank"):
        found = cut_answers(model, images(), QUESTIONS, places=2, removal=removal)  # type: ignore[arg-type]
        assert list(found.full) == model.answer(images(), QUESTIONS, suppress_tokens=banned)
    plain = MultimodalLM(model.network, model.processor, max_new_tokens=4).eval()
    assert found.full != cut_answers(plain, images(), QUESTIONS, places=2).full
    with model.remembering():
        reader = Reader(plain)
        one = reader.read_native(
            model.inputs({"images": images(), "question": QUESTIONS}, "left", answers=False)
        )
    two = Reader(model).read_native(
        model.inputs({"images": images(), "question": QUESTIONS}, "left", answers=False)
    )
    assert torch.equal(one, two)


def test_accuracies_by_hand() -> None:
    given = CutAnswers(
        full=("one two", "four"),
        without=("six", "four"),
        cut=(("six two", "four"), ("one six", "four"), ("one two", "four")),
        kept=(("", ""), ("one", ""), ("one two", "four")),
        removal="evict",
    )
    truths = ["one two", "five"]
    curve = given.curve(truths)
    assert curve.accuracy == 0.5 and curve.accuracies == (0.0, 0.0, 0.5)
    assert (curve.removal, curve.n) == ("evict", 2)
    loose = given.curve(truths, judge=lambda answer, truth: 1.0 if "two" in answer else 0.0)
    assert loose.accuracies == (0.5, 0.0, 0.5)
    assert given.accuracy_without(truths).value == 0.0
    assert given.accuracy_without(["six", "four"]).value == 1.0
    remaining = given.remaining(truths)
    assert [one.value for one in remaining] == [1 / 3, 0.0, None]
    assert [one.n for one in remaining] == [3, 2, 0]


def test_bad_input(model: MultimodalLM) -> None:
    with pytest.raises(DataError, match="question 1 has no picture that could be taken away"):
        cut_answers(model, [images()[0], []], QUESTIONS)
    with pytest.raises(DataError, match="2 questions and 1 lists"):
        cut_answers(model, images()[:1], QUESTIONS)
    with pytest.raises(ConfigurationError, match="`removal` is 'evicted', did you mean 'evict'"):
        cut_answers(model, images(), QUESTIONS, removal="evicted")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`places` is 1"):
        cut_answers(model, images(), QUESTIONS, places=1)


@pytest.fixture(scope="module")
def shipped() -> MultimodalLM:
    return load_multimodal(Path(mmforget.__file__).parent / "assets/digit_world/multimodal")


def four_digits(kind: str, number: int) -> dict[str, Any]:
    data = DigitQuestions(scenes=1, eval_scenes=400).probe("test", kind)
    rows = [n for n, one in enumerate(data.answers) if len(one.split(" . ")[0].split()) == 4]
    return dict(data[rows[:number]])


@pytest.mark.slow
@pytest.mark.parametrize("removal", ["reprefill", "evict", "blank"])
def test_a_list_needs_its_picture_to_the_end(shipped: MultimodalLM, removal: Any) -> None:
    given = four_digits("list", 64)
    found = cut_answers(shipped, given["images"], given["question"], places=5, removal=removal)
    curve = found.curve(given["answer"])
    assert curve.accuracy > 0.6
    assert max(curve.accuracies[:4]) < 0.05 and curve.accuracies[4] == curve.accuracy
    assert found.accuracy_without(given["answer"]).value == 0.0
    assert all((one.value or 0.0) < 0.1 for one in found.remaining(given["answer"])[:4])


@pytest.mark.slow
@pytest.mark.parametrize("removal", ["reprefill", "evict"])
def test_a_conclusion_needs_the_list_only(shipped: MultimodalLM, removal: Any) -> None:
    given = four_digits("read_then_answer", 64)
    found = cut_answers(shipped, given["images"], given["question"], places=9, removal=removal)
    curve = found.curve(given["answer"])
    assert curve.accuracy > 0.6
    assert max(curve.accuracies[:3]) < 0.1  # the list is not complete
    assert min(curve.accuracies[5:]) > curve.accuracy - 0.05


@pytest.mark.slow
def test_showing_the_picture_again_mends_most(shipped: MultimodalLM) -> None:
    given = four_digits("list", 64)
    again = Reaffirmation(BRIDGE, 2)
    found = cut_answers(shipped, given["images"], given["question"], places=5, again=again)
    remaining = found.remaining(given["answer"])
    assert min(remaining[k].value or 0.0 for k in (1, 2, 3)) > 0.5
