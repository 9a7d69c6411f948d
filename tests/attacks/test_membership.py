from __future__ import annotations

import numpy as np
import pytest

from mmforget.attacks.membership import MIN_OTHERS, label_matched, transfer, true_positives


def test_label_matching_gives_equal_histograms_of_known_labels() -> None:
    labels, others = np.array([0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 1, 3])
    own, other = label_matched(labels, others, seed=0)
    assert sorted(labels[own].tolist()) == sorted(others[other].tolist()) == [0, 0, 1]
    again = label_matched(labels, others, seed=0)
    assert (own == again[0]).all() and (other == again[1]).all()


def test_true_positives_at_a_false_positive_rate() -> None:
    others = np.arange(1000.0)
    members = np.array([988.5, 989.5, 990.5, 2000.0])
    assert true_positives(members, others, 0.01) == 3  # ten of the others lie above 989
    assert true_positives(members, others, 0.001) == 1
    assert true_positives(np.full(5, 7.0), np.full(MIN_OTHERS, 7.0), 0.01) == 0  # ties


def test_true_positives_refuse_a_rate_that_cannot_be_resolved() -> None:
    with pytest.raises(ValueError, match="at least 1000"):
        true_positives(np.ones(5), np.ones(999), 0.01)


def test_transfer_tells_members_from_others() -> None:
    chance = np.random.default_rng(0)
    members, others = chance.normal(3, 1, 400), chance.normal(0, 1, 100)
    found = transfer(members, others, chance.normal(3, 1, 50), chance.normal(0, 1, 50))
    assert found.forget.mean() > 0.8 > 0.2 > found.others.mean()
    useless = transfer(others, others, members, others)
    assert useless.others.mean() == pytest.approx(0.5, abs=0.05)


def test_transfer_of_constant_scores_is_undecided() -> None:
    found = transfer(np.ones(10), np.ones(5), np.ones(3), np.ones(2))
    assert found.forget == pytest.approx(0.5, abs=1e-3)
