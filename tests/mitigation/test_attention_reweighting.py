"""Re-weighted cross-attention against attention that is written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError, ModelError
from mmforget.mitigation import AttentionReweighting, mitigated_pictures
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPTS = ["a red cat", "dog"]
ENDS = (4, 2)
"""Positions of their end tokens."""


def made(kind: TinyKind) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=2)


class Written:
    """Attention with its softmax written out; `factor` and `ends` hold for the last rows."""

    def __init__(self, factor: float, ends: tuple[int, ...]) -> None:
        self.factor, self.ends = factor, ends

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **further: Any
    ) -> Tensor:
        query, key, value = (
            layer(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for layer, source in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        first = len(logits) - len(self.ends)
        for row, end in enumerate(self.ends):
            logits[first + row, :, :, 0] *= self.factor
            logits[first + row, :, :, end + 1 :] = -math.inf
        found = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](found))


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
@pytest.mark.parametrize("factor", [1.25, 4.0])
def test_it_is_attention_with_another_logit_and_a_mask(kind: TinyKind, factor: float) -> None:
    model = made(kind)
    found = mitigated_pictures(model, AttentionReweighting(factor), PROMPTS, 1, seed=2)
    plain = model.generate(PROMPTS, 1, seed=2)
    blocks = {site.block for site in model.sites("cross_attention")}
    for block in blocks:
        model.network.get_submodule(block).set_processor(Written(factor, ENDS))
    assert torch.allclose(model.generate(PROMPTS, 1, seed=2), found, atol=1e-4)
    assert not torch.allclose(plain, found, atol=1e-3)


def test_a_factor_of_1_without_a_mask_changes_nothing() -> None:
    model = made("sd")
    none = AttentionReweighting(1.0, mask_padding=False)
    found = mitigated_pictures(model, none, PROMPTS, 1, seed=2)
    assert torch.allclose(found, model.generate(PROMPTS, 1, seed=2), atol=1e-6)


@pytest.mark.parametrize(
    "mitigation",
    [AttentionReweighting(5.0, mask_padding=False), AttentionReweighting(1.0)],
)
def test_only_the_conditioned_rows_are_touched(mitigation: AttentionReweighting) -> None:
    model = made("sd")
    both = PromptEmbedding.cat([model.encode(["", ""]), model.encode(PROMPTS)])
    noisy = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    time = torch.tensor(500)
    with torch.no_grad():
        plain = model.predict(noisy, time, both)
        with mitigation.reading(model, PROMPTS) as before:
            assert before is not None
            before(500.0, slice(2, 4))
            found = model.predict(noisy, time, both)
        after = model.predict(noisy, time, both)
    assert torch.allclose(found[:2], plain[:2], atol=1e-6)
    changed = (found[2:] - plain[2:]).flatten(1).norm(dim=1)
    assert bool((changed > 1e-3).all())
    assert torch.equal(after, plain)


def test_hooks_are_gone_even_after_an_error() -> None:
    model = made("sd")
    plain = model.generate(PROMPTS, 1)
    with pytest.raises(KeyError), AttentionReweighting(5.0).reading(model, PROMPTS):
        raise KeyError
    assert torch.equal(model.generate(PROMPTS, 1), plain)


@pytest.mark.parametrize("kind", ["sd3", "sd35", "flux"])
def test_joint_attention_is_refused(kind: TinyKind) -> None:
    with pytest.raises(CapabilityError, match="attend jointly"):
        mitigated_pictures(made(kind), AttentionReweighting(), PROMPTS)


def test_normalised_keys_are_refused() -> None:
    model = made("sd")
    block = model.sites("cross_attention")[0].block
    model.network.get_submodule(block).norm_k = torch.nn.LayerNorm(16)
    with pytest.raises(CapabilityError, match="normalises its keys"):
        mitigated_pictures(model, AttentionReweighting(), PROMPTS)


def test_fused_projections_are_refused() -> None:
    model = made("sd")
    model.network.fuse_qkv_projections()
    with pytest.raises(ModelError, match="fuse_qkv_projections"):
        mitigated_pictures(model, AttentionReweighting(), PROMPTS)


def test_a_factor_must_be_above_0() -> None:
    for factor in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigurationError, match="`factor`"):
            AttentionReweighting(factor)
