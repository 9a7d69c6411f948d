"""How well generated pictures lie among reference pictures, and how much of them they reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.distribution import FeatureNetwork, shipped_features

ROWS_AT_A_TIME = 1024
SIDES = ("reference", "other")


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """Distance of every point to its k-th nearest neighbour, itself not counted.

    Shape: (N, d) to (N,), with N above k.

    Raises:
        DataError: too few points.
    """
    if len(features) <= k:
        raise DataError(
            f"{len(features)} pictures have no {k}-th nearest neighbour each; give more than {k}, "
            "or lower `k`"
        )
    # the point itself comes first, at distance 0
    parts = [
        torch.cdist(part, features).kthvalue(k + 1, dim=1).values
        for part in features.split(ROWS_AT_A_TIME)
    ]
    return torch.cat(parts)


def precision_recall(reference: Tensor, other: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Precision and recall of two sets of features.

    Precision is the share of the others that lie in the ball of some reference point, whose radius
    reaches to its k-th neighbour; recall is the same with the sides exchanged.

    Shape: (N, d), (M, d) to (), (); N and M above k.

    Reference:
        Kynkäänniemi et al., Improved precision and recall metric for assessing generative models,
        2019, arXiv 1904.06991.
    """
    return _reached(reference, other, k), _reached(other, reference, k)


def density_coverage(reference: Tensor, other: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Density and coverage of two sets of features.

    Density counts in how many reference balls a point of the others lies on average, divided by k;
    it may exceed 1. Coverage is the share of the reference balls with at least one of the others.

    Shape: (N, d), (M, d) to (), (); N above k, M at least 1.

    Reference:
        Naeem et al., Reliable fidelity and diversity metrics for generative models, 2020,
        arXiv 2002.09797.
    """
    radii = neighbour_radii(reference, k)
    inside, covered = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part, radius in zip(
        reference.split(ROWS_AT_A_TIME), radii.split(ROWS_AT_A_TIME), strict=True
    ):
        within = torch.cdist(part, other) <= radius[:, None]
        inside = inside.to(within.device) + within.sum()
        covered = covered.to(within.device) + within.any(dim=1).sum()
    return inside / (k * len(other)), covered / len(reference)


def pairwise_diversity(features: Tensor) -> Tensor:
    """Mean distance of two different points; 0 for a generator that always draws the same.

    Shape: (N, d) to (); N at least 2.
    """
    n = len(features)
    parts = [torch.cdist(part, features).sum() for part in features.split(ROWS_AT_A_TIME)]
    return torch.stack(parts).sum() / (n * (n - 1))


def _reached(centres: Tensor, points: Tensor, k: int) -> Tensor:
    """Share of the points that lie in a ball of some centre."""
    radii = neighbour_radii(centres, k)
    parts = [
        (torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(ROWS_AT_A_TIME)
    ]
    return torch.cat(parts).double().mean()


class _Features(Metric):
    """Keeps the features of two sides.

    torchmetrics stands in for a process without pictures by an empty vector of the metric's own
    type, and what the others send must match: features are kept flat.
    """

    full_state_update = False
    higher_is_better = True
    reference_features: list[Tensor]
    other_features: list[Tensor]
    size: Tensor

    def __init__(self, features: FeatureNetwork | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if features is not None and not isinstance(features, FeatureNetwork):
            raise ConfigurationError(
                f"`features` is a {type(features).__name__}; wrap it: FeatureNetwork(network, name)"
            )
        self.feature_network = shipped_features() if features is None else features
        self.set_dtype(torch.float64)
        self.add_state("size", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")
        for side in SIDES:
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    def _add(self, images: Tensor, side: str) -> None:
        if len(images):
            found = self.feature_network(images).to(self.device)
            self.size.fill_(found.shape[1])
            getattr(self, f"{side}_features").append(found.flatten())

    def _side(self, side: str, least: int) -> Tensor:
        parts = getattr(self, f"{side}_features")
        # A state is a list before processes exchange it, and a tensor afterwards.
        empty = isinstance(parts, list) and not parts
        size = max(1, int(self.size))
        found = torch.zeros(0, size) if empty else dim_zero_cat(parts).view(-1, size)
        if len(found) < least:
            raise DataError(
                f"{type(self).__name__} has seen {len(found)} {side} pictures, it needs at least "
                f"{least}; update it with more"
            )
        return found


class _Neighbours(_Features):
    def __init__(self, features: FeatureNetwork | None, k: int, **kwargs: Any) -> None:
        if k < 1:
            raise ConfigurationError(f"`k` is {k}, it must be at least 1")
        super().__init__(features, **kwargs)
        self.k = k

    def update(self, images: Tensor, reference: bool) -> None:
        """Add (B, 3, H, W) images in [0, 1], to the reference pictures or to the others."""
        self._add(images, SIDES[0] if reference else SIDES[1])


class PrecisionRecall(_Neighbours):
    """Precision: are generated pictures like reference pictures? Recall: do they reach all of them?

    Compare values of the same numbers of pictures and the same feature network only. Outliers among
    the reference pictures have large balls; `DensityCoverage` suffers less from them.

    Args:
        features: the feature network; None takes `shipped_features`.
        k: neighbours that a ball reaches to.

    Raises:
        ConfigurationError: `k` below 1, or features that are no `FeatureNetwork`.

    Reference:
        Kynkäänniemi et al., Improved precision and recall metric for assessing generative models,
        2019, arXiv 1904.06991.
    """

    def __init__(self, features: FeatureNetwork | None = None, k: int = 3, **kwargs: Any) -> None:
        super().__init__(features, k, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return ``precision`` and ``recall`` in [0, 1].

        Raises:
            DataError: no more than k pictures on a side.
        """
        sides = [self._side(side, self.k + 1) for side in SIDES]
        precision, recall = precision_recall(sides[0], sides[1], self.k)
        return {"precision": precision, "recall": recall}


class DensityCoverage(_Neighbours):
    """Density: how often generated pictures lie among reference ones? Coverage: of how many?

    Args:
        features: the feature network; None takes `shipped_features`.
        k: neighbours that a ball reaches to.

    Raises:
        ConfigurationError: `k` below 1, or features that are no `FeatureNetwork`.

    Reference:
        Naeem et al., Reliable fidelity and diversity metrics for generative models, 2020,
        arXiv 2002.09797.
    """

    def __init__(self, features: FeatureNetwork | None = None, k: int = 5, **kwargs: Any) -> None:
        super().__init__(features, k, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Return ``density``, at least 0, and ``coverage`` in [0, 1].

        Raises:
            DataError: no more than k reference pictures, or no others.
        """
        reference, other = self._side("reference", self.k + 1), self._side("other", 1)
        density, coverage = density_coverage(reference, other, self.k)
        return {"density": density, "coverage": coverage}


class PairwiseDiversity(_Features):
    """Mean distance of the features of two different pictures.

    Args:
        features: the feature network; None takes `shipped_features`.

    Raises:
        ConfigurationError: features that are no `FeatureNetwork`.
    """

    def __init__(self, features: FeatureNetwork | None = None, **kwargs: Any) -> None:
        super().__init__(features, **kwargs)

    def update(self, images: Tensor) -> None:
        """Add (B, 3, H, W) images in [0, 1]."""
        self._add(images, "other")

    def compute(self) -> Tensor:
        """Return the mean distance.

        Raises:
            DataError: fewer than two pictures.
        """
        return pairwise_diversity(self._side("other", 2))
