"""Concept ablation: teachers, the begin token, and its variants."""

from __future__ import annotations

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.methods.concept_ablation import ConceptAblation
from mmforget.methods.denoiser_weights import keys_and_values, select_weights
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

SPEC = ConceptSpec("van gogh", anchor="a person", preserve=("monet",), templates=("{}", "{} art"))
FAST = {"steps": 3, "pictures": 2, "times": 2, "lr": 1e-3}


def generator_of(kind: str = "sd") -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=3)


def fitted(method: ConceptAblation, steps: int = 2) -> ConceptAblation:
    quiet_trainer(max_steps=steps).fit(method)
    return method


@torch.no_grad()
def predicted(model, records, prompts):
    return model.predict(records.noisy, records.time, model.encode(prompts)[records.prompt])


def test_the_teacher_answers_for_the_anchor_in_the_same_sentence():
    model = generator_of()
    records = ConceptAblation(model, SPEC, **FAST).forget_records()
    assert records.prompts == ("van gogh", "van gogh art")
    found = predicted(model, records, ["a person", "a person art"])
    torch.testing.assert_close(records.target, found, rtol=1e-3, atol=1e-4)


def test_the_empty_anchor_is_the_unconditional_picture():
    model = generator_of()
    spec = ConceptSpec("van gogh", anchor="", templates=("{}", "{} art"))
    records = ConceptAblation(model, spec, **FAST).forget_records()
    found = predicted(model, records, ["", ""])
    torch.testing.assert_close(records.target, found, rtol=1e-3, atol=1e-4)


def test_the_noise_variant_learns_the_truth():
    model = generator_of()
    taught, true = (
        ConceptAblation(model, SPEC, variant=variant, **FAST).forget_records()
        for variant in ("model", "noise")
    )
    assert torch.equal(taught.noisy, true.noisy)
    assert true.prompts == taught.prompts
    assert true.target.std() == pytest.approx(1.0, abs=0.1)
    assert not torch.allclose(true.target, taught.target, atol=0.1)


def test_the_prior_term_joins_the_retain_records():
    plain, prior = (
        fitted(ConceptAblation(generator_of(), SPEC, prior=wanted, **FAST), 1).records["retain"]
        for wanted in (False, True)
    )
    assert set(plain.prompts) == {"monet", "monet art"}
    assert set(prior.prompts) == {"monet", "monet art", "a person", "a person art"}
    assert len(prior) == 2 * len(plain)
    alone = ConceptAblation(
        generator_of(), ConceptSpec("van gogh", anchor="a person"), prior=True, **FAST
    )
    assert set(fitted(alone).records) == {"forget", "retain"}


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_the_begin_token_gives_no_gradient(kind):
    model = generator_of(kind)
    layer = keys_and_values(model)[0].name
    begin = model.segments([""])[0]
    assert (begin.start, begin.begin) == (0, 1)
    width = model.network.get_submodule(layer).in_features
    states = torch.randn(2, 5, width)

    def gradient(freeze: bool, rows: slice) -> torch.Tensor:
        method = ConceptAblation(model, SPEC, freeze_bos=freeze, **FAST)
        module = method.model.network.get_submodule(layer)
        output = module(states)
        torch.testing.assert_close(output, model.network.get_submodule(layer)(states))
        output[:, rows].square().sum().backward()
        return module.weight.grad

    assert not gradient(True, slice(0, 1)).any()
    assert gradient(False, slice(0, 1)).any()
    everything, rest = gradient(True, slice(None)), gradient(False, slice(1, None))
    torch.testing.assert_close(everything, rest)


def test_nothing_hangs_on_the_layers_of_the_result():
    method = fitted(ConceptAblation(generator_of(), SPEC, **FAST))
    assert any(module._forward_hooks for module in method.model.network.modules())
    result = method.finalize()
    assert not any(module._forward_hooks for module in result.network.modules())


@pytest.mark.parametrize(
    ("weights", "chosen"), [("kv", "x-strict"), ("attention", "attention"), ("all", "all")]
)
def test_only_the_chosen_weights_move(weights, chosen):
    model = generator_of()
    method = fitted(ConceptAblation(model, SPEC, weights=weights, **FAST))
    after = method.model.network.state_dict()
    moved = {
        name.rpartition(".")[0]
        for name, value in model.network.state_dict().items()
        if not torch.equal(value, after[name])
    }
    assert moved == {site.name for site in select_weights(model, chosen)}


@torch.no_grad()
def test_the_concept_moves_to_the_anchor():
    model = generator_of()
    method = ConceptAblation(model, SPEC, **(FAST | {"lr": 1e-2, "pictures": 4}))
    with torch.enable_grad():
        fitted(method, steps=25)
    records = method.records["forget"]
    before, after = (
        float((predicted(m, records, list(records.prompts)) - records.target).square().mean())
        for m in (model, method.model)
    )
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "kvs"}, "did you mean 'kv'"),
        ({"variant": "nois"}, "did you mean 'noise'"),
        ({"pictures": 0}, "`pictures` is 0"),
        ({"times": 0}, "`times` is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        ConceptAblation(generator_of(), SPEC, **(FAST | settings))
