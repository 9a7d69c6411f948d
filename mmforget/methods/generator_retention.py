"""How far a generator has moved from the original one, where it must not move."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from mmforget.errors import ConfigurationError, suggest
from mmforget.models.concept_guide import ConceptGuide

RetainDistance = Callable[[Tensor, Tensor], Tensor]
"""From pictures of the unlearned and of the original generator, both (B, 3, H, W) in [0, 1], to
(B,) distances."""


def pixel_distance(images: Tensor, kept: Tensor) -> Tensor:
    """Mean squared difference, of values in [-1, 1]. Shape: (B, 3, H, W) twice to (B,)."""
    return 4 * (images - kept).square().flatten(1).mean(1)


def embedding_distance(guide: ConceptGuide) -> RetainDistance:
    """Squared difference of the guide's embeddings, orthogonal to what is erased."""
    directions = guide.directions()

    def distance(images: Tensor, kept: Tensor) -> Tensor:
        change = guide.embed(images) - guide.embed(kept)
        # Several directions need not be orthogonal: remove their span.
        basis = directions.T.to(change)
        along = (change @ basis) @ (basis.T @ basis).pinverse() @ basis.T
        return (change - along).square().sum(1)

    return distance


DISTANCES: Mapping[str, Callable[[ConceptGuide], RetainDistance]] = {
    "pixel": lambda guide: pixel_distance,
    "embedding": embedding_distance,
}


def retain_distance(name: str, guide: ConceptGuide) -> RetainDistance:
    """Find a distance by its name.

    Args:
        name: ``pixel``, or ``embedding``: the guide's embedding without the erased directions.
        guide: for those that need one.

    Raises:
        ConfigurationError: there is no such distance.
    """
    if name not in DISTANCES:
        raise ConfigurationError(f"`retain` is '{name}', {suggest(name, DISTANCES)}")
    return DISTANCES[name](guide)
