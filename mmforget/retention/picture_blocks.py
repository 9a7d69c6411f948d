"""Where each picture's visual tokens stand in a batch of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.models.multimodals.base import MultimodalFamily


@dataclass(frozen=True)
class Block:
    """The visual tokens of one picture, or of one tile of it.

    Attributes:
        places: (N,) positions in the sequence.
        grid: (h, w), None where it is not known.
    """

    places: Tensor
    grid: tuple[int, int] | None


def picture_blocks(
    family: MultimodalFamily,
    network: Any,
    visual: Tensor,
    patches: Sequence[tuple[int, int]] | None = None,
) -> list[list[Block]]:
    """Split the visual tokens of every row by picture.

    Args:
        family: of the network.
        network: of transformers.
        visual: (B, L) bool.
        patches: (h, w) of the patches of every picture that the tower saw last, in the order of the
            batch. Rows may have been repeated since, for beams. Where these pictures are not those
            of the batch, or none are given, a picture is a run of adjacent visual tokens.
    """
    rows = [row.nonzero()[:, 0] for row in visual]
    if patches:
        sizes = [family.tokens_of(network, one) for one in patches]
        repeats, rest = divmod(sum(map(len, rows)), sum(sizes))
        if not rest and repeats and len(rows) % repeats == 0:
            grids = [family.grid_of(network, n, p) for n, p in zip(sizes, patches, strict=True)]
            found = _dealt(rows[::repeats], sizes, grids)
            if found is not None:
                return [row for row in found for _ in range(repeats)]
    return [[Block(run, None) for run in _runs(places)] for places in rows]


def _dealt(
    rows: Sequence[Tensor], sizes: Sequence[int], grids: Sequence[tuple[int, int] | None]
) -> list[list[Block]] | None:
    """Give each row its pictures in order; None if a row ends within a picture."""
    found: list[list[Block]] = []
    used = 0
    for places in rows:
        blocks: list[Block] = []
        while len(places):
            if used == len(sizes) or sizes[used] > len(places):
                return None
            blocks.append(Block(places[: sizes[used]], grids[used]))
            places, used = places[sizes[used] :], used + 1
        found.append(blocks)
    return found


def _runs(places: Tensor) -> list[Tensor]:
    if not len(places):
        return []
    breaks = ((places[1:] - places[:-1]) > 1).nonzero()[:, 0] + 1
    return list(torch.tensor_split(places, breaks.tolist()))
