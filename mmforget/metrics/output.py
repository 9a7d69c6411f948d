"""What a model answers: distances between the outputs of two models, and accuracy per class.

Functions take cached logits and return one value per sample, so that intervals can be made from
them; the `torchmetrics.Metric` classes only add them up over batches and processes. Accuracy,
confusion matrix and calibration error come from torchmetrics. Its JensenShannonDivergence and
KLDivergence return means only, and the audit needs the per-sample values for its intervals.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_confusion_matrix

LN2 = math.log(2.0)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax in float64. Shape: (N, C) to (N, C)."""
    return logits.double().softmax(-1)


def js_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence per sample, in nats, in [0, ln 2]; symmetric.

    Computed as the entropy of the mean minus the mean of the entropies, which needs no logarithm of
    a zero probability.

    Args:
        first: (N, C) logits of one model.
        second: (N, C) logits of the other model on the same samples.

    Returns:
        (N,) float64.

    Reference:
        Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    p, q = probabilities(first), probabilities(second)
    mixed = torch.special.entr((p + q) / 2).sum(-1)
    own = (torch.special.entr(p) + torch.special.entr(q)).sum(-1) / 2
    return (mixed - own).clamp(0.0, LN2)


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || model) per sample, in nats, >= 0. Shape: two times (N, C) to (N,)."""
    log_p, log_r = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return F.kl_div(log_p, log_r, reduction="none", log_target=True).sum(-1)


def activation_distance(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of the class probabilities per sample, in [0, sqrt 2].

    The metric is the mean of these norms. Shape: two times (N, C) to (N,).

    Reference:
        Golatkar et al., Mixed-privacy forgetting in deep networks, 2021, arXiv 2012.13431.
    """
    return (probabilities(first) - probabilities(second)).norm(dim=-1)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """1 where both models predict the same class, else 0. Shape: two times (N, C) to (N,)."""
    return (first.argmax(-1) == second.argmax(-1)).double()


def zrf(logits: Tensor, random_init: Tensor) -> Tensor:
    """Zero retrain forgetting per sample: 1 - JS(model, randomly initialised model) / ln 2.

    A good value is that of a retrained model, not a high one: a destroyed model comes close to 1.
    Published numbers come from another formula (reversed KL, averaged over classes too) and cannot
    be compared.

    Args:
        logits: (N, C) logits of the model.
        random_init: (N, C) logits of a network with freshly drawn weights.

    Returns:
        (N,) float64 in [0, 1].

    Reference:
        Chundawat et al., Can bad teaching induce forgetting?, 2023, arXiv 2205.08096.
    """
    return 1.0 - js_divergence(logits, random_init) / LN2


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of each class; NaN for a class without samples. Shape: (N, C), (N,) to (C,)."""
    counts = multiclass_confusion_matrix(logits.argmax(-1), labels, logits.shape[-1])
    return _diagonal_share(counts)


def _diagonal_share(counts: Tensor) -> Tensor:
    # 0 / 0 is NaN by intention: a class without samples has no accuracy
    return counts.diagonal().double() / counts.sum(1).double()


class _SampleMean(Metric):
    """Mean over all samples of a per-sample distance between two models."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def per_sample(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the (N,) values that are averaged."""

    def update(self, logits: Tensor, reference: Tensor) -> None:
        """Add the (N, C) logits of the model and of the reference on the same samples."""
        values = self.per_sample(logits, reference)
        self.total += values.sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Return the mean; NaN without samples."""
        return self.total / self.count


class JSDivergence(_SampleMean):
    """Mean `js_divergence` to a reference model, in nats."""

    higher_is_better = False

    def per_sample(self, logits: Tensor, reference: Tensor) -> Tensor:
        """See `js_divergence`."""
        return js_divergence(logits, reference)


class KLFromReference(_SampleMean):
    """Mean `kl_divergence`, KL(reference || model), in nats."""

    higher_is_better = False

    def per_sample(self, logits: Tensor, reference: Tensor) -> Tensor:
        """See `kl_divergence`."""
        return kl_divergence(logits, reference)


class ActivationDistance(_SampleMean):
    """Mean `activation_distance` to a reference model."""

    higher_is_better = False

    def per_sample(self, logits: Tensor, reference: Tensor) -> Tensor:
        """See `activation_distance`."""
        return activation_distance(logits, reference)


class Agreement(_SampleMean):
    """Share of samples on which the model and the reference predict the same class."""

    higher_is_better = True

    def per_sample(self, logits: Tensor, reference: Tensor) -> Tensor:
        """See `agreement`."""
        return agreement(logits, reference)


class ZRF(_SampleMean):
    """Mean `zrf`; the reference is a randomly initialised network. Neither high nor low is good."""

    higher_is_better = None

    def per_sample(self, logits: Tensor, reference: Tensor) -> Tensor:
        """See `zrf`."""
        return zrf(logits, reference)


class ClassAccuracy(MulticlassConfusionMatrix):
    """Accuracy of each class; unlike torchmetrics' average=None, NaN (not 0) without samples."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the (C,) accuracies."""
        return _diagonal_share(self.confmat)
