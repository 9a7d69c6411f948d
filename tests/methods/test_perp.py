"""PERP: what is pruned stays zero, what learns is little, and pictures heal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.errors import CapabilityError, ConfigurationError, WeightsError
from mmforget.methods.perp import PERP
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import generator
from mmforget.testing.concept_conformance import ConceptMethodChecks, tiny_generator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

ORDINARY = ("a red cat", "a blue dog", "a house", "the street", "a horse", "a red car")
FAST = {"lr": 1e-3, "retain_batch_size": 3}
PARTS = ("biases_and_norms", "biases", "norms", "lora")


def memories() -> MemorizedSet:
    images = torch.rand(len(ORDINARY), 3, 16, 16, generator=generator(0, "test-pictures"))
    return MemorizedSet((MemorizedPrompt("a van gogh house"),), retain=Captioned(ORDINARY, images))


def mask_of(model: DiffusionGenerator, share: float = 0.3) -> WeightMask:
    masks = {
        f"{site.name}.weight": torch.rand(
            site.module.weight.shape, generator=generator(0, "test-mask", site.name)
        )
        < share
        for site in model.sites("ffn")
    }
    # Biases can be chosen too, with whole rows.
    name = next(site.name for site in model.sites("ffn") if site.module.bias is not None)
    masks[f"{name}.bias"] = masks[f"{name}.weight"][:, 0]
    return WeightMask.described(model, masks, state_hash(model.network))


def fitted(method, steps=3, **settings):
    quiet_trainer(max_steps=steps, **settings).fit(method)
    return method


CHECKS = ConceptMethodChecks(
    lambda model, _: PERP(model, memories(), mask_of(model), retrain="lora", **FAST), steps=6
)


@pytest.mark.parametrize("name", ["given_model", "resume", "saving"])
def test_conformance(name):
    CHECKS.run(name)


@pytest.mark.slow
def test_processes():
    CHECKS.run("processes")


@pytest.mark.parametrize("part", PARTS)
def test_what_is_pruned_stays_zero_and_the_rest_of_the_part_learns(part):
    model = tiny_generator()
    mask = mask_of(model)
    method = fitted(PERP(model, memories(), mask, retrain=part, weight_decay=0.1, **FAST))
    result = method.finalize()
    before, after = dict(model.network.named_parameters()), dict(result.network.named_parameters())
    moved = set()
    for name, value in after.items():
        chosen = mask.masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert not value[chosen].any()
        if not torch.equal(value[~chosen], before[name][~chosen]):
            moved.add(name)
    linear = {
        f"{name}.weight"
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear)
    }
    biases = {name for name in before if name.endswith(".bias")}
    norms = {n for n, p in before.items() if n.endswith(".weight") and p.ndim == 1}
    allowed = {"biases_and_norms": biases | norms, "biases": biases, "norms": norms}
    expected = allowed.get(part, linear)
    assert moved <= expected
    assert len(moved) > 0.8 * len(expected)
    assert list(result.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("part", ["biases_and_norms", "lora"])
def test_the_edit_leads_from_the_original_to_the_result(part):
    model = tiny_generator()
    method = fitted(PERP(model, memories(), mask_of(model), retrain=part, **FAST))
    result = method.finalize()
    method.weight_edit().apply(model)
    assert state_hash(model) == state_hash(result)


def test_factors_say_during_training_what_they_are_merged_to():
    model = tiny_generator()
    method = fitted(PERP(model, memories(), mask_of(model), retrain="lora", **FAST))
    noisy = torch.randn(2, *model.latent_shape, generator=generator(0, "test-noisy"))
    time, embedding = torch.tensor([500, 100]), model.encode(["a cat", "a dog"])
    with torch.no_grad():
        beside = method.model.predict(noisy, time, embedding)
        merged = method.finalize().predict(noisy, time, embedding)
    torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks for m in method.model.network.modules())


def test_training_heals():
    """The pruned model is further from the truth than the one that was trained on."""
    model = tiny_generator()
    method = PERP(model, memories(), mask_of(model, 0.9), retrain="lora", lr=1e-2, check_every=10)
    before, after = fitted(method, steps=40).statistics()["held_out_error"]
    assert after < 0.98 * before


def test_a_model_that_is_pruned_already_is_taken_too():
    model = tiny_generator()
    mask = mask_of(model)
    fresh = fitted(PERP(model, memories(), mask, **FAST)).finalize()
    pruned = tiny_generator()
    mask.apply(pruned)
    again = fitted(PERP(pruned, memories(), mask, **FAST)).finalize()
    assert state_hash(fresh) == state_hash(again)


def test_another_model_and_bad_settings_are_refused():
    model = tiny_generator()
    other = DiffusionGenerator(tiny_pipeline("sd", seed=1), steps=2)
    with pytest.raises(WeightsError, match="another network"):
        PERP(other, memories(), mask_of(model), **FAST)
    with pytest.raises(ConfigurationError, match="did you mean 'norms'"):
        PERP(model, memories(), mask_of(model), retrain="norm", **FAST)
    with pytest.raises(ConfigurationError, match="`lora_rank` is 0"):
        PERP(model, memories(), mask_of(model), lora_rank=0, **FAST)


def test_a_network_without_such_parameters_is_refused():
    model = tiny_generator()
    mask = mask_of(model)
    mask.masks = {n: m for n, m in mask.masks.items() if n.endswith(".weight")}
    for module in model.network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            module.bias = None
    with pytest.raises(CapabilityError, match="no biases"):
        PERP(
            model,
            memories(),
            WeightMask.described(model, mask.masks, state_hash(model.network)),
            retrain="biases",
            **FAST,
        )
