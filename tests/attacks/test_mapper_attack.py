"""The mapper attack on generators by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmforget.attacks.generator_report import guide_logits
from mmforget.attacks.mapper_attack import mapper_attack
from mmforget.audit.generator_attacks import ATTACKS, Case
from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.latent_mapper import train_mapper
from mmforget.testing.painter import ColourGuide, is_red, painter


def test_a_fresh_mapper_finds_what_is_hidden_and_not_what_is_gone():
    found = {
        red: mapper_attack(painter(red), ColourGuide(), is_red, n=64, steps=80, tries=1)
        for red in (1.0, 0.4, 0.0)
    }
    assert found[1.0].rate > 0.8 > found[1.0].native
    assert found[0.4].rate > 0.8 > found[0.4].native
    assert found[0.0].rate == 0
    assert found[1.0].name == "mapper_free"
    assert found[1.0].rate == found[1.0].details["free"]


def test_edits_on_the_shell_are_judged_apart():
    model = painter()
    free, kept = (
        mapper_attack(model, ColourGuide(), is_red, n=64, steps=30, tries=1, on_shell=on_shell)
        for on_shell in (False, True)
    )
    assert kept.name == "mapper_on_shell"
    assert kept.rate == kept.details["on_shell"]
    assert free.details == kept.details
    # free edits may leave the range of colours that latents have
    assert free.pictures[:, 0].max() > kept.pictures[:, 0].max()


def test_an_audit_trains_one_mapper_for_both_of_its_rows(monkeypatch):
    trained = []

    def counted(model, *args, **settings):
        trained.append(model)
        return train_mapper(model, *args, **settings | {"steps": 5, "tries": 1})

    monkeypatch.setattr("mmforget.attacks.mapper_attack.train_mapper", counted)
    scene = SimpleNamespace(settings=SimpleNamespace(attack_trials=8, seed=0))
    guide = ColourGuide()
    case = Case("red", guide, is_red, guide_logits(guide), is_red, None, 0.5)
    models = [painter(), painter(0.4)]
    for model in models:
        free, kept = (ATTACKS[name](scene, model, case) for name in ("mapper", "mapper_on_shell"))
        assert (free.name, kept.name) == ("mapper_free", "mapper_on_shell")
        assert (free.rate, kept.rate) == (free.details["free"], kept.details["on_shell"])
        assert free.details == kept.details
    assert trained == models


def test_the_judge_has_to_agree_with_the_guide():
    def nobody(images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), dtype=torch.bool)

    report = mapper_attack(painter(), ColourGuide(), nobody, n=16, steps=10, tries=1)
    assert report.rate == 0
    assert report.details["mapper"]["elicited"] > 0


def test_the_model_stays_as_it_was():
    model = painter()
    before = state_hash(model)
    first, again = (
        mapper_attack(model, ColourGuide(), is_red, n=8, steps=3, tries=1) for _ in range(2)
    )
    assert state_hash(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(first.pictures, again.pictures)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"steps": -1}, {"tries": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=f"`{next(iter(wrong))}`"):
        mapper_attack(painter(), ColourGuide(), is_red, **wrong)
