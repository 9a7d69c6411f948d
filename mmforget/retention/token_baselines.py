"""What every way to spare visual tokens must beat: tokens at random, and evenly spaced ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.retention.token_budget import cell_centres, even_grid
from mmforget.retention.token_pruning import TokenPruner
from mmforget.retention.token_reduction import PictureTokens
from mmforget.retention.visual_features import ChosenTokens
from mmforget.seeds import generator

Tokens = int | Sequence[int] | None
Ratio = float | Sequence[float] | None


@dataclass(frozen=True)
class RandomScores:
    """Uniform scores, the same for every picture of N tokens.

    So an answer depends neither on the batch nor on the order of the pictures; average over seeds.

    Args:
        seed: decides the scores, with N.
    """

    seed: int = 0

    def __call__(self, tokens: PictureTokens) -> Tensor:
        """Draw (N,) scores."""
        number = len(tokens.features)
        draws = generator(self.seed, "random visual tokens", number)
        return torch.rand(number, generator=draws).to(tokens.features.device)


@dataclass(frozen=True)
class GridScores:
    """Scores whose highest are spread evenly over the picture.

    First the tokens nearest to the centres of the cells of `even_grid`, then, until the budget is
    spent, the one farthest from all that were taken. Tokens without grid count as one row.
    """

    def __call__(self, tokens: PictureTokens) -> Tensor:
        """Return (N,) scores that fall with the order of the choice."""
        number, keep = len(tokens.features), min(tokens.keep, len(tokens.features))
        grid = tokens.grid or (1, number)
        scores = torch.zeros(number)
        if keep:
            taken = cell_centres(grid, even_grid(grid, keep))
            places = torch.arange(number)
            points = torch.stack((places // grid[1], places % grid[1]), dim=1).float()
            distance = torch.cdist(points, points[taken]).amin(dim=1)
            scores[taken] = float(number)
            for rank in range(keep - len(taken)):
                farthest = int(distance.argmax())
                scores[farthest] = float(number - 1 - rank)
                distance = torch.minimum(distance, (points - points[farthest]).norm(dim=1))
        return scores.to(tokens.features.device)


def random_tokens(
    keep_tokens: Tokens = None, keep_ratio: Ratio = None, seed: int = 0, **settings: Any
) -> ChosenTokens:
    """Random tokens of every picture, chosen before the language model."""
    return ChosenTokens(RandomScores(seed), keep_tokens, keep_ratio, **settings)


def grid_tokens(
    keep_tokens: Tokens = None, keep_ratio: Ratio = None, **settings: Any
) -> ChosenTokens:
    """Evenly spaced tokens of every picture, chosen before the language model."""
    return ChosenTokens(GridScores(), keep_tokens, keep_ratio, **settings)


def random_inside(
    keep_tokens: Tokens = None, keep_ratio: Ratio = None, seed: int = 0, **settings: Any
) -> TokenPruner:
    """Random tokens of every picture, chosen between two decoder layers."""
    return TokenPruner(RandomScores(seed), keep_tokens, keep_ratio, **settings)


def grid_inside(
    keep_tokens: Tokens = None, keep_ratio: Ratio = None, **settings: Any
) -> TokenPruner:
    """Evenly spaced tokens of every picture, chosen between two decoder layers."""
    return TokenPruner(GridScores(), keep_tokens, keep_ratio, **settings)
