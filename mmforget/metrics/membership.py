"""Membership scores and the rank AUC: can somebody tell that a sample was used in training?

A score is larger for samples that look more like members. All are computed in float64, since the
differences between confident samples vanish in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def neg_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative cross-entropy. Shape: (N, C), (N,) to (N,)."""
    return -F.cross_entropy(logits.double(), labels, reduction="none")


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the label. Shape: (N, C), (N,) to (N,)."""
    return neg_loss(logits, labels).exp()


def scaled_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin log p_y - log(1 - p_y), which equals z_y - logsumexp over the other logits.

    Roughly normal over samples, where the confidence is not.

    Reference:
        Carlini et al., Membership inference attacks from first principles, 2022, arXiv 2112.03570.
    """
    z = logits.double()
    own = z.gather(1, labels[:, None]).squeeze(1)
    return own - z.scatter(1, labels[:, None], -torch.inf).logsumexp(1)


def neg_entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Negative entropy of the prediction, in [-ln C, 0]; does not need labels."""
    return -torch.special.entr(logits.double().softmax(1)).sum(1)


def neg_modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(1 - p_y) log p_y + sum over j != y of p_j log(1 - p_j), at most 0.

    Reference:
        Song and Mittal, Systematic evaluation of privacy risks of machine learning models, 2021,
        arXiv 2003.10595.
    """
    z = logits.double()
    log_p = z.log_softmax(1)
    p = log_p.exp()
    # 1 - p of the top class is taken from the other logits: it may be far below the precision of p
    top = z.argmax(1, keepdim=True)
    rest_of_top = z.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    log_rest = torch.log1p(-p.scatter(1, top, 0.0)).scatter(
        1, top, rest_of_top - z.logsumexp(1, keepdim=True)
    )
    chosen = labels[:, None]
    wrong = (p * log_rest).scatter(1, chosen, 0.0).sum(1)
    own = (log_rest.gather(1, chosen).exp() * log_p.gather(1, chosen)).squeeze(1)
    return own + wrong


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the label is predicted, else 0. Shape: (N, C), (N,) to (N,)."""
    return (logits.argmax(1) == labels).double()


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled_confidence": scaled_confidence,
    "neg_loss": neg_loss,
    "confidence": confidence,
    "neg_entropy": neg_entropy,
    "neg_modified_entropy": neg_modified_entropy,
    "correct": correct,
}
"""All scores by name; the first is the default."""


def rank_auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Probability that a member scores higher than a non-member, ties counted half (mid-ranks).

    Not torchmetrics' AUROC: that one squeezes scores outside [0, 1] through a float32 sigmoid,
    which ties all confident samples.

    Args:
        members: (..., n) scores.
        others: (..., m) scores; leading axes are replicates.

    Returns:
        (...) values in [0, 1].
    """
    from scipy.stats import rankdata

    n, m = members.shape[-1], others.shape[-1]
    ranks = rankdata(np.concatenate([members, others], axis=-1), axis=-1)[..., :n]
    return (ranks.sum(-1) - n * (n + 1) / 2) / (n * m)


class MembershipAUC(Metric):
    """Rank AUC of members against non-members over all batches and processes.

    A good value is that of a retrained model. Below 0.5 is a failure too (over-forgetting).
    """

    full_state_update = False
    higher_is_better = None
    members: list[Tensor]
    others: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("members", [], dist_reduce_fx="cat")
        self.add_state("others", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, member: Tensor) -> None:
        """Add (N,) scores and (N,) bool membership."""
        self.members.append(scores[member].double())
        self.others.append(scores[~member].double())

    def compute(self) -> Tensor:
        """Return the AUC."""
        members, others = dim_zero_cat(self.members), dim_zero_cat(self.others)
        return torch.as_tensor(rank_auc(members.cpu().numpy(), others.cpu().numpy()))
