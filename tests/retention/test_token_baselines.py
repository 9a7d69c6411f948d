"""Random, evenly spaced and pooled tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import DataError
from mmforget.retention.token_baselines import GridScores, RandomScores
from mmforget.retention.token_budget import highest
from mmforget.retention.token_pooling import PooledTokens
from mmforget.retention.token_reduction import PictureTokens


def tokens(keep: int, grid: tuple[int, int] | None = (8, 8), features: Tensor | None = None):  # type: ignore[no-untyped-def]
    number = 64 if grid is None else grid[0] * grid[1]
    features = torch.zeros(number, 3) if features is None else features
    return PictureTokens(features, keep, grid, 0, 0)


def test_random_scores_depend_on_seed_and_number_only() -> None:
    first = RandomScores(0)(tokens(3))
    assert torch.equal(first, RandomScores(0)(tokens(9, None, torch.ones(64, 5))))
    assert not torch.equal(first, RandomScores(1)(tokens(3)))
    picks = torch.cat([highest(RandomScores(seed)(tokens(16)), 16) for seed in range(200)])
    counts = torch.bincount(picks, minlength=64).float()
    assert counts.min() > 30 and counts.max() < 75  # 50 each are expected, 4.5 sigma apart


def test_grid_scores_are_even() -> None:
    assert highest(GridScores()(tokens(4)), 4).tolist() == [18, 22, 50, 54]
    for keep in (1, 5, 16, 17, 31, 63):
        places = highest(GridScores()(tokens(keep)), keep)
        assert len(places.unique()) == keep
        halves = [(places < 32).sum(), (places % 8 < 4).sum()]
        assert all(abs(int(half) - keep / 2) <= keep / 4 + 1 for half in halves)
    assert highest(GridScores()(tokens(4, None)), 4).tolist() == [8, 24, 40, 56]


def test_pooling_is_average_pooling() -> None:
    features = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    pooled, places = PooledTokens(keep_ratio=0.25).chosen(tokens(16, features=features))
    planes = features.T.reshape(1, 3, 8, 8)
    torch.testing.assert_close(pooled.T.reshape(1, 3, 4, 4), F.avg_pool2d(planes, 2))
    assert len(places.unique()) == 16
    assert PooledTokens(keep_tokens=0).chosen(tokens(0))[0].shape == (0, 3)
    one, centre = PooledTokens(keep_tokens=1).chosen(tokens(1, features=features))
    torch.testing.assert_close(one[0], features.mean(dim=0))
    assert centre.tolist() == [36]
    with pytest.raises(DataError, match="64 visual tokens that form no grid"):
        PooledTokens(keep_tokens=4).chosen(tokens(4, None))
