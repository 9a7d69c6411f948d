"""Which keys of a cache matter most: what all policies share, and two that look at no attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mmforget.seeds import generator


class Rows(NamedTuple):
    """The attention of some query rows of one forward pass.

    Attributes:
        weights: (B, G, R, n) float32, summed over the query heads that share a group of keys.
        after: (B, R) how many rows of the same pass, padding not counted, come later.
        valid: (B, R) bool, False for padding.
    """

    weights: Tensor
    after: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Step:
    """What a policy gets to see of one forward pass through one decoder layer.

    Attributes:
        layer: number of the decoder layer.
        start: tokens that came before this pass.
        positions: (B, G, n) place in the sequence of every key that is there now; G key heads, or
            1 where they share their keys.
        valid: (B, Q) bool, False for queries of padding.
        rows: hands out the last so many query rows of each sequence (None: all) in blocks, so
            that memory grows with the block and not with Q.
    """

    layer: int
    start: int
    positions: Tensor
    valid: Tensor
    rows: Callable[[int | None], Iterator[Rows]]


class EvictionPolicy(ABC):
    """Scores the keys of a cache; the lowest go first.

    Class attributes:
        prefill_only: whether the scores have a meaning only right after the prompt.
    """

    prefill_only: ClassVar[bool] = False

    @abstractmethod
    def update(self, score: Tensor, step: Step) -> Tensor:
        """Take one forward pass into account.

        Args:
            score: (B, G, n) float32 so far, 0 for the keys of this pass.
            step: the pass.

        Returns:
            (B, G, n) new scores.
        """

    def recent(self, limit: Tensor) -> Tensor:
        """How many of the latest keys (B,) must stay, where (B,) may stay in all."""
        return torch.zeros_like(limit)


class RecentKeys(EvictionPolicy):
    """Keeps the latest keys, a sliding window: the baseline that knows nothing.

    With ``sink=4`` it is StreamingLLM's cache, except that places are not renumbered.
    """

    def update(self, score: Tensor, step: Step) -> Tensor:
        """Score by place in the sequence."""
        return step.positions.to(score.dtype)


class RandomKeys(EvictionPolicy):
    """Keeps keys by lot: the baseline that every score must beat.

    A key draws its lot when it comes, so that all keys seen so far are equally likely to be there
    at any time.

    Args:
        seed: of the lots; equal for every call of ``generate``.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def update(self, score: Tensor, step: Step) -> Tensor:
        """Draw the lots of the new keys."""
        new = step.valid.shape[1]
        lots = torch.rand(
            (*score.shape[:2], new),
            generator=generator(self.seed, "random keys", step.layer, step.start),
        )
        return torch.cat([score[..., : score.shape[-1] - new], lots.to(score)], dim=-1)
