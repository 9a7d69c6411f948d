"""Fewer visual tokens before the language model: exactness, positions, padding, labels."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.retention.token_pooling import PooledTokens
from mmforget.retention.token_reduction import PictureTokens
from mmforget.retention.visual_features import ChosenTokens
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

KINDS = get_args(TinyMultimodalKind)


@cache
def model_of(kind: TinyMultimodalKind) -> MultimodalLM:
    """Shared: no test may change it."""
    return MultimodalLM(*tiny_multimodal(kind)).eval()


def batch() -> dict[str, Any]:
    one, two, three = tiny_pictures(3)
    return {
        "images": [[one], [two, three], []],
        "question": ["what is this ?", "who is the person shown in it ?", "where is anna ?"],
        "answer": ["anna", "clara please", "rome"],
    }


def strength(tokens: PictureTokens) -> Tensor:
    return tokens.features.norm(dim=1)


def without(model: MultimodalLM, inputs: dict[str, Any], reducer: ChosenTokens) -> dict[str, Any]:
    """The full prompt at its positions, with the tokens that do not stay hidden from all others."""
    assert reducer.kept is not None
    network, mask = model.network, inputs["attention_mask"].clone()
    visual = model.family.visual_mask(network, inputs["input_ids"])
    for row, pictures in enumerate(reducer.kept.places):
        if pictures is not None:
            starts = [0, *torch.tensor([16] * len(pictures)).cumsum(0).tolist()]
            stay = torch.cat([one + at for one, at in zip(pictures, starts[:-1], strict=True)])
            gone = torch.ones(starts[-1], dtype=torch.bool)
            gone[stay] = False
            mask[row, visual[row].nonzero()[gone, 0]] = 0
    positions = model.family.position_ids(network, inputs)
    if positions is None:
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return inputs | {"attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [5, 0])
def test_equals_hiding_the_tokens_in_every_layer(kind: TinyMultimodalKind, keep: int) -> None:
    """At kept positions, with labels and right padding."""
    model = model_of(kind)
    inputs = model.inputs(batch(), padding="right")
    labels = inputs.pop("labels")
    reducer = ChosenTokens(strength, keep_tokens=keep, keep_positions=True)
    short = reducer.reduced(model.network, inputs | {"labels": labels})
    hidden = without(model, inputs, reducer)
    with torch.no_grad():
        found = model.network(**model.family.model_inputs(short)).logits
        expected = model.network(**hidden).logits
    stay = hidden["attention_mask"].bool()
    real = short["attention_mask"].bool()
    assert real.sum(dim=1).tolist() == stay.sum(dim=1).tolist()
    assert real.int().diff(dim=1).max() <= 0  # still padded on the right
    assert torch.equal(short["input_ids"][real], inputs["input_ids"][stay])
    assert torch.equal(short["labels"][real], labels[stay])
    assert (short["labels"][~real] == IGNORED).all()
    torch.testing.assert_close(found[real], expected[stay], rtol=0, atol=1e-5)
    assert ("mm_encoder_outputs" in short) == bool(keep)
    assert int(model.family.visual_mask(model.network, short["input_ids"]).sum()) == 3 * keep


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl", "internvl"])
def test_generation_goes_on_at_the_positions_of_the_full_prompt(kind: TinyMultimodalKind) -> None:
    """Cached steps against full passes over the hidden prompt, step by step."""
    model = model_of(kind)
    network = model.network
    inputs = model.inputs(batch(), padding="left", answers=False)
    reducer = ChosenTokens(strength, keep_ratio=0.25, keep_positions=True)
    short = reducer.reduced(network, inputs)
    assert short["attention_mask"][:, -1].all() and not short["attention_mask"][:, 0].all()
    with torch.no_grad():
        found = network.generate(
            **model.family.model_inputs(short),
            do_sample=False,
            max_new_tokens=4,
            min_new_tokens=4,
            output_logits=True,
            return_dict_in_generate=True,
        )
        hidden = without(model, inputs, reducer)
        for step, logits in enumerate(found.logits):
            expected = network(**hidden, use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            token = found.sequences[:, short["input_ids"].shape[1] + step, None]
            hidden |= {
                "input_ids": torch.cat((hidden["input_ids"], token), dim=1),
                "attention_mask": torch.cat(
                    (hidden["attention_mask"], torch.ones_like(token)), dim=1
                ),
                "position_ids": torch.cat(
                    (hidden["position_ids"], hidden["position_ids"][..., -1:] + 1), dim=-1
                ),
            }
            if "mm_token_type_ids" in hidden:
                types = hidden["mm_token_type_ids"]
                hidden["mm_token_type_ids"] = torch.cat((types, torch.zeros_like(token)), dim=1)


def test_positions_are_counted_anew_where_the_network_only_counts() -> None:
    model = model_of("llava")
    inputs = model.inputs(batch(), padding="left", answers=False)
    short = ChosenTokens(strength, keep_tokens=4).reduced(model.network, inputs)
    assert "position_ids" not in short
    kept = ChosenTokens(strength, keep_tokens=4, keep_positions=True)
    assert (
        int(kept.reduced(model.network, inputs)["position_ids"].max()) > short["input_ids"].shape[1]
    )


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_beams(kind: TinyMultimodalKind) -> None:
    """Each beam gets the features of its own sample."""
    model = model_of(kind)
    one, two, _ = tiny_pictures(3)
    questions = ["what is this ?", "who is the person shown in it ?"]
    with ChosenTokens(strength, keep_tokens=4).on(model):
        both = model.answer([[one], [two]], questions, num_beams=3, max_new_tokens=4)
        alone = [
            model.answer([[picture]], [question], num_beams=3, max_new_tokens=4)[0]
            for picture, question in zip((one, two), questions, strict=True)
        ]
    assert both == alone


def test_pooled_positions_of_qwen_lie_in_the_middle_of_their_cells() -> None:
    model = model_of("qwen2_vl")
    inputs = model.inputs(
        {"images": [[tiny_pictures(1)[0]]], "question": ["what ?"]}, answers=False
    )
    reducer = PooledTokens(keep_ratio=0.25)
    short = reducer.reduced(model.network, inputs)
    visual = model.family.visual_mask(model.network, short["input_ids"])[0]
    rows, columns = short["position_ids"][1:, 0, visual] - short["position_ids"][0, 0, visual]
    assert rows.tolist() == [1, 1, 3, 3] and columns.tolist() == [1, 3, 1, 3]
    pooled = short["mm_encoder_outputs"]["image"].pooler_output[0]
    whole = model.family.encode_images(model.network, inputs).pooled[0].reshape(4, 4, -1)
    torch.testing.assert_close(pooled[1], whole[:2, 2:].mean(dim=(0, 1)))


def test_all_tokens_or_no_picture_give_the_inputs_back() -> None:
    model = model_of("smolvlm")
    inputs = model.inputs(batch())
    reducer = ChosenTokens(strength, keep_tokens=16)
    same = reducer.reduced(model.network, inputs)
    assert same.keys() == inputs.keys() and all(same[key] is inputs[key] for key in same)
    assert reducer.kept is not None and reducer.kept.ratio == 1.0
    text = model.inputs({"images": [[]], "question": ["what ?"]}, answers=False)
    assert reducer.reduced(model.network, text) == text
    assert reducer.kept.counts == [None] and reducer.kept.ratio is None


def test_gradients_reach_tower_and_projector() -> None:
    model = MultimodalLM(*tiny_multimodal("llava"), trained=("vision", "projector"))
    with ChosenTokens(strength, keep_tokens=3).on(model):
        model.loss(batch()).mean().backward()
    parts = {
        model.family.part(name)
        for name, parameter in model.network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert parts == {"vision", "projector"}


def test_refused_inputs() -> None:
    model = model_of("llava")
    inputs = model.inputs(batch(), padding="left", answers=False)
    reducer = ChosenTokens(strength, keep_tokens=3)
    short = reducer.reduced(model.network, inputs)
    with pytest.raises(DataError, match="ready visual features"):
        reducer.reduced(model.network, short)
    mixed = inputs | {"attention_mask": inputs["attention_mask"].clone()}
    mixed["attention_mask"][1, -1] = 0
    with pytest.raises(DataError, match=r"row 0 .* on the left and row 1 on the right"):
        reducer.reduced(model.network, mixed)
    fewer = inputs | {"pixel_values": inputs["pixel_values"][:2]}
    with pytest.raises(DataError, match="row 1 of the batch has 32 placeholders"):
        reducer.reduced(model.network, fewer)
    broken = ChosenTokens(lambda tokens: torch.zeros(2), keep_tokens=3)
    with pytest.raises(ConfigurationError, match="one score for each"):
        broken.reduced(model.network, inputs)
