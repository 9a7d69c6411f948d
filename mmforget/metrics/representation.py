"""What a model knows inside: similarity of features, and how well neighbours tell the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.shape import procrustes_disparity
from torchmetrics.utilities import dim_zero_cat

MIN_BATCH = 4
"""The unbiased estimator needs at least four samples; a smaller last batch is left out."""


def linear_cka_biased(x: Tensor, y: Tensor) -> float:
    """Full-batch linear CKA, in [0, 1]; biased upwards unless there are far more samples than d.

    Args:
        x: (N, d) features of one model.
        y: (N, e) features of the other model on the same samples in the same order.

    Reference:
        Kornblith et al., Similarity of neural network representations revisited, 2019,
        arXiv 1905.00414.
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


class _Gram:
    """Gram matrix without diagonal, and the sums that HSIC and its leave-one-out values need."""

    def __init__(self, x: Tensor) -> None:
        # centring changes nothing in exact arithmetic, but avoids cancellation of large means
        x = x.double() - x.double().mean(0)
        self.matrix = x @ x.T
        self.matrix.fill_diagonal_(0.0)
        self.rows = self.matrix.sum(1)
        self.total = self.rows.sum()


def _hsic(k: _Gram, other: _Gram) -> Tensor:
    size = len(k.rows)
    trace, chain = (k.matrix * other.matrix).sum(), k.rows @ other.rows
    return _hsic_from_sums(trace, k.total * other.total, chain, size)


def _hsic_from_sums(trace: Tensor, totals: Tensor, chain: Tensor, size: int) -> Tensor:
    b = size
    value = trace + totals / ((b - 1) * (b - 2)) - 2 / (b - 2) * chain
    return value / (b * (b - 3))


def _hsic_without_each(k: _Gram, other: _Gram) -> Tensor:
    """(b,) values of `_hsic` with one sample left out, by removing its terms from the sums."""
    product = (k.matrix * other.matrix).sum(1)
    trace = product.sum() - 2 * product
    totals = (k.total - 2 * k.rows) * (other.total - 2 * other.rows)
    chain = (
        k.rows @ other.rows
        - k.rows * other.rows
        - k.matrix @ other.rows
        - other.matrix @ k.rows
        + product
    )
    return _hsic_from_sums(trace, totals, chain, len(k.rows) - 1)


def linear_cka(x: Tensor, y: Tensor, batch_size: int = 256) -> tuple[float, float]:
    """Unbiased minibatch linear CKA: sums of HSIC over batches, divided once at the end.

    Args:
        x: (N, d) features of one model; N >= 4. The order decides which samples share a batch, so
            it should not be sorted by class.
        y: (N, e) features of the other model on the same samples in the same order.
        batch_size: >= 5; a last batch of fewer than four samples is left out.

    Returns:
        The value (about 0 for unrelated features, 1 for equal up to rotation and scale; can be
        slightly negative and is not clipped) and its jackknife standard error over samples.

    Raises:
        ValueError: fewer than five samples, or unequal numbers.

    Reference:
        Nguyen et al., Do wide and deep networks learn the same things?, 2021, arXiv 2010.15327;
        Song et al., Feature selection via dependence maximization, 2012.
    """
    if len(x) != len(y) or len(x) <= MIN_BATCH:
        raise ValueError(f"CKA needs the same samples, at least 5; got {len(x)} and {len(y)}")
    sums = torch.zeros(3, dtype=torch.float64)
    changes = []
    for part_x, part_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
        if len(part_x) <= MIN_BATCH:
            continue  # leaving one out must still leave four
        k, m = _Gram(part_x.cpu()), _Gram(part_y.cpu())
        full = torch.stack([_hsic(k, m), _hsic(k, k), _hsic(m, m)])
        without = torch.stack([_hsic_without_each(a, b) for a, b in ((k, m), (k, k), (m, m))])
        sums += full
        changes.append(without - full[:, None])
    left_out = sums[:, None] + torch.cat(changes, dim=1)
    values = left_out[0] / (left_out[1] * left_out[2]).sqrt()
    n = len(values)
    error = ((n - 1) / n * (values - values.mean()).square().sum()).sqrt()
    return float(sums[0] / (sums[1] * sums[2]).sqrt()), float(error)


def procrustes(x: Tensor, y: Tensor) -> float:
    """Disparity after the best rotation and scaling: 0 the same shape, 1 unrelated.

    Args:
        x: (N, d) features.
        y: (N, d) features of the same samples; the same d.
    """
    found = procrustes_disparity(x.double()[None], y.double()[None])
    assert isinstance(found, Tensor)  # more only if it is asked for
    return float(found)


def knn_predict(
    gallery: Tensor, labels: Tensor, query: Tensor, num_classes: int, k: int = 5, chunk: int = 4096
) -> Tensor:
    """Class of each query by majority among its k nearest neighbours in cosine similarity.

    Ties go to the class with the larger summed similarity.

    Args:
        gallery: (N, d) features with known labels.
        labels: (N,) classes of the gallery.
        query: (M, d) features.
        num_classes: C.
        k: neighbours; at most N are used.
        chunk: queries per matrix product, bounds the memory.

    Returns:
        (M,) predicted classes.
    """
    known = F.normalize(gallery.float(), dim=1)
    predicted = []
    for part in F.normalize(query.float(), dim=1).split(chunk):
        similarity, index = (part @ known.T).topk(min(k, len(known)), dim=1)
        # a similarity is in [-1, 1], so a share below 1 / (2k) can never outweigh a whole vote
        votes = 1.0 + similarity.double() / (4 * k)
        counts = torch.zeros(len(part), num_classes, dtype=torch.float64, device=part.device)
        predicted.append(counts.scatter_add_(1, labels[index], votes).argmax(1))
    return torch.cat(predicted)


class LinearCKA(Metric):
    """Unbiased minibatch linear CKA: each `update` is one batch of at least four samples."""

    full_state_update = False
    higher_is_better = None
    hsic: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hsic", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add (b, d) and (b, e) features of the same samples; fewer than four are left out."""
        if len(x) >= MIN_BATCH:
            k, m = _Gram(x), _Gram(y)
            self.hsic += torch.stack([_hsic(k, m), _hsic(k, k), _hsic(m, m)])

    def compute(self) -> Tensor:
        """Return CKA; NaN without a batch."""
        return self.hsic[0] / (self.hsic[1] * self.hsic[2]).sqrt()


class KNNAccuracy(Metric):
    """Accuracy of the k nearest neighbours in cosine similarity.

    Args:
        num_classes: C.
        k: neighbours.
    """

    full_state_update = False
    higher_is_better = None
    gallery: list[Tensor]
    gallery_labels: list[Tensor]
    query: list[Tensor]
    query_labels: list[Tensor]

    def __init__(self, num_classes: int, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.k = num_classes, k
        for name in ("gallery", "gallery_labels", "query", "query_labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor, known: Tensor) -> None:
        """Add (N, d) features, (N,) labels and (N,) bool: gallery or query."""
        self.gallery.append(features[known])
        self.gallery_labels.append(labels[known])
        self.query.append(features[~known])
        self.query_labels.append(labels[~known])

    def compute(self) -> Tensor:
        """Return the accuracy on the queries."""
        predicted = knn_predict(
            dim_zero_cat(self.gallery),
            dim_zero_cat(self.gallery_labels),
            dim_zero_cat(self.query),
            self.num_classes,
            self.k,
        )
        return (predicted == dim_zero_cat(self.query_labels)).double().mean()
