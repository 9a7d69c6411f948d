"""How surely a model gives answers in words, compared with wrong answers and with retraining.

Pure functions on cached tensors. A loss here is that of one answer per token, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.metrics.rates import Scores

IGNORED = -100
MeanKind = Literal["probability", "loss"]


def answer_probability(total: Tensor, tokens: Tensor) -> Tensor:
    """``exp(-total / tokens)``: the geometric mean of the probabilities of an answer's tokens.

    Args:
        total: (N,) ``-log p`` summed over the tokens of each answer.
        tokens: (N,) number of tokens.

    Returns:
        (N,) float64 in [0, 1]; NaN for an answer without tokens, which `scored` leaves out.
    """
    return torch.exp(-total.double() / tokens.double())


def truth_ratio(wrong: Tensor, right: Tensor, mean: MeanKind = "probability") -> Tensor:
    """How much likelier wrong answers are than a right one: 0 for a model that knows, about 1 else.

    ``R = mean_i exp(-loss(wrong_i)) / exp(-loss(right))`` per sample. Code of CLEAR averages the
    losses over the whole set before the ratio, so that few samples decide.

    Args:
        wrong: (N, K) losses per token of K wrong answers.
        right: (N,) losses per token of the right answer, reworded.
        mean: ``probability`` as above; ``loss`` takes the exponential of the mean loss.

    Returns:
        (N,) float64, not negative.

    Raises:
        ConfigurationError: an unknown mean.
        DataError: shapes that do not fit, or no wrong answer.

    Reference:
        Maini et al., TOFU: A task of fictitious unlearning for LLMs, 2024, arXiv 2401.06121.
    """
    if mean not in get_args(MeanKind):
        raise ConfigurationError(f"`mean` is '{mean}', {suggest(mean, get_args(MeanKind))}")
    if wrong.ndim != 2 or len(wrong) != len(right) or not wrong.shape[1]:
        raise DataError(
            f"losses of wrong answers have the shape {tuple(wrong.shape)} and those of right ones "
            f"{tuple(right.shape)}; give (N, K) with K at least 1, and (N,)"
        )
    own = wrong.double()
    if mean == "loss":
        log_wrong = -own.mean(dim=1)
    else:
        log_wrong = torch.logsumexp(-own, dim=1) - torch.tensor(own.shape[1]).double().log()
    return torch.exp(log_wrong + right.double())


def forget_truth(ratio: Tensor) -> Tensor:
    """``min(R, 1/R)`` per sample, in [0, 1]: 1 where right and wrong are equally likely."""
    return torch.minimum(ratio, 1 / ratio)


def retain_truth(ratio: Tensor) -> Tensor:
    """``max(0, 1 - R)`` per sample, in [0, 1]: 1 where only the right answer is likely."""
    return (1 - ratio).clamp(min=0)


class ForgetQuality(NamedTuple):
    """Two-sample Kolmogorov-Smirnov test of truth ratios.

    Attributes:
        p_value: probability of such a distance if both models had the same distribution; large is
            good.
        distance: largest difference of the two distribution functions, in [0, 1].
        n: samples of the unlearned and of the retrained model.
    """

    p_value: float
    distance: float
    n: tuple[int, int]


def forget_quality(ratio: Tensor, retrained: Tensor | None) -> ForgetQuality | None:
    """Can the truth ratios of a model be told from those of a retrained model?

    A test that finds no difference is no proof of equality: with few samples the p-value is large
    whatever the model does. Report `ForgetQuality.distance` and n beside it.

    Args:
        ratio: (N,) truth ratios of the unlearned model on the forget set.
        retrained: (M,) those of the retrained model; None if there is none.

    Returns:
        None without retrained model or without samples on one side.

    Reference:
        Maini et al., TOFU, 2024, arXiv 2401.06121.
    """
    if retrained is None:
        return None
    own, other = (values[~values.isnan()].double().cpu().numpy() for values in (ratio, retrained))
    if not len(own) or not len(other):
        return None
    from scipy.stats import ks_2samp

    found = ks_2samp(own, other)
    return ForgetQuality(float(found.pvalue), float(found.statistic), (len(own), len(other)))


def exact_memorization(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of an answer's tokens that are the most likely ones, given those before.

    Args:
        logits: (B, K, V) scores that predict `labels`, place by place.
        labels: (B, K) token ids, -100 where nothing is labelled.

    Returns:
        (B,) float64 in [0, 1]; NaN for a row without labels.

    Reference:
        Tirumala et al., Memorization without overfitting, 2022, arXiv 2205.10770.
    """
    right, labelled = _hits(logits, labels)
    return right.sum(dim=1).double() / labelled.sum(dim=1).double()


def extraction_strength(logits: Tensor, labels: Tensor) -> Tensor:
    """``1 - k / n`` with k the shortest beginning of an answer after which all tokens are right.

    Each token is predicted from the true ones before it: an upper bound of what free generation
    would give back.

    Args:
        logits: (B, K, V) scores that predict `labels`, place by place.
        labels: (B, K) token ids, -100 where nothing is labelled.

    Returns:
        (B,) float64 in [0, 1]: 1 if all n tokens are right, 0 if the last one is wrong; NaN for a
        row without labels.

    Reference:
        Carlini et al., Extracting training data from large language models, 2021, arXiv 2012.07805.
    """
    right, labelled = _hits(logits, labels)
    # a place counts if no labelled place from it on is wrong
    wrong_after = (labelled & ~right).flip(1).cumsum(dim=1).flip(1)
    return (labelled & (wrong_after == 0)).sum(dim=1).double() / labelled.sum(dim=1).double()


def _hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[:2] != labels.shape:
        raise DataError(
            f"logits have the shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; give "
            "(B, K, V) and (B, K), the score of a place beside the token that it predicts"
        )
    labelled = labels != IGNORED
    return labelled & (logits.argmax(dim=-1) == labels), labelled


def scored(values: Tensor) -> Scores:
    """Per-sample values (N,) as `Scores`; NaN is a sample without score."""
    return Scores.of(None if value != value else value for value in values.double().tolist())


def model_utility(terms: Sequence[float | None]) -> float | None:
    """Harmonic mean of measures in [0, 1]; 0 if one of them is 0.

    Args:
        terms: such as accuracies, ROUGE and truth ratios on retained data.

    Returns:
        None without terms, or if one of them could not be measured.
    """
    known = [term for term in terms if term is not None]
    if not known or len(known) < len(terms):
        return None
    if any(term < 0 for term in known):
        raise DataError(f"a term of the utility is {min(known):g}; give measures in [0, 1]")
    return 0.0 if 0 in known else len(known) / sum(1 / term for term in known)
