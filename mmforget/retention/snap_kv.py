"""SnapKV: what the end of the prompt looks at."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmforget.errors import ConfigurationError
from mmforget.retention.eviction_policy import EvictionPolicy, Step


class SnapKV(EvictionPolicy):
    """Scores the keys of the prompt by the attention of its last queries, smoothed over places.

    The score of a key is the attention that it got from the last `window` queries, averaged over
    `pool` neighbouring keys so that whole passages stay; the keys of the window itself are kept.
    Once after the prompt only. The query heads of a key head vote together.

    Args:
        window: last queries of the prompt that vote, at least 1.
        pool: odd width of the smoothing, 1 for none.

    Raises:
        ConfigurationError: a number is out of range.

    Reference:
        Li et al., SnapKV: LLM knows what you are looking for before generation, 2024,
        arXiv 2404.14469.
    """

    prefill_only: ClassVar[bool] = True

    def __init__(self, window: int = 16, pool: int = 5) -> None:
        if window < 1:
            raise ConfigurationError(f"`window` is {window}; it must be at least 1")
        if pool < 1 or pool % 2 == 0:
            raise ConfigurationError(f"`pool` is {pool}; it must be an odd number, 1 for none")
        self.window = window
        self.pool = pool

    def update(self, score: Tensor, step: Step) -> Tensor:
        """Count the votes of the last queries of this pass; earlier passes are forgotten."""
        votes = torch.zeros_like(score)
        for weights, after, valid in step.rows(self.window):
            votes = votes + torch.einsum(
                "bgrn,br->bgn", weights, (valid & (after < self.window)).to(weights)
            )
        return functional.avg_pool1d(
            votes, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False
        )

    def recent(self, limit: Tensor) -> Tensor:
        """The window."""
        return torch.full_like(limit, self.window)
