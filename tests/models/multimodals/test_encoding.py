"""Labels cover exactly the answer, in every chat template and on both sides of the padding."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from mmforget.errors import AccessError, ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

ENDS = {"llava": "</s>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}
ANSWERS = ["anna", "red blue", "rome"]


@pytest.fixture(scope="module", params=get_args(TinyMultimodalKind))
def named(request: Any) -> tuple[str, MultimodalLM]:
    return request.param, MultimodalLM(*tiny_multimodal(request.param)).eval()


def batch() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [two, three], []],
        "question": ["what is this ?", "what colour are the digit ?", "where is anna ?"],
        "answer": ANSWERS,
        "id": torch.arange(3),
        "weight": torch.ones(3),
    }


@pytest.mark.parametrize("padding", ["left", "right"])
def test_only_the_answer_and_its_end_are_learnt(
    named: tuple[str, MultimodalLM], padding: Any
) -> None:
    kind, model = named
    inputs = model.inputs(batch(), padding=padding)
    mask = inputs["attention_mask"]
    assert bool(mask[:, -1].all()) == (padding == "left") and not mask.all()
    for ids, labels, answer in zip(inputs["input_ids"], inputs["labels"], ANSWERS, strict=True):
        learnt = labels != -100
        assert torch.equal(ids[learnt], labels[learnt])
        words = model.processor.tokenizer.convert_ids_to_tokens(labels[learnt].tolist())
        assert words == [*answer.split(), ENDS.get(kind, "<|im_end|>")]
        places = learnt.nonzero().flatten()
        assert int(places[-1] - places[0]) + 1 == len(places)  # one stretch


def test_the_whole_text_without_the_pictures(named: tuple[str, MultimodalLM]) -> None:
    _, model = named
    inputs = model.inputs(batch(), label_scope="all_text")
    visual = model.family.visual_mask(model.network, inputs["input_ids"])
    learnt = inputs["labels"] != -100
    assert visual.sum() == 3 * 16
    assert torch.equal(learnt, inputs["attention_mask"].bool() & ~visual)


def test_the_assistants_turn(named: tuple[str, MultimodalLM]) -> None:
    _, model = named
    answer = (model.inputs(batch())["labels"] != -100).sum()
    turn = (model.inputs(batch(), label_scope="assistant")["labels"] != -100).sum()
    assert turn >= answer


@torch.no_grad()
def test_padding_changes_no_loss(named: tuple[str, MultimodalLM]) -> None:
    _, model = named
    given = batch()
    together = model.loss(given)
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in given.items()}
        assert torch.allclose(model.loss(alone)[0], together[row], atol=1e-5)


@torch.no_grad()
def test_losses_are_the_librarys(named: tuple[str, MultimodalLM]) -> None:
    _, model = named
    inputs = model.inputs(batch())
    theirs = model.network(**inputs).loss  # mean over all labelled tokens
    ours = model.token_losses(batch())
    assert ours.tokens.tolist() == [2, 3, 2]
    assert torch.allclose(ours.total.sum() / ours.tokens.sum(), theirs, atol=1e-5)


def test_a_template_that_writes_no_end_gets_one() -> None:
    network, processor = tiny_multimodal("llava")
    processor.chat_template = processor.chat_template.replace("{{ eos_token }}", "")
    labels = MultimodalLM(network, processor).inputs(batch())["labels"]
    assert (labels != -100).sum(dim=1).tolist() == [2, 3, 2]


def test_what_cannot_be_encoded_is_named() -> None:
    network, processor = tiny_multimodal("llava")
    model = MultimodalLM(network, processor)
    with pytest.raises(DataError, match="row 1 of the batch has an empty answer"):
        model.inputs(batch() | {"answer": ["anna", " ", "rome"]})
    with pytest.raises(AccessError, match="needs answers"):
        model.loss({key: value for key, value in batch().items() if key != "answer"})
    with pytest.raises(ConfigurationError, match="`padding` is 'middle'"):
        model.inputs(batch(), padding="middle")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"`label_scope` is 'answers'.*did you mean"):
        model.inputs(batch(), label_scope="answers")  # type: ignore[arg-type]
    model.max_length = 20
    with pytest.raises(DataError, match=r"row 1 .* more than `max_length` 20"):
        model.inputs(batch())
    blind = MultimodalLM(network, tiny_multimodal("llava")[1])
    blind.processor.chat_template = blind.processor.chat_template.replace("<image> ", "")
    with pytest.raises(Exception, match=r"picture|image"):
        blind.inputs(batch())
    blind.processor.chat_template = None
    with pytest.raises(ConfigurationError, match="no chat template"):
        blind.inputs(batch())


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    network, processor = tiny_multimodal("llava")
    processor.chat_template = "{% if add_generation_prompt %}who ?{% else %}what ? anna{% endif %}"
    with pytest.raises(DataError, match="does not continue the question"):
        MultimodalLM(network, processor).inputs(batch() | {"images": [[], [], []]})
