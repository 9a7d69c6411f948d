"""How many visual tokens of a picture may stay, and which ones do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError, DivergenceError

Scope = Literal["picture", "row"]


class TokenBudget:
    """A number or a share of tokens, the same for all pictures or one for each.

    A share r of N tokens keeps ``floor(r N + 0.5)``, so that a half rounds up (Python's own `round`
    takes it to the even neighbour). A number above N keeps all N; 0 keeps none.

    Args:
        tokens: number of tokens, or one number per picture of a batch, in order.
        ratio: share in [0, 1], or one share per picture. Give this or `tokens`.

    Raises:
        ConfigurationError: none or both are given, or one is out of range.
    """

    def __init__(
        self,
        tokens: int | Sequence[int] | None = None,
        ratio: float | Sequence[float] | None = None,
    ) -> None:
        if (tokens is None) == (ratio is None):
            raise ConfigurationError(
                "give either `keep_tokens` or `keep_ratio`, "
                + ("not both" if tokens is not None else "at least one of them")
            )
        self.tokens = _listed(tokens)
        self.ratio = _listed(ratio)
        for value in self.tokens or ():
            if value < 0 or value != int(value):
                raise ConfigurationError(
                    f"`keep_tokens` is {value}; it must be a whole number, at least 0"
                )
        for value in self.ratio or ():
            if not 0.0 <= value <= 1.0:
                raise ConfigurationError(f"`keep_ratio` is {value}; it must lie in [0, 1]")

    def kept(self, counts: Sequence[int]) -> list[int]:
        """How many of each picture's tokens stay.

        Args:
            counts: tokens of every picture of a batch.

        Raises:
            DataError: there is a budget per picture, but the batch has another number of pictures.
        """
        given = self.tokens or self.ratio or ()
        if len(given) not in (1, len(counts)):
            raise DataError(
                f"there are budgets for {len(given)} pictures, but the batch has {len(counts)}; "
                "give one for each, or one for all"
            )
        budgets = list(given) * len(counts) if len(given) == 1 else list(given)
        if self.tokens is not None:
            return [min(int(budget), n) for budget, n in zip(budgets, counts, strict=True)]
        return [math.floor(share * n + 0.5) for share, n in zip(budgets, counts, strict=True)]

    def __repr__(self) -> str:
        name, given = ("tokens", self.tokens) if self.tokens else ("ratio", self.ratio)
        assert given is not None  # the constructor saw to it
        return f"{name}={given[0] if len(given) == 1 else list(given)}"


def highest(scores: Tensor, keep: int) -> Tensor:
    """The places of the `keep` highest scores, ascending; of equal ones the earlier place.

    Args:
        scores: (N,).
        keep: from 0 to N.

    Returns:
        (keep,) int64.

    Raises:
        DivergenceError: a score that is no number.
    """
    if torch.isnan(scores).any():
        raise DivergenceError(
            f"the score of visual token {int(torch.isnan(scores).nonzero()[0])} is not a number; "
            "the weights or the scorer are broken"
        )
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:keep].sort().values


def even_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """The finest coarser grid of at most `keep` cells.

    Among the grids that stretch one side by at most twice as much as the other, that of most cells,
    and of these the least stretched one.

    Args:
        grid: (h, w).
        keep: at least 1.
    """
    height, width = grid
    found = []
    for rows in range(1, min(height, keep) + 1):
        columns = min(width, keep // rows)
        stretch = round(abs(math.log(rows * width / (height * columns))), 9)
        found.append((stretch > math.log(2) + 1e-9, -rows * columns, stretch, rows, columns))
    narrow = [one for one in found if not one[0]]
    best = min(narrow) if narrow else min(found, key=lambda one: one[2:])
    return best[3], best[4]


def cell_centres(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The places nearest to the centres of `cells` coarse cells, ascending: (h' w',) int64."""
    (height, width), (rows, columns) = grid, cells
    down = ((torch.arange(rows) + 0.5) * height / rows).long()
    across = ((torch.arange(columns) + 0.5) * width / columns).long()
    return (down[:, None] * width + across[None, :]).flatten()


def _listed(value: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, int | float) else tuple(value)
