"""Latent mappers: shapes, strengths, and that they elicit what they are trained for."""

from __future__ import annotations

import pytest
import torch

from mmforget import ConceptSpec, load_clip, load_gan
from mmforget.data.digit_world import DIGITS
from mmforget.errors import ConfigurationError
from mmforget.models.base import Latents, state_hash
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.latent_mapper import LatentMapper, train_mapper


def test_strength_scales_the_step_of_each_latent() -> None:
    mapper = LatentMapper(4, scale=2.0)
    latents = Latents(torch.randn(3, 4))
    full = mapper(latents).codes - latents.codes
    half = mapper(latents, torch.tensor([0.0, 0.5, 1.0])).codes - latents.codes
    assert torch.allclose(half, full * torch.tensor([[0.0], [0.5], [1.0]]), atol=1e-6)
    assert torch.allclose(full, 2 * mapper.steps(latents.codes), atol=1e-6)


@pytest.mark.parametrize(("layers", "groups"), [(3, 1), (6, 2), (14, 3)])
def test_styles_are_moved_in_groups(layers: int, groups: int) -> None:
    mapper = LatentMapper(5, layers)
    codes = torch.randn(2, layers, 5)
    assert len(mapper.groups) == groups
    moved = mapper(Latents(codes, space="w+")).codes
    assert moved.shape == codes.shape
    with torch.no_grad():
        for parameter in mapper.groups[0].parameters():
            parameter.zero_()
    assert torch.equal(mapper.steps(codes)[:, : min(4, layers)], codes[:, :4] * 0)


def test_a_scale_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="scale"):
        LatentMapper(4, scale=0)


def test_a_trained_mapper_elicits_the_concept_and_leaves_the_generator_alone() -> None:
    model = load_gan("gan")
    others = [digit for digit in DIGITS if digit != "seven"]
    guide = ConceptGuide(load_clip("digit_world"), [ConceptSpec("seven")], {"seven": others})
    before = state_hash(model)
    mapper, direction, report = train_mapper(
        model, guide, steps=40, batch_size=32, tries=2, checked=128, lr=5e-3
    )
    assert report.elicited > 0.5 > 0.3 > report.native
    assert float(direction.norm()) == pytest.approx(1)
    assert report.agreement > 0
    assert not any(parameter.requires_grad for parameter in mapper.parameters())
    assert state_hash(model) == before
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    assert all(parameter.grad is None for parameter in model.network.parameters())
    with pytest.raises(ConfigurationError, match="steps"):
        train_mapper(model, guide, steps=0)


def test_all_trainings_count_and_not_only_those_up_to_the_best() -> None:
    guide = ConceptGuide(load_clip("digit_world"), [ConceptSpec("seven")], {"seven": ["zero"]})
    # Steps that move nothing: no later mapper is better than the first.
    mapper, _, report = train_mapper(
        load_gan("gan"), guide, steps=1, batch_size=1, scale=1e-9, tries=3, checked=8, enough=1.1
    )
    assert mapper.scale == report.scale == 1e-9
    assert report.tries == 3
