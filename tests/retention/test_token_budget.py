"""Budgets, selection by score, coarser grids."""

from __future__ import annotations

import pytest
import torch

from mmforget.errors import ConfigurationError, DataError, DivergenceError
from mmforget.retention.token_budget import TokenBudget, cell_centres, even_grid, highest


def test_shares_are_rounded_half_up() -> None:
    """Python's own `round` would give 2 for 2.5 and 0 for 0.5."""
    assert TokenBudget(ratio=0.25).kept([10, 2, 16, 0]) == [3, 1, 4, 0]
    assert TokenBudget(ratio=0.0).kept([10]) == [0]
    assert TokenBudget(ratio=1).kept([7]) == [7]


def test_numbers_and_lists() -> None:
    assert TokenBudget(5).kept([10, 3]) == [5, 3]
    assert TokenBudget(0).kept([10, 3]) == [0, 0]
    assert TokenBudget([1, 99]).kept([10, 3]) == [1, 3]
    assert TokenBudget(ratio=[0.5, 0.0]).kept([10, 3]) == [5, 0]
    assert TokenBudget([4]).kept([]) == []
    with pytest.raises(DataError, match="budgets for 2 pictures, but the batch has 3"):
        TokenBudget([1, 2]).kept([4, 4, 4])
    assert repr(TokenBudget(5)) == "tokens=5" and repr(TokenBudget(ratio=[0.5])) == "ratio=0.5"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either `keep_tokens` or `keep_ratio`"),
        ({"tokens": 1, "ratio": 0.5}, "not both"),
        ({"tokens": -1}, "`keep_tokens` is -1"),
        ({"tokens": [3, 1.5]}, "`keep_tokens` is 1.5"),
        ({"ratio": 1.01}, r"`keep_ratio` is 1.01; it must lie in \[0, 1\]"),
        ({"ratio": float("nan")}, "`keep_ratio` is nan"),
    ],
)
def test_budgets_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TokenBudget(**settings)  # type: ignore[arg-type]


def test_highest_scores_ascending_and_stable() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.5])
    assert highest(scores, 2).tolist() == [1, 3]
    assert highest(scores, 3).tolist() == [1, 2, 3]  # of the two halves the first
    assert highest(scores, 0).tolist() == []
    assert highest(torch.zeros(300), 4).tolist() == [0, 1, 2, 3]
    assert highest(torch.tensor([1.0, float("inf")]), 1).tolist() == [1]
    with pytest.raises(DivergenceError, match="visual token 1 is not a number"):
        highest(torch.tensor([0.0, float("nan")]), 1)


@pytest.mark.parametrize(
    ("grid", "keep", "cells"),
    [
        ((8, 8), 64, (8, 8)),
        ((8, 8), 99, (8, 8)),
        ((8, 8), 32, (4, 8)),
        ((8, 8), 16, (4, 4)),
        ((8, 8), 7, (2, 3)),  # one row of seven would be nearer, but is too stretched
        ((8, 8), 1, (1, 1)),
        ((1, 16), 4, (1, 4)),
        ((4, 2), 2, (2, 1)),
    ],
)
def test_even_grids(grid: tuple[int, int], keep: int, cells: tuple[int, int]) -> None:
    assert even_grid(grid, keep) == cells


def test_centres_of_cells() -> None:
    assert cell_centres((4, 4), (2, 2)).tolist() == [5, 7, 13, 15]
    assert cell_centres((3, 3), (1, 1)).tolist() == [4]
    assert cell_centres((2, 3), (2, 3)).tolist() == [*range(6)]
