"""Losses on answers as pure functions, one value per sample, and how they are averaged.

``nll`` is ``-log p(answer)``, the sum of the cross-entropy over the labelled tokens of an answer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.models.multimodal import AnswerLogits, AnswerLosses
from mmforget.models.multimodals.encoding import IGNORED

SequenceNorm = Literal["token", "sequence", "batch_token"]
"""How a mean over answers of different lengths is taken: of the mean per token of each answer, of
the sum over its tokens, or over all tokens of the batch, as transformers does."""


def ascent(losses: AnswerLosses, most: float | None = None) -> AnswerLosses:
    """The negated losses, in which an answer counts as unknown from a loss per token of `most` on.

    Args:
        losses: of the answers that are to be forgotten.
        most: bound in nats; such an answer has no gradient any more. None: no bound.

    Example:
        >>> losses = AnswerLosses(torch.tensor([2.0, 8.0]), torch.tensor([2, 2]))
        >>> ascent(losses, most=3.0).total
        tensor([-2., -6.])
    """
    total = losses.total if most is None else torch.minimum(losses.total, most * losses.tokens)
    return AnswerLosses(-total, losses.tokens)


def npo_loss(nll: Tensor, reference: Tensor, beta: float) -> Tensor:
    """``-(2 / beta) log sigmoid(beta (nll - reference))`` per sample.

    Args:
        nll: (B,) of the answers that are to be forgotten, under the model.
        reference: (B,) the same under the original model.
        beta: positive; towards 0 the gradient becomes that of gradient ascent.

    Returns:
        (B,) positive values; ``2 ln 2 / beta`` where the two are equal.
    """
    return 2 / beta * F.softplus(beta * (reference - nll))


def sim_npo_loss(mean_nll: Tensor, beta: float, delta: float) -> Tensor:
    """``-(2 / beta) log sigmoid(beta (mean_nll - delta))`` per sample.

    Args:
        mean_nll: (B,) loss per token of the answers that are to be forgotten.
        beta: positive.
        delta: loss per token that is aimed at.

    Returns:
        (B,) positive values.
    """
    return 2 / beta * F.softplus(beta * (delta - mean_nll))


def dpo_loss(
    preferred: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor], beta: float
) -> Tensor:
    """``-(2 / beta) log sigmoid(beta [r(preferred) - r(rejected)])``, ``r = reference - nll``.

    Args:
        preferred: (B,) nll of the answers to be given, such as refusals.
        rejected: (B,) nll of the answers that are to be forgotten.
        reference: both under the original model.
        beta: positive.

    Returns:
        (B,) positive values; ``2 ln 2 / beta`` for the original model.
    """
    gain = (reference[0] - preferred) - (reference[1] - rejected)
    return 2 / beta * F.softplus(-beta * gain)


def divergence(found: AnswerLogits, reference: AnswerLogits) -> AnswerLosses:
    """``KL(reference || found)`` over the vocabulary, summed over the labelled tokens.

    Public code averages it over every position instead, placeholders of pictures and padding
    included, so that its scale depends on the length of the questions.

    Args:
        found: of the model.
        reference: of the original model for the same answers, which may lie at other places.

    Returns:
        (B,) sums, at least 0 and exactly 0 for the same scores, and (B,) numbers of tokens.
    """
    each = F.kl_div(
        found.logits[found.labels != IGNORED].float().log_softmax(-1),
        reference.logits[reference.labels != IGNORED].float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return summed(each, found.labels)


def state_distance(states: Tensor, wanted: Tensor, labels: Tensor) -> AnswerLosses:
    """Squared distance of hidden states, averaged over their width, summed over labelled places.

    Args:
        states: (B, K, D).
        wanted: (T, D) for the T labelled places, row by row, or (D,) for all alike.
        labels: (B, K), -100 where nothing is labelled.

    Returns:
        (B,) sums and (B,) numbers of labelled places.
    """
    each = (states[labels != IGNORED].float() - wanted.float()).square().mean(-1)
    return summed(each, labels)


def summed(each: Tensor, labels: Tensor) -> AnswerLosses:
    """Values (T,) of the labelled places of (B, K) labels, row by row, summed over each row."""
    labelled = labels != IGNORED
    total = each.new_zeros(len(labels)).index_add(0, labelled.nonzero()[:, 0], each)
    return AnswerLosses(total, labelled.sum(1))
