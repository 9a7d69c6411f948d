"""Entropies of the cross-attention against diffusers' own attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmforget.detection import attention_entropy
from mmforget.detection.attention_entropy import mean_attention
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPTS = ["a red car", "a church by van gogh"]


def tiny(kind: TinyKind) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=4, guidance=3.0)


def layers(model: DiffusionGenerator) -> list[tuple[str, Any]]:
    names = list(dict.fromkeys(site.block for site in model.sites("cross_attention")))
    return [(name, model.network.get_submodule(name)) for name in names]


@torch.no_grad()
def test_the_mean_attention_is_that_of_diffusers() -> None:
    for _, attention in layers(tiny("sd")):
        states = torch.randn(2, 9, attention.to_q.in_features)
        text = torch.randn(2, 5, attention.to_k.in_features)
        query = attention.head_to_batch_dim(attention.to_q(states))
        key = attention.head_to_batch_dim(attention.to_k(text))
        scores = attention.get_attention_scores(query, key)
        expected = scores.view(2, attention.heads, 9, 5).mean((1, 2))
        found = mean_attention(attention, states, text)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(1), torch.ones(2))


def attention_by_hand(model: DiffusionGenerator, prompt: str) -> list[dict[str, torch.Tensor]]:
    """Per step and layer (L,) attention of the pass with the prompt, made alone."""
    found: list[dict[str, torch.Tensor]] = []
    noise = model.noise([prompt], 1, derive(0, "detection"))
    embedding, empty = model.encode([prompt]), model.unconditional()
    scheduler, times = model.schedule(4, noise)
    latents = noise
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: found[-1].update(
                {name: mean_attention(module, args[0], kwargs["encoder_hidden_states"])[0]}
            ),
            with_kwargs=True,
        )
        for name, layer in layers(model)
    ]
    for time in times:
        found.append({})
        none = model.predict(latents, time, empty)
        one = model.predict(latents, time, embedding)  # the later pass overwrites the earlier one
        latents = scheduler.step(none + 3.0 * (one - none), time, latents, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_both_kinds_follow_their_formulas() -> None:
    model = tiny("sd")
    early = attention_entropy(model, PROMPTS, kind="E", n=1)
    late = attention_entropy(model, PROMPTS, kind="D", n=1)
    for prompt in PROMPTS:
        steps = attention_by_hand(model, prompt)
        # Only as many layers as this network has: the last one stands in for the fourth.
        names = list(steps[0])
        assert early.protocol["layer"] == names[min(3, len(names) - 1)]
        chosen = steps[0][early.protocol["layer"]].double()
        assert early.scores[prompt] == pytest.approx(
            float(-(chosen * chosen.log()).sum()), rel=1e-4
        )
        assert list(early.details[prompt]["layers"]) == names
        mean = torch.stack([torch.stack(list(one.values())).mean(0) for one in steps]).double()
        terms = -(mean * mean.log())
        end = 1 + len(prompt.split())
        entropy, tail = terms.sum(1), terms[:, end:].sum(1)
        expected = entropy[-1] + tail[-1] - tail[0]  # a fifth of four steps is one
        assert late.scores[prompt] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_entropies_lie_between_0_and_that_of_equal_shares(kind: TinyKind) -> None:
    model = tiny(kind)
    before = state_hash(model)
    found = attention_entropy(model, PROMPTS, n=2, batch_size=3)
    assert state_hash(model) == before
    assert not any(layer._forward_pre_hooks for _, layer in layers(model))
    for prompt in PROMPTS:
        values = found.details[prompt]["entropy"]
        assert len(values) == 4 and all(0 < v <= math.log(16) + 1e-6 for v in values)


def test_layers_can_be_chosen() -> None:
    model = tiny("sd")
    names = [name for name, _ in layers(model)]
    found = attention_entropy(model, PROMPTS, kind="E", n=1, layer=0)
    assert found.protocol["layer"] == names[0]
    assert found.queries == 2 * 2  # one step of two passes
    for layer in (-1, len(names)):
        with pytest.raises(ConfigurationError, match="`layer` is"):
            attention_entropy(model, PROMPTS, kind="E", layer=layer)
    with pytest.raises(ConfigurationError, match="averages over all layers"):
        attention_entropy(model, PROMPTS, kind="D", layer=0)
    with pytest.raises(ConfigurationError, match="`kind` is 'F'"):
        attention_entropy(model, PROMPTS, kind="F")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_joint_attention_is_refused(kind: TinyKind) -> None:
    with pytest.raises(CapabilityError, match="joint attention"):
        attention_entropy(tiny(kind), PROMPTS)


def test_late_entropy_finds_planted_memories(
    memorizing: DiffusionGenerator, memorized: list[str], harmless: list[str]
) -> None:
    report = attention_entropy(memorizing, memorized + harmless, n=1, sampling_steps=10)
    assert report.quality(memorized, harmless)["auc"] >= 0.85
