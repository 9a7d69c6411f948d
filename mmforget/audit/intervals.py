"""How sure a number is: intervals for one model, for several seeds, and for differences.

All random draws are seeded, so that a report can be made again number by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmforget.seeds import generator

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A 95 % interval (unless stated otherwise) and how it was made."""

    low: float
    high: float
    method: str


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a proportion.

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    # exactly 0 and 1 at the ends, where rounding would leave 1e-17
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(low, high, "Wilson")


def clopper_pearson(successes: int, n: int) -> Interval:
    """Exact interval of a proportion; for the very small rates of membership attacks.

    Reference:
        Clopper and Pearson, The use of confidence or fiducial limits, 1934.
    """
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(0.95, method="exact")
    return Interval(float(found.low), float(found.high), "Clopper-Pearson")


def normal(value: float, error: float, method: str) -> Interval:
    """Normal interval of an estimate with a known standard error."""
    return Interval(value - Z95 * error, value + Z95 * error, method)


def bootstrap(
    values: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray],
    seed: int,
    purpose: str,
    replicates: int = 1000,
) -> Interval:
    """Percentile bootstrap over samples, all replicates at once.

    Args:
        values: arrays (n_i,) that are resampled independently of each other.
        statistic: maps arrays (R, n_i) to (R,).
        seed: base seed.
        purpose: what it is for; keeps the draws of different metrics apart.
        replicates: R.
    """
    draws = []
    for index, array in enumerate(values):
        chance = generator(seed, f"bootstrap/{purpose}", index)
        picked = torch.randint(len(array), (replicates, len(array)), generator=chance)
        draws.append(array[picked.numpy()])
    found = statistic(*draws)
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(low), float(high), f"bootstrap over samples, {replicates} replicates")


def bootstrap_mean(values: np.ndarray, seed: int, purpose: str, replicates: int = 1000) -> Interval:
    """Percentile bootstrap of the mean of per-sample values (n,)."""
    return bootstrap([values], lambda drawn: drawn.mean(-1), seed, purpose, replicates)


def grouped_jackknife(
    statistic: Callable[[np.ndarray], float], n: int, groups: int = 10
) -> Interval:
    """Delete-group jackknife, for statistics that are too dear to bootstrap.

    Args:
        statistic: value on the samples where a mask (n,) is True.
        n: number of samples; every g-th is left out in turn.
        groups: number of groups.
    """
    position = np.arange(n)
    count = min(groups, n)
    values = np.array([statistic(position % count != group) for group in range(count)])
    error = math.sqrt((count - 1) / count * float(np.square(values - values.mean()).sum()))
    value = statistic(np.ones(n, dtype=bool))
    return normal(value, error, f"jackknife, {count} groups of samples")


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of the mean over a few seeds; for three or four of them, labelled as such.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.stats import t

    if len(values) < 2:
        raise ValueError(f"a t interval needs at least 2 values, got {len(values)}")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean - half, mean + half, f"t, {len(values)} seeds")


def hierarchical_bootstrap(
    values: Sequence[Sequence[np.ndarray]], seed: int, purpose: str, replicates: int = 2000
) -> Interval:
    """Bootstrap of a mean over training seeds, then unlearning seeds, then samples.

    Args:
        values: per training seed, per unlearning seed, the per-sample values (n,).
        seed: base seed.
        purpose: what it is for.
        replicates: R.

    Returns:
        Percentile interval of the mean of means.
    """
    chance = generator(seed, f"hierarchical/{purpose}")

    def draw(n: int, size: tuple[int, ...]) -> np.ndarray:
        return torch.randint(n, size, generator=chance).numpy()

    # Resampling the samples of one model is done once per replicate and model; the seeds then pick
    # among these means, so that no inner loop runs over replicates.
    means = [
        np.stack([run[draw(len(run), (replicates, len(run)))].mean(1) for run in runs], axis=1)
        for runs in values
    ]
    replicate = np.arange(replicates)
    outer = draw(len(values), (replicates, len(values)))
    total = np.zeros(replicates)
    for column in range(len(values)):
        for index, found in enumerate(means):
            hit = replicate[outer[:, column] == index]
            inner = draw(found.shape[1], (len(hit), found.shape[1]))
            total[hit] += found[hit[:, None], inner].mean(1)
    low, high = np.quantile(total / len(values), (0.025, 0.975))
    return Interval(float(low), float(high), f"hierarchical bootstrap, {replicates} replicates")


def equivalence_margin(retrained: Sequence[float], smallest: float = 0.01) -> float:
    """Margin of an equivalence claim: max(1 point, two standard deviations of the retrained)."""
    spread = float(np.std(retrained, ddof=1)) if len(retrained) > 1 else 0.0
    return max(smallest, 2 * spread)


def equivalent(differences: np.ndarray, margin: float) -> bool:
    """Two one-sided tests: is the 90 % interval of the mean difference inside the margin?

    "No significant difference" would be no evidence of equivalence; this is.

    Args:
        differences: (n,) paired differences, of samples or of seeds; at least two.
        margin: declared in advance, in the units of the differences.

    Reference:
        Schuirmann, A comparison of the two one-sided tests procedure, 1987.
    """
    found = t_interval(differences.tolist(), level=0.90)
    return bool(-margin < found.low and found.high < margin)
