"""How long an answer needs its picture: accuracy against the place where the picture is taken away.

A greedy answer is cut after a share of its tokens, the picture is removed, and the model finishes
without it. How the picture is removed changes the numbers: `removal` is part of every result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.metrics.rates import Mean

Removal = Literal["reprefill", "evict", "blank"]
"""``reprefill``: question and answer so far are read again without the picture. ``evict``: only the
cached keys and values of the visual tokens are dropped; those of the text, computed with the
picture, stay. ``blank``: an empty picture takes its place."""

GRID = 400
"""Rates that are tried in a fit, before the best is refined."""


class Decay(NamedTuple):
    """``scale * exp(-rate * share)``, fitted to the loss of accuracy by least squares.

    Attributes:
        scale: loss where the picture is taken away before the first token.
        rate: per whole answer; 0 means that the picture is needed until the end.
    """

    scale: float
    rate: float


@dataclass(frozen=True)
class ForgettingCurve:
    """Accuracies with the picture, and with it taken away at K + 1 places.

    Attributes:
        accuracy: with the picture throughout.
        accuracies: ``a_k`` per place; place k is after the share k / K of the answer, so the first
            one is the accuracy without any picture.
        removal: how the picture was taken away.
        n: number of samples.

    Reference:
        Sun et al., Mitigating visual forgetting via take-along visual conditioning for multi-modal
        long CoT reasoning, 2025, arXiv 2503.13360.
    """

    accuracy: float
    accuracies: tuple[float, ...]
    removal: Removal = "reprefill"
    n: int = 0

    def __post_init__(self) -> None:
        if self.removal not in get_args(Removal):
            raise ConfigurationError(
                f"`removal` is '{self.removal}', {suggest(self.removal, get_args(Removal))}"
            )
        if len(self.accuracies) < 2:
            raise DataError(
                f"the curve has {len(self.accuracies)} places; give the accuracies of at least two,"
                " the first without any picture"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The places as shares of the answer, from 0 to 1."""
        last = len(self.accuracies) - 1
        return tuple(k / last for k in range(last + 1))

    @property
    def losses(self) -> tuple[float, ...]:
        """``D(k) = a - a_k``: what taking the picture away costs at each place."""
        return tuple(self.accuracy - value for value in self.accuracies)

    @property
    def area(self) -> float:
        """Mean of `losses`: large if the picture is needed for long."""
        return float(np.mean(self.losses))

    @property
    def half_life(self) -> float | None:
        """First share at which the loss is at most half of that at the start.

        None if the picture did not matter at the start, or still matters by more than half of that
        at the last place.
        """
        start = self.losses[0]
        if start <= 0:
            return None
        pairs = zip(self.shares, self.losses, strict=True)
        return next((share for share, loss in pairs if loss <= start / 2), None)

    @property
    def decay(self) -> Decay | None:
        """The fit; None if the picture did not matter at the start."""
        if self.losses[0] <= 0:
            return None
        from scipy.optimize import minimize_scalar

        share, loss = np.array(self.shares), np.array(self.losses)

        def scale(rate: float) -> float:
            shape = np.exp(-rate * share)
            return max(float(shape @ loss / (shape @ shape)), 0.0)

        def error(rate: float) -> float:
            return float(np.square(loss - scale(rate) * np.exp(-rate * share)).sum())

        # the error has several valleys if the curve is not monotonic, so a grid comes first
        rates = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, GRID)])
        best = int(np.argmin([error(rate) for rate in rates]))
        low, high = rates[max(best - 1, 0)], rates[min(best + 1, GRID)]
        found = minimize_scalar(error, bounds=(low, high), method="bounded")
        rate = min((float(rates[best]), float(found.x)), key=error)
        return Decay(scale(rate), rate)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the curve and everything made of it."""
        decay = self.decay
        return {
            "accuracy": self.accuracy,
            "shares": list(self.shares),
            "accuracies": list(self.accuracies),
            "accuracy_without_picture": self.accuracies[0],
            "losses": list(self.losses),
            "area": self.area,
            "half_life": self.half_life,
            "decay": None if decay is None else decay._asdict(),
            "removal": self.removal,
            "n": self.n,
        }


class VisualForgetting(Metric):
    """Collects a `ForgettingCurve`; update with right answers, several processes equal one.

    Args:
        places: K + 1, at least 2.
        removal: how the picture is taken away.

    Raises:
        ConfigurationError: too few places.
    """

    full_state_update = False
    higher_is_better = None
    hits: Tensor
    n: Tensor

    def __init__(self, places: int = 9, removal: Removal = "reprefill", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if places < 2:
            raise ConfigurationError(f"`places` is {places}; it must be at least 2")
        self.places, self.removal = places, removal
        self.add_state("hits", torch.zeros(places + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, full: Sequence[float] | Tensor, cut: Sequence[Sequence[float]] | Tensor
    ) -> None:
        """Add samples.

        Args:
            full: (B,) scores of the answers with the picture, 1 for a right one.
            cut: (B, K + 1) scores with the picture taken away.

        Raises:
            DataError: other shapes.
        """
        own = torch.as_tensor(full, dtype=torch.float64).to(self.hits.device)
        other = torch.as_tensor(cut, dtype=torch.float64).to(self.hits.device)
        other = other.reshape(len(own), self.places) if not len(own) else other
        if own.ndim != 1 or other.shape != (len(own), self.places):
            raise DataError(
                f"scores have the shapes {tuple(own.shape)} and {tuple(other.shape)}; give (B,) "
                f"and (B, {self.places})"
            )
        self.hits += torch.cat([own.sum()[None], other.sum(dim=0)])
        self.n += len(own)

    def compute(self) -> dict[str, Mean]:
        """Return the means: ``full`` and ``cut_0`` to ``cut_K``."""
        n = int(self.n)
        names = ("full", *(f"cut_{k}" for k in range(self.places)))
        return {name: Mean(total, n) for name, total in zip(names, self.hits.tolist(), strict=True)}

    def curve(self) -> ForgettingCurve | None:
        """The curve over all processes; None without samples."""
        values = [mean.value for mean in self.compute().values()]
        known = [value for value in values if value is not None]
        if not known:
            return None
        return ForgettingCurve(
            known[0], tuple(known[1:]), self.removal, int(self.compute()["full"].n)
        )
