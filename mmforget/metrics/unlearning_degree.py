"""Degree of unlearning: how far a generator has come from drawing a concept to not drawing it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import DataError
from mmforget.models.base import Latents, frozen

SMALLEST_EDIT = 0.05
"""Below this distance between scores with and without the concept, nothing can be said."""

AT_A_TIME = 128


@dataclass(frozen=True)
class UnlearningDegree:
    """A degree, and what it was computed from.

    Attributes:
        value: 0: nothing has changed; 1: what showed the concept now scores like what never did;
            above 1: it scores lower still, so that too much was removed; below 0: the concept has
            become stronger. None if it is undefined.
        moved: Wasserstein distance of the scores before and after, in [0, 1].
        possible: Wasserstein distance of the scores with and without the concept, in [0, 1].
        before: mean score of the original where it shows the concept.
        without: mean score of the original where it does not.
        after: mean score of the tuned generator in place of `before`.
        reason: why `value` is None; otherwise empty.
    """

    value: float | None
    moved: float
    possible: float
    before: float
    without: float
    after: float
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def unlearning_degree(
    before: Tensor, without: Tensor, after: Tensor, smallest: float = SMALLEST_EDIT
) -> UnlearningDegree:
    r"""Compare three sets of scores of a judge.

    With W the Wasserstein-1 distance, the degree is
    :math:`\mathrm{sign}(\bar A - \bar C)\, W(A, C) / W(A, B)` for scores A before, B without the
    concept and C after. Never read it without the rate at which a judge sees the concept. The
    definition is our reconstruction of what is known of the paper.

    For edits, A are edited latents in the original generator, B the same without the edit, C edited
    ones in the tuned generator. For native pictures, A are latents of the original that show the
    concept, B those that do not, C the first again in the tuned generator.

    Args:
        before: (N,) scores in [0, 1], such as the probability of the concept.
        without: (M,) scores.
        after: (K,) scores.
        smallest: W(A, B) below which the degree is undefined.

    Raises:
        DataError: scores that are none, not finite, or outside of [0, 1].

    Reference:
        Prompting forgetting: unlearning in GANs via textual guidance, 2025, arXiv 2504.01218.
    """
    from scipy.stats import wasserstein_distance

    columns = {"before": before, "without": without, "after": after}
    found = {}
    for name, column in columns.items():
        values = column.detach().double().cpu()
        if values.ndim != 1 or not len(values):
            raise DataError(
                f"`{name}` has shape {tuple(values.shape)}; give one score for each of at least "
                "one picture"
            )
        if not (values.isfinite().all() and values.min() >= 0 and values.max() <= 1):
            raise DataError(
                f"`{name}` has scores from {float(values.min()):g} to {float(values.max()):g}; "
                "they must be probabilities in [0, 1]"
            )
        found[name] = values
    a, b, c = (values.numpy() for values in found.values())
    moved, possible = float(wasserstein_distance(a, c)), float(wasserstein_distance(a, b))
    value, reason = None, ""
    if possible < smallest:
        reason = (
            f"with and without the concept, scores differ by {possible:.3f} only (below "
            f"{smallest:g}), so the edit did not work or the judge cannot see it"
        )
    else:
        value = math.copysign(moved / possible, float(a.mean() - c.mean())) if moved else 0.0
    return UnlearningDegree(
        value, moved, possible, float(a.mean()), float(b.mean()), float(c.mean()), reason
    )


def degree_of_edits(
    original: Any,
    unlearned: Any,
    edit: Callable[[Latents], Latents],
    score: Callable[[Tensor], Tensor],
    latents: Latents,
) -> UnlearningDegree:
    """Degree on edited pictures; blind to what a generator draws without any edit.

    Args:
        original: generator before.
        unlearned: generator after.
        edit: a `LatentMapper` that was trained on the original, for example.
        score: images (B, 3, H, W) in [0, 1] to (B,) scores in [0, 1]; by a judge that did not
            guide.
        latents: what to edit, in the space of the edit.
    """
    with torch.no_grad():
        edited = edit(latents)
    return unlearning_degree(
        scores(original, edited, score),
        scores(original, latents, score),
        scores(unlearned, edited, score),
    )


def degree_of_natives(
    original: Any,
    unlearned: Any,
    score: Callable[[Tensor], Tensor],
    latents: Latents,
    bearing: Tensor,
) -> UnlearningDegree:
    """Degree on pictures that the original draws by itself.

    Args:
        original: generator before.
        unlearned: generator after.
        score: see `degree_of_edits`.
        latents: n latents.
        bearing: (n,) bool, the original shows the concept there.

    Raises:
        DataError: the concept is nowhere, or everywhere.
    """
    rows = bearing.cpu()
    if rows.all() or not rows.any():
        raise DataError(
            f"the original shows the concept for {int(rows.sum())} of {len(rows)} latents; the "
            "degree needs some with it and some without"
        )
    before = scores(original, latents, score)
    return unlearning_degree(before[rows], before[~rows], scores(unlearned, latents[rows], score))


@torch.no_grad()
def scores(model: Any, latents: Latents, score: Callable[[Tensor], Tensor]) -> Tensor:
    """(n,) scores of what a generator draws from latents, on the CPU."""
    with frozen(model):
        parts = [
            score(model.synthesise(latents[start : start + AT_A_TIME]).clamp(0, 1)).cpu()
            for start in range(0, len(latents), AT_A_TIME)
        ]
    return torch.cat(parts) if parts else torch.zeros(0)
