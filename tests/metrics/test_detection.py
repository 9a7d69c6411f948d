"""Quality of detectors against brute force over all thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmforget.errors import DataError
from mmforget.metrics.detection import detection_scores


def reference(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Try every score, and one above all, as the threshold."""
    limits = [*np.unique(np.concatenate([members, others])), np.inf]
    rates = [((members >= x).mean(), (others >= x).mean()) for x in limits]
    pairs = members[:, None] - others[None]
    return {
        "auc": float((pairs > 0).mean() + (pairs == 0).mean() / 2),
        "tpr_at_1_percent": max(true for true, false in rates if false <= 0.01),
        "tpr_at_3_percent": max(true for true, false in rates if false <= 0.03),
        "balanced_accuracy": max((true + 1 - false) / 2 for true, false in rates),
    }


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
@pytest.mark.parametrize("ties", [False, True])
def test_all_numbers_are_those_of_brute_force(scale: float, ties: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    members = torch.randn(40, generator=draw, dtype=torch.float64) + 1.5
    others = torch.randn(130, generator=draw, dtype=torch.float64)
    if ties:
        members, others = members.round(decimals=1), others.round(decimals=1)
    members, others = scale * members, scale * others
    found = detection_scores(members, others)
    for key, value in reference(members.numpy(), others.numpy()).items():
        assert found[key] == pytest.approx(value, abs=1e-12), key
    limit = found["threshold"]
    true, false = (members >= limit).double().mean(), (others >= limit).double().mean()
    assert float(true + 1 - false) / 2 == pytest.approx(found["balanced_accuracy"])
    assert not found["notes"] and (found["memorized"], found["ordinary"]) == (40, 130)
    turned = detection_scores(-members, -others, higher_is_memorized=False)
    assert turned["auc"] == found["auc"] and turned["threshold"] == -limit


def test_a_rate_of_exactly_one_percent_is_allowed() -> None:
    others = torch.arange(100.0)
    assert detection_scores([98.5, 99.5], others)["tpr_at_1_percent"] == 1.0
    assert detection_scores([97.5, 99.5], others)["tpr_at_1_percent"] == 0.5


def test_small_rates_are_not_made_up_from_few_prompts() -> None:
    found = detection_scores([2.0], torch.arange(34.0) / 34)
    assert found["tpr_at_1_percent"] is None and found["tpr_at_3_percent"] == 1.0
    assert "100 ordinary prompts, there are 34" in found["notes"][0]
    assert len(detection_scores([2.0], torch.arange(33.0))["notes"]) == 2


def test_scores_the_wrong_way_round_give_no_threshold() -> None:
    found = detection_scores([1.0, 2.0], [3.0, 4.0])
    assert found["auc"] == 0 and found["balanced_accuracy"] == 0.5 and found["threshold"] is None


@pytest.mark.parametrize("bad", [[], [float("nan")], [[1.0]]])
def test_scores_that_are_none_or_not_finite_are_refused(bad: list) -> None:
    with pytest.raises(DataError, match="scores of memorized prompts"):
        detection_scores(bad, [1.0])
    with pytest.raises(DataError, match="scores of ordinary prompts"):
        detection_scores([1.0], bad)
