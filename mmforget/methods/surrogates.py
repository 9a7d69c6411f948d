"""Surrogates: pictures that a memorized prompt may show instead of the one it copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmforget.data.memorized import MemorizedSet
from mmforget.errors import DataError
from mmforget.methods.text_guided import at_least_one
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive

Similarity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""How alike are two pictures, row by row; see `mmforget.metrics.copying`."""


def make_surrogates(
    model: DiffusionGenerator,
    memorized: MemorizedSet,
    similarity: Similarity,
    *,
    count: int = 8,
    limit: float = 0.5,
    tries: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, Tensor]:
    """Draw pictures with the same meaning as the memorized ones, but with none of their pixels.

    A mitigated model draws the memorized prompts, and what still resembles a memorized picture of
    the prompt is left out.

    Args:
        model: one that copies less: pruned (`SubspacePruning`, `NeMo`), or otherwise repaired.
        memorized: prompts and pictures; prompts without pictures are skipped.
        similarity: see `mmforget.metrics.copying.load_similarity`.
        count: pictures wanted per memorized picture, at least 1.
        limit: similarity from which on a picture is left out.
        tries: how many times `count` pictures are drawn per prompt at most.
        seed: of the pictures.
        steps: of the sampler, by default the model's own.
        guidance: by default the model's own.

    Returns:
        Per name of a memorized picture (k, 3, H, W) in [0, 1], with k from 1 to `count`.

    Raises:
        ConfigurationError: a number below 1.
        DataError: all pictures of a prompt resemble a memorized one.
    """
    at_least_one(count=count, tries=tries)
    kept: dict[str, list[Tensor]] = {name: [] for one in memorized for name in one.images}
    if not kept:
        raise DataError(
            "no memorized prompt has a picture, so that copies cannot be told; add pictures"
        )
    for number in range(tries):
        open_prompts = [
            one for one in memorized if any(len(kept[name]) < count for name in one.images)
        ]
        if not open_prompts:
            break
        drawn = model.generate(
            [one.prompt for one in open_prompts],
            n=count,
            seed=derive(seed, "surrogates", number),
            steps=steps,
            guidance=guidance,
        ).unflatten(0, (len(open_prompts), count))
        for one, pictures in zip(open_prompts, drawn, strict=True):
            fresh = pictures[~_copied(pictures, one.images, memorized, similarity, limit)]
            for name in one.images:
                kept[name].extend(fresh[: count - len(kept[name])])
    for name, pictures in kept.items():
        if not pictures:
            raise DataError(
                f"all {tries * count} pictures drawn for '{name}' resemble it by {limit:g} or more;"
                " use a model that copies less (prune more, or mitigate the prompts), raise "
                "`limit`, or give surrogates of your own"
            )
    return {name: torch.stack(pictures) for name, pictures in kept.items()}


@torch.no_grad()
def _copied(
    pictures: Tensor,
    names: tuple[str, ...],
    memorized: MemorizedSet,
    similarity: Similarity,
    limit: float,
) -> Tensor:
    """(B,) bool: resembles one of the prompt's pictures."""
    found = torch.zeros(len(pictures), dtype=torch.bool)
    for name in names:
        references = memorized.images[name].expand_as(pictures)
        region = memorized.regions.get(name)
        regions = None if region is None else region.expand(len(pictures), -1, -1)
        found |= similarity(pictures, references, regions).cpu() >= limit
    return found


def ordinary_surrogates(
    memorized: MemorizedSet, count: int = 8, seed: int = 0
) -> dict[str, Tensor]:
    """Deal out ordinary pictures as surrogates, for memories whose prompts have no meaning to keep.

    Args:
        memorized: with pictures in `retain`.
        count: pictures per memorized picture, at least 1.
        seed: of the choice.

    Raises:
        ConfigurationError: a number below 1.
        DataError: `retain` has no pictures.
    """
    from mmforget.seeds import generator

    at_least_one(count=count)
    images = memorized.retain.images
    if images is None or not len(images):
        raise DataError("`memorized.retain` has no pictures to deal out; add some")
    found = {}
    for name in dict.fromkeys(name for one in memorized for name in one.images):
        draw = generator(seed, "ordinary-surrogates", name)
        found[name] = images[torch.randint(len(images), (count,), generator=draw)]
    return found


def check_surrogates(memorized: MemorizedSet, surrogates: Mapping[str, Any]) -> None:
    """Refuse surrogates that leave out a memorized picture or have a wrong shape.

    Raises:
        DataError: names the picture.
    """
    for name in dict.fromkeys(name for one in memorized for name in one.images):
        if name not in surrogates:
            raise DataError(
                f"`surrogates` has no pictures for '{name}'; make them with `make_surrogates`"
            )
        found, wanted = surrogates[name], tuple(memorized.images[name].shape)
        if not isinstance(found, Tensor) or tuple(found.shape[1:]) != wanted or not len(found):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"`surrogates` of '{name}' are {shape}; they must be (k, {wanted[0]}, {wanted[1]}, "
                f"{wanted[2]}) with k above 0"
            )
