"""Distances between two sets of pictures: Fréchet and kernel distance of their features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from mmforget.errors import ConfigurationError, DataError, ModelError
from mmforget.models.base import HasFeatures, Model, state_hash
from mmforget.seeds import generator

ROWS_AT_A_TIME = 1024
SIDES = ("reference", "other")


class FeatureNetwork:
    """What turns pictures into vectors, with a name and a fingerprint for the record.

    Distances of two feature networks cannot be compared, so every value is to be reported with
    `name` and `hash`. Inception-v3, of which the F in FID speaks, is not part of this library; give
    it as `network` for numbers that can be compared with published ones.

    Args:
        network: a model with `features`, a module that is called with pictures, or a function;
            images (B, 3, H, W) in [0, 1] to (B, d).
        name: for the record; None takes the name of the class or function.
        batch_size: pictures at a time.

    Attributes:
        hash: SHA-256 of the weights; None for a function, whose weights nobody sees.
    """

    def __init__(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        name: str | None = None,
        batch_size: int = 256,
    ) -> None:
        self.network, self.batch_size = network, batch_size
        self.name = name or getattr(network, "__name__", type(network).__name__)
        self.hash = state_hash(network) if isinstance(network, nn.Module) else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return (B, d) features in double precision on the CPU.

        Raises:
            ModelError: the network does not return one finite vector per picture.
        """
        found = torch.cat([self._of(part) for part in images.split(self.batch_size)])
        if found.ndim != 2 or len(found) != len(images):
            raise ModelError(
                f"the feature network '{self.name}' returned shape {tuple(found.shape)} for "
                f"{len(images)} pictures; it must return (B, d)"
            )
        if not found.isfinite().all():
            raise ModelError(
                f"the feature network '{self.name}' returned values that are not finite; check "
                "its weights and its preprocessing"
            )
        return found.double().cpu()

    def _of(self, images: Tensor) -> Tensor:
        if not isinstance(self.network, nn.Module):
            return self.network(images)
        network = self.network.eval()
        ready = images.to(next((p.device for p in network.parameters()), images.device))
        # torchvision networks have a module `features`, which takes no batches
        if isinstance(network, Model) and isinstance(network, HasFeatures):
            return network.features({"image": ready})
        return cast(Tensor, network(ready))

    def __repr__(self) -> str:
        """Name and beginning of the hash."""
        return f"FeatureNetwork('{self.name}', {self.hash[:12] if self.hash else 'no hash'})"


def shipped_features() -> FeatureNetwork:
    """Features of the digit-world judge, d = 96."""
    from mmforget.metrics.judge import load_judge

    return FeatureNetwork(load_judge().classifier, "digit_world judge")


