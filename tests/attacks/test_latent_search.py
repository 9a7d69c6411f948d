"""Latent search on a generator whose best latents are known."""

from __future__ import annotations

import pytest
import torch

from mmforget.attacks.generator_report import Region, drawn, guide_sees, judge_logits
from mmforget.attacks.latent_search import latent_search, search
from mmforget.concept import ConceptSpec
from mmforget.data.digit_world import DIGITS
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.metrics.judge import load_judge
from mmforget.models.base import state_hash
from mmforget.models.clip import load_clip
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN
from mmforget.models.gan_files import load_gan
from mmforget.testing.painter import Painter, Palette, StyledPainter, is_red, painter, red_logits


def test_the_search_ends_at_the_best_latent_of_the_shell():
    model = painter()
    start = drawn(model, 5, 0, "-test", "z")
    found = search(model, red_logits, start, steps=200, lr=0.1)
    lengths = start.codes.norm(dim=1)
    assert torch.allclose(found.codes.norm(dim=1), lengths, atol=1e-5)
    # red alone counts, so the best latent has all of its length there
    assert torch.allclose(found.codes[:, 0], lengths, atol=0.01)


def test_it_finds_what_is_there_and_not_what_is_gone():
    for red, expected in ((1.0, 0.8), (0.0, 0.0)):
        report = latent_search(painter(red), red_logits, is_red, n=40, steps=40)
        assert report.n == 40
        assert report.rate >= expected if red else report.rate == 0
        assert report.rate > report.native or not red
    assert report.pictures.shape == (16, 3, 8, 8)


def test_a_second_judge_has_to_agree():
    def nobody(images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), dtype=torch.bool)

    report = latent_search(painter(), red_logits, nobody, n=10, steps=20)
    assert report.rate == 0
    assert report.details["see"] > 0.5
    assert report.details["confirm"] == 0


def test_the_model_stays_as_it_was_and_the_result_depends_on_the_seed_alone():
    model = painter().train()
    before = state_hash(model)
    reports = [latent_search(model, red_logits, is_red, n=8, steps=5, seed=s) for s in (3, 3, 4)]
    assert state_hash(model) == before
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(reports[0].pictures, reports[1].pictures)
    assert not torch.equal(reports[0].pictures, reports[2].pictures)
    assert reports[0].to_dict() | {"seconds": 0} == reports[1].to_dict() | {"seconds": 0}


def test_every_prior_and_space_has_its_region():
    uniform = painter(prior="uniform")
    start = drawn(uniform, 3, 0, "-test", "z")
    assert Region(uniform, start).project(start.codes * 9).abs().max() == 1
    truncated = painter(prior="truncated_normal", truncation=1.5)
    start = drawn(truncated, 3, 0, "-test", "z")
    assert Region(truncated, start).project(start.codes * 99).abs().max() == 1.5
    styled = ImageGAN(StyledPainter()).eval()
    start = drawn(styled, 3, 0, "-test", "w+")
    moved = Region(styled, start).project(start.codes * 2 + 1)
    assert moved.shape == (3, 3, 4)
    assert torch.allclose((moved - 1).norm(dim=-1), (start.codes - 1).norm(dim=-1), atol=1e-5)
    report = latent_search(styled, red_logits, is_red, n=10, steps=30, space="w+")
    assert report.settings["space"] == "w+"
    assert report.rate > report.native


def test_classes_stay_while_latents_move():
    model = ImageGAN(Palette()).eval()
    report = latent_search(model, red_logits, is_red, n=30, steps=10)
    labels = model.draw(30, 0, purpose="-latent-search").labels
    assert report.rate == pytest.approx(float((labels == 0).double().mean()))


@pytest.mark.parametrize("wrong", [{"n": 0}, {"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=f"`{next(iter(wrong))}`"):
        latent_search(painter(), red_logits, is_red, **wrong)


def test_a_model_without_latents_and_a_judge_of_another_shape_are_refused():
    with pytest.raises(CapabilityError, match="latent_search needs HasLatents"):
        latent_search(torch.nn.Linear(2, 2), red_logits, is_red)
    with pytest.raises(CapabilityError, match="w"):
        latent_search(painter(), red_logits, is_red, space="w")
    with pytest.raises(ConfigurationError, match="one value per image"):
        latent_search(painter(), red_logits, lambda images: images.mean(dim=1) > 0, n=2, steps=1)


def test_the_painter_paints():
    images = ImageGAN(Painter()).synthesise(painter().draw(2, 0))
    assert images.shape == (2, 3, 8, 8)


def test_the_shipped_generator_yields_a_seven_to_judge_and_guide():
    digits = [digit for digit in DIGITS if digit != "seven"]
    guide = ConceptGuide(load_clip("digit_world"), [ConceptSpec("seven")], {"seven": digits})
    see = judge_logits(load_judge(), "digit", "seven")
    report = latent_search(load_gan("gan"), see, guide_sees(guide), n=8, steps=25)
    assert report.rate >= 0.5 > report.native
    assert report.rate == pytest.approx(report.hits / 8)
    assert report.rate <= min(report.details["see"], report.details["confirm"])
