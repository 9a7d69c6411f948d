"""Means of per-sample scores, with what could not be scored, and intervals where they are rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(NamedTuple):
    """A mean by its parts, so that those of several processes can be added up.

    Attributes:
        total: sum of the scores.
        n: number of scored samples.
        excluded: samples without a score, such as those at which a judge failed.
    """

    total: float
    n: int
    excluded: int = 0

    @property
    def value(self) -> float | None:
        """The mean; None without samples."""
        return self.total / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval, for scores that are 0 or 1; None without samples.

        Raises:
            ValueError: the total is no number of hits.
        """
        hits = round(self.total)
        if abs(hits - self.total) > 1e-6 or not 0 <= hits <= self.n:
            raise ValueError(f"{self.total:g} of {self.n} is no rate, so Wilson's interval fails")
        if not self.n:
            return None
        from scipy.stats import binomtest

        found = binomtest(hits, self.n).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Scores:
    """One score per sample.

    Attributes:
        per_sample: in the order of the samples; None where there is no score.
    """

    per_sample: tuple[float | None, ...]

    @staticmethod
    def of(values: Iterable[float | bool | None]) -> Scores:
        """Scores from any numbers or truth values."""
        return Scores(tuple(None if value is None else float(value) for value in values))

    @property
    def mean(self) -> Mean:
        """The mean over the samples that have a score."""
        known = [value for value in self.per_sample if value is not None]
        return Mean(sum(known), len(known), len(self.per_sample) - len(known))

    @property
    def value(self) -> float | None:
        """The mean; None without samples."""
        return self.mean.value

    @property
    def n(self) -> int:
        """Number of samples that have a score."""
        return self.mean.n

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``value``, ``n``, ``excluded`` and ``per_sample``."""
        mean = self.mean
        return {
            "value": mean.value,
            "n": mean.n,
            "excluded": mean.excluded,
            "per_sample": list(self.per_sample),
        }


class ScoreMetric(Metric):
    """Base of metrics that add up `Scores` over batches and processes.

    Subclasses name their scores in `names` and return them from `scores`, whose arguments are those
    of `update`.
    """

    full_state_update = False
    names: ClassVar[tuple[str, ...]]
    totals: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        size = len(self.names)
        self.add_state("totals", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def scores(self, *args: Any) -> Mapping[str, Scores]:
        """Return the scores of a batch by name."""
        raise NotImplementedError

    def update(self, *args: Any) -> None:
        """Add a batch; see the class."""
        for row, mean in enumerate(one.mean for one in self._ordered(self.scores(*args))):
            self.totals[row] += mean.total
            self.counts[row, 0] += mean.n
            self.counts[row, 1] += mean.excluded

    def _ordered(self, found: Mapping[str, Scores]) -> Sequence[Scores]:
        return [found[name] for name in self.names]

    def compute(self) -> dict[str, Mean]:
        """Return the means by name; their value is None without samples."""
        rows = zip(self.names, self.totals.tolist(), self.counts.tolist(), strict=True)
        return {name: Mean(total, n, excluded) for name, total, (n, excluded) in rows}
