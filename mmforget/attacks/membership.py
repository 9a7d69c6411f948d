"""Population membership attacks: was this data used in training?

Level 1 only: they attack the population, not single samples, and understate what an attacker can
learn about one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmforget.seeds import generator

TESTABLE_AUC = 0.55
"""Below this AUC of members of the original model nothing was memorised that could be forgotten."""

MIN_OTHERS = 1000
"""Fewer non-members cannot resolve a false-positive rate of 1 % or less."""


def label_matched(
    labels: np.ndarray, other_labels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw equally many members and non-members of every label.

    Without this an attack on a forgotten class learns the label, not the membership.

    Args:
        labels: (n,) labels of the members.
        other_labels: (m,) labels of the non-members.
        seed: base seed of the draw.

    Returns:
        Positions among the members and among the non-members, equally many.
    """
    own: list[np.ndarray] = []
    other: list[np.ndarray] = []
    for label in np.unique(labels):
        members, others = np.flatnonzero(labels == label), np.flatnonzero(other_labels == label)
        count = min(len(members), len(others))
        for found, kept, name in ((members, own, "members"), (others, other, "others")):
            chance = generator(seed, f"membership-{name}", int(label))
            kept.append(
                np.sort(found[torch.randperm(len(found), generator=chance)[:count].numpy()])
            )
    return np.concatenate(own), np.concatenate(other)


def true_positives(members: np.ndarray, others: np.ndarray, rate: float) -> int:
    """Number of members above the threshold that lets at most a share `rate` of others pass.

    Args:
        members: (n,) scores.
        others: (m,) scores, at least `MIN_OTHERS`.
        rate: false-positive rate in (0, 1).

    Raises:
        ValueError: too few non-members for the rate to mean anything.
    """
    if len(others) < MIN_OTHERS:
        raise ValueError(f"needs at least {MIN_OTHERS} non-members, got {len(others)}")
    allowed = int(rate * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return int((members > threshold).sum())


@dataclass(frozen=True)
class Transfer:
    """Predicted membership probabilities of a transferred attack.

    Attributes:
        forget: (n,) of the forget set.
        others: (m,) of samples that were never trained on; their mean must be near that of
            non-members, else the attack says nothing.
    """

    forget: np.ndarray
    others: np.ndarray


def transfer(
    members: np.ndarray, others: np.ndarray, forget: np.ndarray, held_out: np.ndarray
) -> Transfer:
    """Fit "member or not" on one score, then apply it to samples that the fit has not seen.

    A one-dimensional logistic regression on the standardised score, both sides weighted equally.

    Args:
        members: (a,) scores of retained training samples.
        others: (b,) scores of T_attack.
        forget: (n,) scores of the forget set.
        held_out: (m,) scores of T_eval.
    """
    from sklearn.linear_model import LogisticRegression

    known = np.concatenate([members, others])
    mean, scale = known.mean(), max(float(known.std()), 1e-12)
    labels = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    model = LogisticRegression(class_weight="balanced")
    model.fit(((known - mean) / scale)[:, None], labels)

    def predict(scores: np.ndarray) -> np.ndarray:
        return model.predict_proba(((scores - mean) / scale)[:, None])[:, 1]

    return Transfer(predict(forget), predict(held_out))
