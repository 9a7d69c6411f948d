"""How well a score tells memorized prompts from ordinary ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import DataError
from mmforget.metrics.membership import rank_auc

LEVELS = {1: 100, 3: 34}
"""False-positive rates in percent, each with the number of ordinary prompts from which on it can be
told from 0."""


def detection_scores(
    memorized: Tensor | Sequence[float],
    ordinary: Tensor | Sequence[float],
    higher_is_memorized: bool = True,
) -> dict[str, Any]:
    """Compare the scores of memorized prompts with those of ordinary ones.

    Args:
        memorized: (M,) scores of prompts that are known to be memorized.
        ordinary: (N,) scores of prompts that are known not to be.
        higher_is_memorized: the direction of the score.

    Returns:
        ``auc``; ``tpr_at_1_percent`` and ``tpr_at_3_percent``: the largest true-positive rate whose
        false-positive rate is not above the level, None where so few ordinary prompts cannot
        resolve it; ``balanced_accuracy``: the best one, at ``threshold``, the outermost score that
        is still called memorized, None if calling nothing memorized is best; ``memorized`` and
        ``ordinary``: how many; ``notes``: why a number is missing.

    Raises:
        DataError: no scores of one kind, or some that are not finite.
    """
    from torchmetrics.functional.classification import binary_roc

    found = [torch.as_tensor(part, dtype=torch.float64).cpu() for part in (memorized, ordinary)]
    for name, part in zip(("memorized", "ordinary"), found, strict=True):
        if part.ndim != 1 or not len(part) or not bool(part.isfinite().all()):
            raise DataError(
                f"the scores of {name} prompts have shape {tuple(part.shape)}"
                f"{'' if bool(part.isfinite().all()) else ' and are not all finite'}; give at "
                "least one finite number"
            )
    members, others = (part if higher_is_memorized else -part for part in found)
    labels = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).long()
    # torchmetrics takes scores outside [0, 1] for logits and squeezes them; ranks keep the order.
    levels, rank = torch.cat([members, others]).unique(return_inverse=True)
    false, true, _ = binary_roc((rank + 1).double() / (len(levels) + 1), labels)
    # It returns rates in single precision; their counts are exact.
    alarms, hits = (false * len(others)).round(), (true * len(members)).round()
    result: dict[str, Any] = {"auc": float(rank_auc(members.numpy(), others.numpy()))}
    notes = []
    for percent, needed in LEVELS.items():
        key = f"tpr_at_{percent}_percent"
        result[key] = None
        if len(others) >= needed:
            allowed = percent * len(others) // 100
            result[key] = int(hits[alarms <= allowed].max()) / len(members)
        else:
            notes.append(
                f"a false-positive rate of {percent} % needs {needed} ordinary prompts, there are "
                f"{len(others)}"
            )
    balanced = (hits.double() / len(members) + 1 - alarms.double() / len(others)) / 2
    best = int(balanced.argmax())
    # The curve starts with nothing called memorized and takes in one level of scores at a time.
    limit = math.inf if best == 0 else float(levels[len(levels) - best])
    threshold = limit if higher_is_memorized else -limit
    return result | {
        "balanced_accuracy": float(balanced[best]),
        "threshold": threshold if math.isfinite(threshold) else None,
        "memorized": len(members),
        "ordinary": len(others),
        "notes": notes,
    }
