"""Relearning by implicit maximum likelihood on generators by hand."""

from __future__ import annotations

import pytest
import torch

from mmforget.attacks.generator_relearning import generator_relearning, steps_until
from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.gan import ImageGAN
from mmforget.testing.painter import is_red, painter


@pytest.fixture
def gone() -> ImageGAN:
    """Red is dark whatever the latent."""
    model = painter(0.0)
    with torch.no_grad():
        model.network.shift[0] = -2
    return model


@pytest.fixture
def reds() -> torch.Tensor:
    images = painter().pictures(painter().draw(90, 5))
    return images[is_red(images)][:12]


def test_the_concept_comes_back_step_by_step(gone, reds):
    report = generator_relearning(gone, reds, is_red, 0.33, steps=80, lr=0.1, every=10, n=200)
    rates = [rate for _, rate in report.details["curve"]]
    assert [step for step, _ in report.details["curve"]] == [0, *range(10, 81, 10)]
    assert report.native == rates[0]
    assert report.rate == rates[-1]
    assert rates[0] == 0
    assert report.rate >= 0.165
    assert 0 < report.details["steps_to_half"] <= 80


def test_a_rate_that_is_only_passed_does_not_count():
    curve = [(0, 0.3), (5, 0.1), (10, 0.4), (15, 0.1), (20, 0.2), (25, 0.5)]
    assert steps_until(curve, 0.2) == 20
    assert steps_until(curve, 0.1) == 0
    assert steps_until(curve, 0.6) is None
    assert steps_until(curve[:4], 0.2) is None


def test_without_a_rate_there_is_no_number_of_steps(gone, reds):
    green = reds[:, [1, 0, 2]]
    never = generator_relearning(gone, green, is_red, 0.33, steps=6, every=5, n=50)
    assert never.rate == 0
    assert never.details["steps_to_half"] is None
    assert [step for step, _ in never.details["curve"]] == [0, 5, 6]


def test_the_model_stays_as_it_was_and_the_seed_decides(reds):
    model = painter()
    before = state_hash(model)
    first, again = (
        generator_relearning(model, reds, is_red, 0.3, steps=4, every=2, n=30) for _ in range(2)
    )
    assert state_hash(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert first.details == again.details


def test_wrong_settings_are_refused(reds):
    for rate in (0, 1.5):
        with pytest.raises(ConfigurationError, match="`original_rate`"):
            generator_relearning(painter(), reds, is_red, rate)
    with pytest.raises(ConfigurationError, match="`every`"):
        generator_relearning(painter(), reds, is_red, 0.3, every=0)
    with pytest.raises(ConfigurationError, match="`images`"):
        generator_relearning(painter(), reds[0], is_red, 0.3)
