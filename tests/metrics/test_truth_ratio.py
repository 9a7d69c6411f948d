"""How surely answers are given: probabilities, truth ratios and memorization."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import ks_2samp

from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.truth_ratio import (
    answer_probability,
    exact_memorization,
    extraction_strength,
    forget_quality,
    forget_truth,
    model_utility,
    retain_truth,
    scored,
    truth_ratio,
)


def test_probability_of_an_answer():
    found = answer_probability(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([4, 1, 0]))
    assert found[:2].tolist() == pytest.approx([math.exp(-0.5), 1.0])
    assert scored(found).per_sample[2] is None
    assert scored(found).n == 2


def test_truth_ratio_worked_out_by_hand():
    # probabilities of wrong answers 0.2 and 0.4, of the right one 0.6
    wrong = -torch.tensor([[0.2, 0.4], [0.5, 0.5]]).log()
    right = -torch.tensor([0.6, 0.25]).log()
    found = truth_ratio(wrong, right)
    assert found.tolist() == pytest.approx([0.5, 2.0])
    by_loss = truth_ratio(wrong, right, "loss")
    assert by_loss.tolist() == pytest.approx([math.sqrt(0.08) / 0.6, 2.0])
    assert forget_truth(found).tolist() == pytest.approx([0.5, 0.5])
    assert retain_truth(found).tolist() == pytest.approx([0.5, 0.0])


def test_truth_ratio_refuses_what_has_no_meaning():
    with pytest.raises(DataError, match="K at least 1"):
        truth_ratio(torch.zeros(2, 0), torch.zeros(2))
    with pytest.raises(DataError, match=r"\(3, 1\)"):
        truth_ratio(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(ConfigurationError, match="'losss', did you mean 'loss'"):
        truth_ratio(torch.zeros(2, 1), torch.zeros(2), "losss")  # type: ignore[arg-type]


def test_forget_quality_is_a_two_sample_test():
    chance = torch.Generator().manual_seed(0)
    own, other = torch.rand(40, generator=chance), torch.rand(30, generator=chance)
    found = forget_quality(own, other)
    expected = ks_2samp(own.double().numpy(), other.double().numpy())
    assert found is not None
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.distance == pytest.approx(expected.statistic)
    assert found.n == (40, 30)
    far = forget_quality(own, other + 2)
    assert far is not None and far.p_value < 1e-6 and far.distance == 1.0
    assert forget_quality(own, own) == (1.0, 0.0, (40, 40))
    assert forget_quality(own, None) is None
    assert forget_quality(own[:0], other) is None
    assert forget_quality(torch.tensor([math.nan]), other) is None


def test_memorization():
    labels = torch.tensor(
        [[-100, 1, 2, 3], [0, 1, 2, -100], [0, 1, -100, -100], [-100] * 4, [3, 3, 3, 3]]
    )
    said = torch.tensor([[0, 1, 2, 3], [0, 3, 2, 0], [0, 2, 0, 0], [0] * 4, [0, 3, 0, 3]])
    logits = torch.nn.functional.one_hot(said, 4).float()
    memorized = scored(exact_memorization(logits, labels)).per_sample
    assert memorized == pytest.approx((1.0, 2 / 3, 0.5, None, 0.5))
    strength = scored(extraction_strength(logits, labels)).per_sample
    assert strength == pytest.approx((1.0, 1 / 3, 0.0, None, 0.25))
    with pytest.raises(DataError, match="beside the token"):
        exact_memorization(logits[:, 1:], labels)


def test_utility_is_a_harmonic_mean():
    assert model_utility([0.5, 1.0]) == pytest.approx(2 / 3)
    assert model_utility([0.5, 0.0]) == 0.0
    assert model_utility([]) is None
    assert model_utility([0.5, None]) is None
    with pytest.raises(DataError, match=r"-0\.1"):
        model_utility([-0.1])
