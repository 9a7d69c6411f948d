"""One forward pass in which tokens are pruned: what is known of it, and which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.retention.picture_blocks import Block
from mmforget.retention.token_budget import highest
from mmforget.retention.token_reduction import (
    KeptTokens,
    Pictures,
    PictureTokens,
    TokenScorer,
)
from mmforget.retention.token_selection import SeenKeys, Selection


@dataclass
class PrunedPass:
    """One forward pass through the decoder, of Q new tokens.

    Attributes:
        visual: (B, Q) bool.
        attended: (B, Q) bool, False for padding.
        ends: (B,) place of the last token of the prompt.
        blocks: per row the pictures among the new tokens.
        budgets: per row what each picture keeps, or one number for all.
        same: per row whether it repeats the one before, as beams do.
        pictures: per row its pictures, if known.
        before: keys that were pruned into the cache, None if none were.
        cache: of transformers, or None.
        wanted: whether anything is to be dropped.
        attention: (B, Q) what the new tokens receive, for scorers that ask for it.
        decided: whether `selection` is final.
        selection: None where nothing is dropped.
    """

    visual: Tensor
    attended: Tensor
    ends: Tensor
    blocks: list[list[Block]]
    budgets: list[list[int]]
    same: list[bool]
    pictures: Pictures | None
    before: SeenKeys | None
    cache: Any
    wanted: bool
    attention: Tensor | None = None
    decided: bool = False
    selection: Selection | None = None


def kept_tokens(
    found: PrunedPass, hidden: Tensor, scorer: TokenScorer, whole: bool
) -> tuple[Tensor, KeptTokens]:
    """Decide what stays: all but padding and the visual tokens of low score.

    Args:
        found: the pass.
        hidden: (B, Q, D) states of the new tokens.
        scorer: of the tokens of one picture.
        whole: whether a budget is for all pictures of a row together.

    Returns:
        (B, Q) bool, and the same by picture.
    """
    kept = ~found.visual & found.attended
    places: list[list[Tensor] | None] = []
    for row, (blocks, budgets) in enumerate(zip(found.blocks, found.budgets, strict=True)):
        if row and found.same[row] and budgets == found.budgets[row - 1]:
            kept[row] = kept[row - 1]
            places.append(places[-1])
            continue
        chosen = _chosen(found, hidden[row], row, scorer, whole)
        for block, one in zip(blocks, chosen, strict=True):
            kept[row, block.places[one]] = True
        places.append(chosen if blocks else None)
    return kept, KeptTokens(places, _given(found.blocks))


def _chosen(
    found: PrunedPass, hidden: Tensor, row: int, scorer: TokenScorer, whole: bool
) -> list[Tensor]:
    """Places within each picture of a row that stay."""
    blocks, budgets = found.blocks[row], found.budgets[row]
    scores = []
    for number, block in enumerate(blocks):
        shown = found.pictures[row] if found.pictures is not None else ()
        keep = min(budgets[0], len(block.places)) if whole else budgets[number]
        one = scorer(
            PictureTokens(
                hidden[block.places],
                keep,
                block.grid,
                row,
                number,
                None if found.attention is None else found.attention[row, block.places],
                image=shown[number] if len(shown) == len(blocks) else None,
            )
        )
        if one.shape != block.places.shape:
            raise ConfigurationError(
                f"the scorer returned {tuple(one.shape)} for a picture of "
                f"{len(block.places)} visual tokens; it must return one score for each"
            )
        scores.append(one.to(hidden.device))
    if not whole or not blocks:
        return [highest(s, keep) for s, keep in zip(scores, budgets, strict=True)]
    sizes = [len(one) for one in scores]
    best = highest(torch.cat(scores), budgets[0])
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        best[(best >= start) & (best < start + size)] - start
        for start, size in zip(starts, sizes, strict=True)
    ]


def repeated_rows(hidden: Tensor) -> list[bool]:
    """Whether each row equals the one before up to rounding; it then gets the same selection."""
    if len(hidden) == 1:
        return [False]
    with torch.no_grad():
        change = (hidden[1:] - hidden[:-1]).abs().amax(dim=(1, 2))
        return [False, *(change <= 1e-6 * hidden.abs().amax()).tolist()]


def _given(blocks: list[list[Block]]) -> list[list[int] | None]:
    return [[len(block.places) for block in row] if row else None for row in blocks]


def everything(blocks: list[list[Block]]) -> KeptTokens:
    """The record of a batch that keeps all its visual tokens."""
    return KeptTokens(
        [[torch.arange(len(block.places)) for block in row] if row else None for row in blocks],
        _given(blocks),
    )
