"""SalUn for diffusion: the mask, pseudo prompts and given pictures."""

from __future__ import annotations

import logging

import pytest
import torch

from mmforget.concept import ConceptSpec
from mmforget.data.denoising import made_pictures, noised_records
from mmforget.errors import ConfigurationError, DataError
from mmforget.methods.concept_salun import ConceptSalUn
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.conformance import quiet_trainer
from mmforget.testing.tiny_pipelines import tiny_pipeline

SPEC = ConceptSpec("van gogh", preserve=("monet", "a cat"), templates=("{}", "{} art", "a {}"))
FAST = {"steps": 3, "pictures": 3, "times": 2, "lr": 1e-3, "weights": "x"}


def generator_of() -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline("sd"), steps=3)


def fitted(method: ConceptSalUn, steps: int = 3) -> ConceptSalUn:
    quiet_trainer(max_steps=steps).fit(method)
    return method


def change(method: ConceptSalUn, model: DiffusionGenerator) -> torch.Tensor:
    """Changes of the trained weights, in the order of the mask."""
    before = dict(model.named_parameters())
    trained = [(n, p) for n, p in method.model.named_parameters() if p.requires_grad]
    return torch.cat([(p.detach() - before[name]).reshape(-1) for name, p in trained])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weights_outside_of_the_mask_keep_their_bits(optimizer):
    model = generator_of()
    method = fitted(ConceptSalUn(model, SPEC, weight_decay=0.1, optimizer=optimizer, **FAST))
    moved = change(method, model)
    assert not moved[~method.mask].any()
    assert (moved[method.mask] != 0).double().mean() > 0.9


def test_masked_gradients_alone_let_weight_decay_through():
    model = generator_of()
    method = fitted(
        ConceptSalUn(model, SPEC, weight_decay=0.1, optimizer="adamw", freeze="grad_only", **FAST)
    )
    assert change(method, model)[~method.mask].any()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_share_of_trained_weights(fraction):
    method = fitted(ConceptSalUn(generator_of(), SPEC, mask_fraction=fraction, **FAST))
    size = len(method.mask)
    assert int(method.mask.sum()) == pytest.approx(fraction * size, abs=1)
    assert method.statistics()["mask_fraction"] == pytest.approx(fraction, abs=1 / size)


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_the_mask_is_that_of_the_summed_gradient_at_the_frozen_weights(w):
    model = generator_of()
    method = fitted(ConceptSalUn(model, SPEC, mask_guidance=w, batch_size=2, **FAST))
    made = made_pictures(model, ["van gogh", "van gogh art", "a van gogh"], 1, 3, 3.0, 0)
    records = noised_records(model, made, 2, 0)
    trained = [
        model.get_parameter(name) for name, p in method.model.named_parameters() if p.requires_grad
    ]
    for parameter in trained:
        parameter.grad = None
        parameter.requires_grad_(True)
    table = model.encode(list(records.prompts))[records.prompt]
    found = model.predict(records.noisy, records.time, table)
    empty = model.unconditional()[records.prompt * 0]
    found = (1 + w) * found - w * model.predict(records.noisy, records.time, empty)
    (found - records.target).square().mean((1, 2, 3)).sum().backward()
    total = torch.cat([parameter.grad.reshape(-1) for parameter in trained]).abs()
    expected = total > total.median()
    assert (method.mask == expected).double().mean() > 0.999


def test_the_mask_is_part_of_the_state():
    method = fitted(ConceptSalUn(generator_of(), SPEC, **FAST))
    assert torch.equal(method.state_dict()["mask"], method.mask)


@torch.no_grad()
def answers(model, method, prompts):
    records = method.forget_records()
    found = model.predict(records.noisy, records.time, model.encode(prompts)[records.prompt])
    torch.testing.assert_close(records.target, found, rtol=1e-3, atol=1e-4)
    return records


def test_pseudo_prompts_are_the_preserved_ones_in_turn():
    model = generator_of()
    records = answers(model, ConceptSalUn(model, SPEC, **FAST), ["monet", "a cat art", "a monet"])
    assert records.prompts == ("van gogh", "van gogh art", "a van gogh")


def test_pseudo_prompts_can_be_given_and_fall_back_on_the_anchor(caplog):
    model = generator_of()
    answers(model, ConceptSalUn(model, SPEC, pseudo="dog", **FAST), ["dog", "dog art", "a dog"])
    alone = ConceptSpec("van gogh", anchor="car", templates=SPEC.templates)
    with caplog.at_level(logging.WARNING):
        method = ConceptSalUn(model, alone, **FAST)
    assert "nothing else is held" in caplog.text
    answers(model, method, ["car", "car art", "a car"])
    assert method.retain_records() is None


def test_retained_pictures_are_learned_with_the_truth():
    method = ConceptSalUn(generator_of(), SPEC, **FAST)
    records = method.retain_records()
    assert records.target.std() == pytest.approx(1.0, abs=0.15)
    assert {text.replace("a ", "").split()[0] for text in records.prompts} == {"monet", "cat"}


def test_given_pictures_take_the_place_of_made_ones():
    model = generator_of()
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    method = ConceptSalUn(model, SPEC, images=images, **FAST)
    records = method.forget_records()
    assert len(records) == 5 * 2
    torch.testing.assert_close(method._made[0].latents, model.to_latents(images))
    assert not fitted(method).no_op


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mask_fraction": 0.0}, ConfigurationError, "`mask_fraction` is 0.0"),
        ({"freeze": "strickt"}, ConfigurationError, "did you mean 'strict'"),
        ({"mask_guidance": -1.0}, ConfigurationError, "`mask_guidance` is -1.0"),
        ({"pictures": 0}, ConfigurationError, "`pictures` is 0"),
        ({"images": torch.rand(3, 16, 16)}, DataError, "need \\(N, 3, H, W\\)"),
        ({"images": {"monet": torch.rand(1, 3, 16, 16)}}, DataError, "no target"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        ConceptSalUn(generator_of(), SPEC, **(FAST | settings))


def test_one_tensor_for_two_concepts_is_refused():
    with pytest.raises(DataError, match="one per target"):
        ConceptSalUn(
            generator_of(), [SPEC, ConceptSpec("dog")], images=torch.rand(1, 3, 16, 16), **FAST
        )
