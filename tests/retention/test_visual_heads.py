"""Heads: effects that add up, paths, silence, controls."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.visual_heads import (
    Head,
    HeadEffects,
    head_effects,
    pruned_heads,
    random_heads,
)
from mmforget.testing.tiny_multimodal import TinyMultimodalKind, tiny_multimodal, tiny_pictures

QUESTIONS = ["what is this ?", "which digit is there please ?"]


def images() -> list[list[Tensor]]:
    one, two, three = tiny_pictures(3)
    return [[one], [two, three]]


@pytest.fixture(scope="module", params=get_args(TinyMultimodalKind))
def any_kind(request: Any) -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal(request.param), max_new_tokens=4).eval()


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return MultimodalLM(*tiny_multimodal("llava"), max_new_tokens=4).eval()


@torch.no_grad()
def scores(model: MultimodalLM, shown: list[list[Tensor]], row: int) -> Tensor:
    batch = {"images": shown[row : row + 1], "question": QUESTIONS[row : row + 1]}
    inputs = model.inputs(batch, padding="left", answers=False)
    return model.network(**inputs, use_cache=False).logits[0, -1]


@torch.no_grad()
def test_effects_add_up_to_the_difference_of_the_logits(any_kind: MultimodalLM) -> None:
    """With the embedding and the feed-forward layers, which write into the same states."""
    model = any_kind
    found = head_effects(model, images(), QUESTIONS, ["one", "two"])
    alone = [
        head_effects(model, images()[n : n + 1], QUESTIONS[n : n + 1], [one])
        for n, one in enumerate(("one", "two"))
    ]
    assert torch.allclose(found.effects, (alone[0].effects + alone[1].effects) / 2, atol=1e-5)
    assert found.n == 2 and found.effects.shape == (3, 4) and found.means.shape == (3, 4, 8)
    true = model.processor.tokenizer("one", add_special_tokens=False)["input_ids"][0]
    prior = int(scores(model, [[], []], 0).argmax())
    written: list[Tensor] = []
    entered: list[Tensor] = []
    layers = model.family.layers(model.network)
    norm = model.family.language_model(model.network).norm
    handles = [
        layer.mlp.register_forward_hook(lambda _m, _a, output: written.append(output[0, -1]))
        for layer in layers
    ]
    handles.append(
        layers[0].register_forward_pre_hook(lambda _m, args: written.append(args[0][0, -1]))
    )
    handles.append(norm.register_forward_pre_hook(lambda _m, args: entered.append(args[0][0, -1])))
    logits = scores(model, images(), 0)
    for handle in handles:
        handle.remove()
    scale = (entered[0].square().mean() + norm.variance_epsilon).sqrt()
    towards = (model.head.weight[true] - model.head.weight[prior]) * norm.weight
    rest = sum(float(one @ towards / scale) for one in written)
    total = float(alone[0].effects.sum()) + rest
    assert total == pytest.approx(float(logits[true] - logits[prior]), abs=1e-4)


@torch.no_grad()
def test_a_direct_path_in_the_last_layer(model: MultimodalLM) -> None:
    """One head of one sample, patched by hand behind the feed-forward layer."""
    found = head_effects(model, images()[:1], QUESTIONS[:1], ["one"], kind="path")
    true = model.processor.tokenizer("one", add_special_tokens=False)["input_ids"][0]
    prior = int(scores(model, [[]], 0).argmax())
    for layer in (0, 2):
        projection = model.family.layers(model.network)[layer].self_attn.o_proj
        seen: list[Tensor] = []
        handle = projection.register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0][0, -1])
        )
        clean = scores(model, images(), 0)
        scores(model, [[]], 0)
        handle.remove()
        part = slice(8, 16)  # head 1
        change = projection.weight[:, part] @ (seen[1] - seen[0])[part]
        norm = model.family.language_model(model.network).norm

        def patch(_module: Any, args: tuple[Tensor, ...], change: Tensor = change) -> Any:
            return (args[0] + change,)

        handle = norm.register_forward_pre_hook(patch)
        patched = scores(model, images(), 0)
        handle.remove()
        wanted = (clean[true] - clean[prior]) - (patched[true] - patched[prior])
        assert found.effects[layer, 1] == pytest.approx(float(wanted), abs=1e-4)


@torch.no_grad()
def test_silenced_heads(any_kind: MultimodalLM) -> None:
    model = any_kind
    before = scores(model, images(), 1)
    everything = [Head(layer, head) for layer in range(3) for head in range(4)]
    own = [
        len(layer.self_attn.o_proj._forward_pre_hooks)
        for layer in model.family.layers(model.network)
    ]
    with pruned_heads(model, everything):
        # no attention: the last token knows of nothing but itself
        silent = scores(model, images(), 1)
        other = scores(model, [[], []], 1)
    assert torch.allclose(silent, other, atol=1e-5) and not torch.allclose(
        silent, before, atol=1e-3
    )
    with pruned_heads(model, []):
        assert torch.equal(scores(model, images(), 1), before)
    with pytest.raises(ZeroDivisionError), pruned_heads(model, everything):
        raise ZeroDivisionError
    assert torch.equal(scores(model, images(), 1), before)
    assert own == [
        len(layer.self_attn.o_proj._forward_pre_hooks)
        for layer in model.family.layers(model.network)
    ]


@torch.no_grad()
def test_means_take_the_place_of_outputs(model: MultimodalLM) -> None:
    alone = head_effects(model, images()[:1], QUESTIONS[:1], ["one"])
    last = [Head(2, head) for head in range(4)]
    with pruned_heads(model, last, "mean", alone.means):  # of the same sample: nothing changes
        same = scores(model, images(), 0)
        other = scores(model, images(), 1)
    assert torch.allclose(same, scores(model, images(), 0), atol=1e-5)
    assert not torch.allclose(other, scores(model, images(), 1), atol=1e-3)
    weight = model.family.layers(model.network)[2].self_attn.o_proj.weight
    with pruned_heads(model, [Head(2, 1)]):
        found = scores(model, images(), 0)
    kept = weight.clone()
    weight[:, 8:16] = 0
    wanted = scores(model, images(), 0)
    weight.copy_(kept)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_strongest_and_random_ones() -> None:
    effects = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    found = HeadEffects(effects, torch.zeros(2, 2, 1), 5, "direct")
    assert found.strongest(2, "picture") == [(1, 0), (0, 0)]
    assert found.strongest(1, "prior") == [(0, 1)]
    with pytest.raises(ConfigurationError, match="`number` is 5, but there are 4 heads"):
        found.strongest(5, "prior")
    like = [Head(3, 0), Head(1, 0), Head(1, 1)]
    drawn = [random_heads(like, 8, seed) for seed in range(9)]
    assert all([head.layer for head in one] == [1, 1, 3] and len(set(one)) == 3 for one in drawn)
    assert drawn[0] == random_heads(like, 8, 0) and len({tuple(one) for one in drawn}) > 4


def test_bad_input(model: MultimodalLM) -> None:
    prior = model.processor.tokenizer.decode([int(scores(model, [[], []], 0).argmax())])
    with pytest.raises(DataError, match="says the true answer without the picture"):
        head_effects(model, images()[:1], QUESTIONS[:1], [prior])
    with pytest.raises(ConfigurationError, match="`kind` is 'paths', did you mean 'path'"):
        head_effects(model, images(), QUESTIONS, ["one", "two"], kind="paths")  # type: ignore[arg-type]
    for heads, mode, message in (
        ([Head(3, 0)], "zero", "there is no head 0 in layer 3; the network has 3 layers of 4"),
        ([Head(0, 4)], "zero", "there is no head 4 in layer 0"),
        ([], "none", "`mode` is 'none'"),
        ([], "mean", "`means` is missing"),
    ):
        refused = pytest.raises(ConfigurationError, match=message)
        with refused, pruned_heads(model, heads, mode):  # type: ignore[arg-type]
            pass
