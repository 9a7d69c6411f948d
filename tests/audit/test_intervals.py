from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from mmforget.audit.intervals import (
    bootstrap,
    bootstrap_mean,
    clopper_pearson,
    equivalence_margin,
    equivalent,
    grouped_jackknife,
    hierarchical_bootstrap,
    t_interval,
    wilson,
)
from mmforget.metrics.membership import rank_auc


def width(interval: object) -> float:
    return interval.high - interval.low  # type: ignore[attr-defined]


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (20, 20), (412, 1000)])
def test_proportions_against_scipy(k: int, n: int) -> None:
    for function, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
        expected = binomtest(k, n).proportion_ci(method=method)
        assert function(k, n).low == pytest.approx(expected.low, abs=1e-9)
        assert function(k, n).high == pytest.approx(expected.high, abs=1e-9)


def test_bootstrap_is_seeded_and_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(2, 1, 400)
    found = bootstrap_mean(values, 0, "a")
    assert found == bootstrap_mean(values, 0, "a")
    assert found != bootstrap_mean(values, 0, "b")
    assert width(found) == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert found.low < values.mean() < found.high


def test_bootstrap_width_shrinks_with_the_root_of_n() -> None:
    values = np.random.default_rng(0).normal(0, 1, 6400)
    widths = [width(bootstrap_mean(values[:n], 0, "w")) for n in (100, 400, 1600, 6400)]
    for wide, narrow in itertools.pairwise(widths):
        assert wide / narrow == pytest.approx(2, rel=0.25)


def test_bootstrap_of_an_auc_resamples_both_sides() -> None:
    chance = np.random.default_rng(0)
    members, others = chance.normal(1, 1, 60), chance.normal(0, 1, 50)
    found = bootstrap([members, others], rank_auc, 0, "auc", 300)
    assert found.low < float(rank_auc(members, others)) < found.high
    assert 0.05 < width(found) < 0.25


def test_grouped_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(0, 1, 500)
    found = grouped_jackknife(lambda mask: float(values[mask].mean()), 500, groups=500)
    assert width(found) / 2 / 1.96 == pytest.approx(values.std(ddof=1) / 500**0.5, rel=1e-3)


def test_t_interval_worked_example() -> None:
    found = t_interval([0.9, 1.0, 1.1])
    assert (found.low, found.high) == pytest.approx((1 - 0.2484, 1 + 0.2484), abs=1e-3)
    assert found.method == "t, 3 seeds"
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])


def test_hierarchical_bootstrap_is_dominated_by_seeds_that_differ() -> None:
    chance = np.random.default_rng(0)
    same = [[chance.normal(0, 1, 500)] for _ in range(6)]
    apart = [[chance.normal(level, 1, 500)] for level in (-5, -3, -1, 1, 3, 5)]
    narrow = hierarchical_bootstrap(same, 0, "same", 500)
    wide = hierarchical_bootstrap(apart, 0, "apart", 500)
    assert width(wide) > 10 * width(narrow)
    pooled = bootstrap_mean(np.concatenate([run[0] for run in apart]), 0, "pooled")
    assert width(wide) > 5 * width(pooled)  # samples alone would pretend to know


def test_hierarchical_bootstrap_without_spread_is_a_point() -> None:
    runs = [[np.full(4, 0.3), np.full(9, 0.3)], [np.full(2, 0.3)]]
    found = hierarchical_bootstrap(runs, 0, "point", 200)
    assert (found.low, found.high) == pytest.approx((0.3, 0.3))


def test_equivalence_needs_precision_and_not_only_insignificance() -> None:
    near = np.random.default_rng(0).normal(0.0, 0.01, 100)
    vague = np.array([-0.3, 0.3, -0.2, 0.25])
    assert equivalent(near, 0.01)
    assert not equivalent(vague, 0.01)
    assert not equivalent(near + 0.02, 0.01)


def test_equivalence_margin() -> None:
    assert equivalence_margin([0.9, 0.9]) == 0.01
    assert equivalence_margin([0.8, 0.9]) == pytest.approx(2 * 0.0707, abs=1e-3)
    assert equivalence_margin([0.5]) == 0.01