def frechet_distance(
    mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> Tensor:
    """Squared Fréchet distance |m - n|^2 + tr(C + D - 2 (C D)^(1/2)) of two normal distributions.

    (C D)^(1/2) has the trace of the square root of the symmetric C^(1/2) D C^(1/2), which needs no
    complex numbers.

    Shape: (d,), (d, d), (d,), (d, d) to ().

    Reference:
        Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash
        equilibrium, 2017, arXiv 1706.08500.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    spread = covariance.trace() + other_covariance.trace() - 2 * shared
    return (mean - other_mean).square().sum() + spread


def kernel_distance(features: Tensor, other: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3.

    It is 0 on average for equal distributions, so single values can be negative.

    Shape: (N, d), (M, d) to (); N and M at least 2.

    Reference:
        Binkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401.
    """
    n, m = len(features), len(other)
    own = _kernel_sum(features, features) - _kernel(features.square().sum(1), features).sum()
    others = _kernel_sum(other, other) - _kernel(other.square().sum(1), other).sum()
    return own / (n * (n - 1)) + others / (m * (m - 1)) - 2 * _kernel_sum(features, other) / (n * m)


def _kernel(product: Tensor, like: Tensor) -> Tensor:
    return (product / like.shape[1] + 1) ** 3


def _kernel_sum(first: Tensor, second: Tensor) -> Tensor:
    parts = [_kernel(part @ second.T, first).sum() for part in first.split(ROWS_AT_A_TIME)]
    return torch.stack(parts).sum()


class FrechetDistance(Metric):
    """Fréchet distance of the features of reference pictures and others; FID with Inception-v3.

    Biased upwards in small samples: compare values of the same number of pictures only, and prefer
    `KernelDistance` below 5,000 pictures. torchmetrics' FID gives the same value; unlike it, this
    one takes no part of the owner's weights, keeps double precision, and knows a process without
    pictures.

    Args:
        features: the feature network; None takes `shipped_features`.

    Raises:
        ConfigurationError: the features are no `FeatureNetwork`.
    """

    full_state_update = False
    higher_is_better = False
    totals: Tensor
    products: Tensor
    counts: Tensor

    def __init__(self, features: FeatureNetwork | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.feature_network = _checked(features)
        self.size = _width(self.feature_network)
        d = self.size
        # Rows: reference pictures and others.
        self.add_state("totals", torch.zeros(2, d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(2, d, d, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, reference: bool) -> None:
        """Add (B, 3, H, W) images in [0, 1], to the reference pictures or to the others."""
        if len(images):
            found = self.feature_network(images).to(self.totals.device)
            row = 0 if reference else 1
            self.totals[row] += found.sum(0)
            self.products[row] += found.T @ found
            self.counts[row] += len(found)

    def compute(self) -> Tensor:
        """Return the distance, >= 0.

        Raises:
            DataError: fewer than two pictures on a side.
        """
        _check_counts("the Fréchet distance", self.counts.tolist(), 2)
        means = self.totals / self.counts[:, None]
        outer = means[:, :, None] * means[:, None, :] * self.counts[:, None, None]
        covariances = (self.products - outer) / (self.counts - 1)[:, None, None]
        return frechet_distance(means[0], covariances[0], means[1], covariances[1])


class KernelDistance(Metric):
    """Kernel distance of the features of reference pictures and others; KID with Inception-v3.

    By default of all pictures at once, which is what the mean over subsets estimates, without their
    sampling noise. With `subsets`, mean and standard deviation over random subsets as in the paper.
    Which pictures form a subset depends on their ids and the seed, on nothing else; torchmetrics'
    KID draws them from the global generator by position, so they change with the number of
    processes.

    Args:
        features: the feature network; None takes `shipped_features`.
        subsets: number of subsets; 0 takes all pictures.
        subset_size: pictures of each side per subset, at least 2.
        seed: of the subsets.

    Raises:
        ConfigurationError: a number out of range, or features that are no `FeatureNetwork`.
    """

    full_state_update = False
    higher_is_better = False
    reference_features: list[Tensor]
    other_features: list[Tensor]
    reference_ids: list[Tensor]
    other_ids: list[Tensor]

    def __init__(
        self,
        features: FeatureNetwork | None = None,
        subsets: int = 0,
        subset_size: int = 1000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if subsets < 0:
            raise ConfigurationError(f"`subsets` is {subsets}, it must not be negative")
        if subset_size < 2:
            raise ConfigurationError(f"`subset_size` is {subset_size}, it must be at least 2")
        self.feature_network = _checked(features)
        self.size = _width(self.feature_network)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        # torchmetrics stands in for a process without pictures by an empty vector of the metric's
        # own type, and what the others send must match: features are kept flat, ids as numbers.
        self.set_dtype(torch.float64)
        for side in SIDES:
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_ids", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, reference: bool, ids: Tensor | None = None) -> None:
        """Add (B, 3, H, W) images in [0, 1], to the reference pictures or to the others.

        Args:
            images: the pictures.
            reference: to which side they belong.
            ids: (B,) int64 below 2^53, different for the pictures of a side; needed for `subsets`
                only.

        Raises:
            DataError: ids are missing or are not as many as the pictures.
        """
        if self.subsets and (ids is None or ids.shape != (len(images),)):
            raise DataError(
                f"the kernel distance with `subsets` needs `ids` of shape ({len(images)},), got "
                f"{None if ids is None else tuple(ids.shape)}; number the pictures of each side"
            )
        if not len(images):
            return
        side = SIDES[0] if reference else SIDES[1]
        found = self.feature_network(images).to(self.device)
        getattr(self, f"{side}_features").append(found.flatten())
        if ids is not None:
            getattr(self, f"{side}_ids").append(ids.to(self.device, torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """Return ``distance``, and with `subsets` their standard deviation as ``spread``.

        Raises:
            DataError: too few pictures on a side, or ids that are not different.
        """
        found = [_joined(getattr(self, f"{side}_features")).view(-1, self.size) for side in SIDES]
        least = self.subset_size if self.subsets else 2
        _check_counts("the kernel distance", [len(part) for part in found], least)
        if not self.subsets:
            return {"distance": kernel_distance(*found)}
        for place, side in enumerate(SIDES):
            ids, order = _joined(getattr(self, f"{side}_ids")).sort()
            if (ids.diff() == 0).any():
                raise DataError(
                    "two pictures of one side have the same id; number them differently"
                )
            found[place] = found[place][order]
        values = []
        for number in range(self.subsets):
            chosen = [
                part[self._subset(len(part), number, side)]
                for part, side in zip(found, SIDES, strict=True)
            ]
            values.append(kernel_distance(*chosen))
        every = torch.stack(values)
        return {"distance": every.mean(), "spread": every.std(unbiased=False)}

    def _subset(self, count: int, number: int, side: str) -> Tensor:
        order = torch.randperm(count, generator=generator(self.seed, "kid", number, side))
        return order[: self.subset_size]


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    # A state is a list before processes exchange it, and a tensor afterwards.
    if isinstance(parts, list) and not parts:
        return torch.zeros(0, dtype=torch.float64)
    return dim_zero_cat(parts)


def _checked(features: FeatureNetwork | None) -> FeatureNetwork:
    if features is None:
        return shipped_features()
    if not isinstance(features, FeatureNetwork):
        raise ConfigurationError(
            f"`features` is a {type(features).__name__}; wrap it: FeatureNetwork(network, name)"
        )
    return features


def _width(features: FeatureNetwork) -> int:
    size = getattr(features.network, "num_features", None)
    return size if isinstance(size, int) else features(torch.full((1, 3, 32, 32), 0.5)).shape[1]


def _check_counts(what: str, counts: Sequence[int], least: int) -> None:
    for side, count in zip(SIDES, counts, strict=True):
        if count < least:
            raise DataError(
                f"{what} has seen {count} {side} pictures, it needs at least {least}; update it "
                f"with `reference={side == 'reference'}`"
            )
