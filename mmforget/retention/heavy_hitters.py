"""H2O: heavy hitters and recent keys."""

from __future__ import annotations

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.retention.a2sf import A2SF


class H2O(A2SF):
    """Keeps the keys that got the most attention in all, and the latest ones.

    The score is the plain sum ``A[n, k] = sum_q S[q, k]``, that of A2SF with factor 1.

    Args:
        recent_share: of the budget that is reserved for the latest keys, in [0, 1]; the paper
            takes one half.

    Raises:
        ConfigurationError: `recent_share` is out of range.

    Reference:
        Zhang et al., H2O: Heavy-hitter oracle for efficient generative inference of large language
        models, 2023, arXiv 2306.14048.
    """

    def __init__(self, recent_share: float = 0.5) -> None:
        if not 0 <= recent_share <= 1:
            raise ConfigurationError(f"`recent_share` is {recent_share}; it must lie in [0, 1]")
        super().__init__(alpha=1.0)
        self.recent_share = recent_share

    def recent(self, limit: Tensor) -> Tensor:
        """The reserved share of the budget, rounded down."""
        return torch.floor(limit * self.recent_share).long()
