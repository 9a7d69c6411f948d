"""Degree of unlearning: its exact cases, and where it is undefined."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmforget.errors import DataError
from mmforget.metrics.unlearning_degree import (
    degree_of_edits,
    degree_of_natives,
    scores,
    unlearning_degree,
)
from mmforget.models.base import state_hash
from mmforget.models.gan import ImageGAN


class Grey(nn.Module):
    """Paints the grey tone of its single number, times a gain."""

    latent_size = 1

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.tanh(latents * self.gain)[:, :, None, None].expand(-1, 3, 4, 4)


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3))


def column(n: int, low: float, high: float, seed: int) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(seed))


BEARING, FREE = column(200, 0.7, 1.0, 0), column(200, 0.0, 0.2, 1)


def test_an_unchanged_generator_has_degree_zero():
    assert unlearning_degree(BEARING, FREE, BEARING).value == 0
    again = column(4000, 0.7, 1.0, 7)
    assert unlearning_degree(column(4000, 0.7, 1.0, 0), FREE, again).value == pytest.approx(
        0, abs=0.02
    )


def test_scores_like_without_the_concept_have_degree_one():
    found = unlearning_degree(BEARING, FREE, FREE)
    assert found.value == 1
    assert found.moved == found.possible == pytest.approx(0.75, abs=0.02)
    assert (found.before, found.without) == (
        pytest.approx(float(BEARING.mean())), pytest.approx(float(FREE.mean())),
    )  # fmt: skip


def test_half_of_the_way_over_removal_and_increase():
    a, b = torch.tensor([0.8, 0.6]), torch.tensor([0.4, 0.2])
    assert unlearning_degree(a, b, torch.tensor([0.6, 0.4])).value == pytest.approx(0.5)
    assert unlearning_degree(a, b, torch.tensor([0.1, 0.1])).value == pytest.approx(1.5)
    assert unlearning_degree(a, b, torch.tensor([1.0, 0.8])).value == pytest.approx(-0.5)


def test_the_distance_is_the_mean_difference_of_sorted_scores():
    a, b, c = (torch.rand(50, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    found = unlearning_degree(a + 0.0, b * 0.2, c)
    assert found.moved == pytest.approx(float((a.sort().values - c.sort().values).abs().mean()))
    plain = (a.sort().values - (b * 0.2).sort().values).abs().mean()
    assert found.possible == pytest.approx(float(plain))


def test_an_edit_without_effect_leaves_it_undefined():
    found = unlearning_degree(FREE, FREE, BEARING)
    assert found.value is None
    assert "the edit did not work" in found.reason
    assert found.moved > 0.5
    assert unlearning_degree(FREE, FREE + 0.06, BEARING).value is not None
    assert unlearning_degree(FREE, FREE + 0.06, BEARING, smallest=0.1).value is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(0), "shape"),
        (torch.zeros(2, 2), "shape"),
        (torch.tensor([1.5]), "probabilities"),
        (torch.tensor([float("nan")]), "probabilities"),
    ],
)
def test_scores_that_are_none_are_refused(wrong, message):
    with pytest.raises(DataError, match=f"`after`.*{message}"):
        unlearning_degree(BEARING, FREE, wrong)


def test_degree_of_edits_compares_both_generators_at_the_edited_latents():
    original, broken = ImageGAN(Grey()).eval(), ImageGAN(Grey(0.0)).eval()
    latents = original.draw(64, 0)

    def edit(given):
        return given.moved(given.codes.abs() + 1)

    before = state_hash(original)
    assert degree_of_edits(original, original, edit, brightness, latents).value == 0
    found = degree_of_edits(original, broken, edit, brightness, latents)
    assert found.after == pytest.approx(0.5)
    assert 0 < found.value < 1.2
    unmoved = degree_of_edits(original, broken, lambda given: given, brightness, latents)
    assert unmoved.value is None
    assert state_hash(original) == before


def test_degree_of_natives_splits_what_the_original_draws():
    original = ImageGAN(Grey()).eval()
    latents = original.draw(200, 0)
    bearing = scores(original, latents, brightness) > 0.6
    assert degree_of_natives(original, original, brightness, latents, bearing).value == 0
    turned = ImageGAN(Grey(-1.0)).eval()
    assert degree_of_natives(original, turned, brightness, latents, bearing).value > 0.8
    for wrong in (torch.zeros(200).bool(), torch.ones(200).bool()):
        with pytest.raises(DataError, match="of 200 latents"):
            degree_of_natives(original, turned, brightness, latents, wrong)
