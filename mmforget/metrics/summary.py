"""Numbers made of other numbers: always shown beside the components they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def h_mean(retain: float, before: float, after: float) -> float:
    """Harmonic mean of the retained accuracy and the drop on what was to be forgotten.

    H = 2 A_r (A_before - A_after) / (A_r + A_before - A_after); 0 if the drop is negative or the
    sum is 0. With the original model as "before" this is the ``h_mean`` of the paper's tables, with
    the model before this request it is ``h_mean_previous``, which the authors' code computes.

    Args:
        retain: accuracy on the retained classes after forgetting, in [0, 1].
        before: accuracy on the forgotten classes before, in [0, 1].
        after: accuracy on the forgotten classes after, in [0, 1].

    Reference:
        Zhao et al., Continual forgetting for pre-trained vision models, 2024, arXiv 2403.11530.
    """
    drop = before - after
    if drop <= 0 or retain + drop == 0:
        return 0.0
    return 2 * retain * drop / (retain + drop)


def tug_of_war(accuracies: Sequence[float], retrained: Sequence[float]) -> float:
    """Product over the splits of 1 - |accuracy - accuracy of the retrained model|, in [0, 1].

    Args:
        accuracies: of the model, one per split (forget, retain, test).
        retrained: of the retrained model, in the same order.

    Reference:
        Zhao et al., What makes unlearning hard and what to do about it, 2024, arXiv 2406.01257.
    """
    gaps = zip(accuracies, retrained, strict=True)
    return math.prod(1 - abs(own - other) for own, other in gaps)


def average_gap(values: Sequence[float], retrained: Sequence[float]) -> float:
    """Mean absolute difference to the retrained model over several measures, in [0, 1].

    Reference:
        Fan et al., SalUn, 2024, arXiv 2310.12508.
    """
    return float(np.mean([abs(a - b) for a, b in zip(values, retrained, strict=True)]))


def adaptive_unlearning_score(test_original: float, test: float, forget: float) -> float:
    """AUS = (1 - (test_original - test)) / (1 + delta).

    Args:
        test_original: accuracy of the original model on retained test data, in [0, 1].
        test: accuracy of the model on the same data, in [0, 1].
        forget: what a perfect model brings to 0: the accuracy on the forgotten class, or, for
            random samples, |test accuracy - forget accuracy|.

    Reference:
        Cotogni et al., DUCK: distance-based unlearning via centroid kinematics, 2023,
        arXiv 2312.02052.
    """
    return (1 - (test_original - test)) / (1 + forget)


def retrained_z(value: float, retrained: Sequence[float], s_min: float) -> float:
    """Distance to the mean of the retrained models in units of their standard deviation.

    Args:
        value: of the model.
        retrained: of the retrained models; the standard deviation uses n - 1.
        s_min: lower bound of the unit, so that a lucky agreement of few models does not blow up.
    """
    spread = float(np.std(retrained, ddof=1)) if len(retrained) > 1 else 0.0
    return (value - float(np.mean(retrained))) / max(spread, s_min)


def progress(
    value: float, original: float, retrained: Sequence[float], s_min: float
) -> float | None:
    """Share of the way from the original to the retrained model: 0 nothing, 1 there, > 1 beyond.

    Returns:
        None ("not discriminable") if original and retrained differ by at most two standard
        deviations of the retrained models, or by less than `s_min`.
    """
    mean = float(np.mean(retrained))
    spread = float(np.std(retrained, ddof=1)) if len(retrained) > 1 else 0.0
    if abs(original - mean) <= max(2 * spread, s_min):
        return None
    return (original - value) / (original - mean)
