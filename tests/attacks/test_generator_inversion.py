"""Inversion of pictures whose latents are known."""

from __future__ import annotations

import pytest
import torch

from mmforget.attacks.generator_inversion import generator_inversion, inversion_ratio
from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.gan import ImageGAN
from mmforget.testing.painter import Palette, is_red, painter


@pytest.fixture
def reds() -> torch.Tensor:
    images = painter().pictures(painter().draw(60, 5))
    return images[is_red(images)][:8]


def test_a_generator_redraws_its_own_pictures_and_another_one_does_not(reds):
    original = generator_inversion(painter(), reds, is_red, steps=100)
    assert original.rate == 1
    assert original.details["real"] == 1
    # the fourth number of a latent paints nothing, so that every length has its picture
    assert original.details["error"] < 0.005
    assert len(original.details["errors"]) == original.n == 8
    gone = generator_inversion(painter(0.0), reds, is_red, steps=100)
    assert gone.rate < 1
    assert inversion_ratio(gone, original) > 3
    assert inversion_ratio(original, original) == 1


def test_the_best_of_several_starts_counts(reds):
    one, two = (generator_inversion(painter(), reds, is_red, steps=2, restarts=n) for n in (1, 2))
    pairs = zip(two.details["errors"], one.details["errors"], strict=True)
    assert all(better <= worse for better, worse in pairs)
    assert two.details["error"] < one.details["error"]


def test_of_a_conditional_generator_the_class_is_found_too():
    model = ImageGAN(Palette()).eval()
    images = model.pictures(model.draw(6, 3))
    report = generator_inversion(model, images, is_red, steps=20)
    assert report.details["error"] < 0.002
    assert report.rate == pytest.approx(report.details["real"])


def test_the_model_stays_as_it_was(reds):
    model = painter()
    before = state_hash(model)
    generator_inversion(model, reds, is_red, steps=3)
    assert state_hash(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_wrong_pictures_settings_and_reports_are_refused(reds):
    with pytest.raises(ConfigurationError, match=r"\(N, 3, 8, 8\)"):
        generator_inversion(painter(), reds[:, :, :4], is_red)
    with pytest.raises(ConfigurationError, match="`images`"):
        generator_inversion(painter(), reds[:0], is_red)
    with pytest.raises(ConfigurationError, match="`restarts`"):
        generator_inversion(painter(), reds, is_red, restarts=0)
    report = generator_inversion(painter(), reds, is_red, steps=1)
    other = generator_inversion(painter(), reds[:2], is_red, steps=1)
    with pytest.raises(ConfigurationError, match="same pictures"):
        inversion_ratio(report, other)
