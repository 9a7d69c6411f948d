"""The losses on answers, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mmforget.methods.answer_losses import (
    ascent,
    divergence,
    dpo_loss,
    npo_loss,
    sim_npo_loss,
    state_distance,
)
from mmforget.models.multimodal import AnswerLogits, AnswerLosses


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def one_answer(probabilities: list[list[float]], labels: list[int]) -> AnswerLogits:
    """A single answer over a vocabulary of two tokens."""
    return AnswerLogits(
        logits_of(probabilities)[None], torch.tensor([labels]), torch.zeros(1, len(labels), 3)
    )


def test_the_loss_of_an_answer_is_the_sum_over_its_labelled_tokens():
    found = one_answer([[0.8, 0.2], [0.25, 0.75], [0.5, 0.5]], [0, 1, -100]).losses()
    assert found.total.item() == pytest.approx(-math.log(0.8) - math.log(0.75))
    assert found.tokens.tolist() == [2]
    assert found.mean.item() == pytest.approx(-math.log(0.6) / 2)


def test_ascent_negates_and_stops_at_the_bound():
    losses = AnswerLosses(torch.tensor([2.0, 9.0], requires_grad=True), torch.tensor([2, 3]))
    assert ascent(losses).total.tolist() == [-2.0, -9.0]
    bounded = ascent(losses, most=2.5).total
    assert bounded.tolist() == [-2.0, -7.5]
    (gradient,) = torch.autograd.grad(bounded.sum(), losses.total)
    assert gradient.tolist() == [-1.0, 0.0]


def test_npo_at_the_original_and_by_hand():
    nll = torch.tensor([0.3, 7.0])
    torch.testing.assert_close(
        npo_loss(nll, nll, beta=0.1), torch.full((2,), 2 * math.log(2) / 0.1)
    )
    # r = 1 - 3 = -2: -(2 / 0.5) log sigmoid(-0.5 * -2) = 4 log(1 + e^-1)
    found = npo_loss(torch.tensor([3.0]), torch.tensor([1.0]), beta=0.5)
    assert found.item() == pytest.approx(4 * math.log(1 + math.exp(-1)))


def test_the_gradient_of_npo_becomes_that_of_gradient_ascent():
    reference = torch.tensor([1.0, 4.0, 2.0])
    slopes = []
    for beta in (1e-4, 1.0):
        nll = torch.tensor([2.0, 4.0, 9.0], requires_grad=True)
        (slope,) = torch.autograd.grad(npo_loss(nll, reference, beta).sum(), nll)
        slopes.append(slope)
    torch.testing.assert_close(slopes[0], torch.full((3,), -1.0), rtol=1e-3, atol=0)  # as -nll has
    # w = 2 sigmoid(beta (reference - nll)): what is unlikely by now weighs less
    assert slopes[1].tolist() == pytest.approx(
        [-2 / (1 + math.exp(1)), -1.0, -2 / (1 + math.exp(7))]
    )


def test_sim_npo_by_hand():
    found = sim_npo_loss(torch.tensor([0.5, 1.5]), beta=2.0, delta=1.0)
    expected = [math.log(1 + math.exp(1)), math.log(1 + math.exp(-1))]
    assert found.tolist() == pytest.approx(expected)


def test_dpo_is_symmetric_about_the_original():
    one, other = torch.tensor([2.0]), torch.tensor([5.0])
    start = dpo_loss(one, other, (one, other), beta=0.1)
    assert start.item() == pytest.approx(2 * math.log(2) / 0.1)
    # the preferred answer gains 1, the other one loses 2: gain 3
    better = dpo_loss(one - 1, other + 2, (one, other), beta=0.1)
    worse = dpo_loss(other + 2, one - 1, (other, one), beta=0.1)
    assert better.item() == pytest.approx(20 * math.log(1 + math.exp(-0.3)))
    # exchanged roles: -log sigmoid(x) and -log sigmoid(-x) differ by x
    assert worse.item() - better.item() == pytest.approx(20 * 0.3, rel=1e-5)


def test_divergence_by_hand_zero_at_the_original_and_at_labelled_tokens_only():
    model = one_answer([[0.5, 0.5], [0.9, 0.1]], [1, -100])
    original = one_answer([[0.8, 0.2], [0.1, 0.9]], [1, -100])
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    found = divergence(model, original)
    assert found.total.item() == pytest.approx(expected)
    assert found.tokens.tolist() == [1]
    assert divergence(original, original).total.item() == 0


def test_divergence_of_answers_that_lie_at_other_places():
    model = one_answer([[0.5, 0.5], [0.9, 0.1]], [1, -100])
    shifted = one_answer([[0.3, 0.7], [0.8, 0.2]], [-100, 1])
    expected = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert divergence(model, shifted).total.item() == pytest.approx(expected)


def test_distance_of_states_by_hand():
    states = torch.tensor([[[1.0, 1.0], [4.0, 0.0]], [[0.0, 2.0], [9.0, 9.0]]])
    labels = torch.tensor([[5, 6], [7, -100]])
    found = state_distance(states, torch.tensor([1.0, 0.0]), labels)
    # means over the width of 2: 0.5 and 4.5 in the first row, 2.5 in the second
    assert found.total.tolist() == [5.0, 2.5]
    assert found.tokens.tolist() == [2, 1]
    own = state_distance(states, states[labels != -100], labels)
    assert own.total.tolist() == [0.0, 0.0]
