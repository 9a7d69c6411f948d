"""Which latents of a generator show what is to be erased, and which show nothing of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmforget.data.latent_pool import LatentRecords
from mmforget.errors import RequestError
from mmforget.models.base import Latents
from mmforget.models.concept_guide import ConceptGuide

POOL_BATCH = 128
MIN_BEARING = 8
"""Fewer latents that show a concept are too few to train on."""

MOST_BEARING = 0.9
"""If more of the pictures show what is to be erased, there is nothing to keep."""


class SortedLatents(NamedTuple):
    """A pool of latents after sorting.

    Attributes:
        records: ``forget``, those that show a concept, and ``retain``, those that show none; each
            with its ``probability`` (n, K).
        prevalence: per target the share of the whole pool whose picture shows it (P > 0.5).
    """

    records: dict[str, LatentRecords]
    prevalence: dict[str, float]


@torch.no_grad()
def guide_probabilities(model: Any, guide: ConceptGuide, latents: Latents) -> Tensor:
    """Probabilities (n, K) of the guide's concepts in what a generator draws, on the CPU."""
    parts = [
        guide.probabilities(model.synthesise(latents[start : start + POOL_BATCH]))
        for start in range(0, len(latents), POOL_BATCH)
    ]
    return torch.cat(parts).cpu()


def sort_latents(
    model: Any, guide: ConceptGuide, latents: Latents, bearing: float, clear: float
) -> SortedLatents:
    """Sort latents by what a generator draws from them; those in between are left out.

    Args:
        model: the original generator.
        guide: knows the concepts.
        latents: the pool.
        bearing: probability above which a latent shows a concept.
        clear: probability below which it does not.

    Raises:
        RequestError: a concept that the generator hardly draws, or draws always, or too few
            latents that show none.
    """
    found = guide_probabilities(model, guide, latents)
    prevalence = {}
    for concept, column in zip(guide.concepts, found.T, strict=True):
        share = float((column > 0.5).double().mean())
        prevalence[concept.target] = share
        if int((column > bearing).sum()) < MIN_BEARING:
            raise RequestError(
                f"the guide sees “{concept.target}” in {100 * share:.2g} % of {len(latents)} "
                "pictures: the generator does not draw it, or the guide cannot see it; use a "
                "larger `pool`, other words or another guide"
            )
        if share > MOST_BEARING:
            raise RequestError(
                f"the guide sees “{concept.target}” in {100 * share:.0f} % of the pictures, so "
                "that there is nothing to keep; name something more particular"
            )
    is_clear = (found < clear).all(dim=1)
    shows = (found > bearing).any(dim=1)
    if int(is_clear.sum()) < MIN_BEARING:
        raise RequestError(
            f"only {int(is_clear.sum())} of {len(latents)} pictures show none of the concepts, "
            f"which are too few to keep; raise `clear` (now {clear:g}) or erase fewer"
        )
    records = {
        name: LatentRecords(latents[rows], rows.nonzero()[:, 0], {"probability": found[rows]})
        for name, rows in (("forget", shows), ("retain", is_clear))
    }
    return SortedLatents(records, prevalence)
