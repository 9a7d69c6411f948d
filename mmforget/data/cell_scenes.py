"""Small scenes of one to four digits in the cells of a 2x2 grid, of which every fact is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmforget.data.digit_world import (
    BACKGROUNDS,
    CANVAS,
    DIGITS,
    INKS,
    WORLD_SEED,
    interpolation,
    strokes,
)
from mmforget.data.hashing import uniform

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
"""Names of the cells, row by row."""

CELLS = len(POSITIONS)
CELL = CANVAS // 2
"""Side of a cell in pixels."""

SMALLEST, LARGEST = 12.0, 14.0
"""Side of the square in which a digit is drawn, in pixels."""

FRINGE = 1 / 16
"""Interpolation carries ink over each side of the square by this share of it."""


@dataclass(frozen=True)
class CellScene:
    """Everything there is to know about one scene.

    Attributes:
        digits, inks: names by cell, row by row; None where a cell is empty.
        background: name.
        boxes: (left, top, right, bottom) of what may hold ink, by cell, in pixels.
    """

    digits: tuple[str | None, ...]
    inks: tuple[str | None, ...]
    background: str
    boxes: tuple[tuple[float, float, float, float] | None, ...]

    @property
    def listed(self) -> tuple[str, ...]:
        """The digits, row by row."""
        return tuple(digit for digit in self.digits if digit is not None)

    @property
    def used(self) -> tuple[int, ...]:
        """The cells that hold a digit."""
        return tuple(cell for cell, digit in enumerate(self.digits) if digit is not None)


@dataclass(frozen=True)
class ScenePlan:
    """What N scenes show.

    Attributes:
        stroke, ink: (N, 4) index of the handwritten digit and of its colour.
        left, top, size: (N, 4) place and side of the drawn squares, in pixels.
        used: (N, 4) bool: cells that hold a digit, one to four of each scene.
        background: (N,) colour index.
    """

    stroke: np.ndarray
    ink: np.ndarray
    left: np.ndarray
    top: np.ndarray
    size: np.ndarray
    used: np.ndarray
    background: np.ndarray

    @classmethod
    def of(cls, numbers: np.ndarray, chosen: np.ndarray) -> ScenePlan:
        """Decide what scenes show, by their numbers (N,) and the strokes that may be drawn."""

        def drawn(purpose: str, *keys: int) -> np.ndarray:
            return uniform(numbers, WORLD_SEED, f"cells-{purpose}", *keys)

        def by_cell(purpose: str) -> np.ndarray:
            return np.stack([drawn(purpose, cell) for cell in range(CELLS)], axis=1)

        count = 1 + (drawn("count") * CELLS).astype(np.int64)
        rank = by_cell("order").argsort(axis=1).argsort(axis=1)
        size = SMALLEST + by_cell("size") * (LARGEST - SMALLEST)
        fringe, room = FRINGE * size, CELL - (1 + 2 * FRINGE) * size
        cell = np.arange(CELLS)
        return cls(
            stroke=chosen[(by_cell("stroke") * len(chosen)).astype(np.int64)],
            ink=(by_cell("ink") * len(INKS)).astype(np.int64),
            left=cell % 2 * CELL + fringe + by_cell("left") * room,
            top=cell // 2 * CELL + fringe + by_cell("top") * room,
            size=size,
            used=rank < count[:, None],
            background=(drawn("background") * len(BACKGROUNDS)).astype(np.int64),
        )

    def render(self) -> Tensor:
        """Draw: each digit is scaled bilinearly and blends the background into its ink.

        Returns:
            (N, 3, 32, 32) uint8.
        """
        inks = torch.tensor(list(INKS.values())).float()
        backgrounds = torch.tensor(list(BACKGROUNDS.values())).float()
        canvas = backgrounds[self.background][:, :, None, None].expand(-1, -1, CANVAS, CANVAS)
        for cell in range(CELLS):
            stroke = torch.from_numpy(strokes()[0][self.stroke[:, cell]])
            down = interpolation(self.top[:, cell], self.size[:, cell])
            across = interpolation(self.left[:, cell], self.size[:, cell])
            ink = (down @ stroke @ across.transpose(1, 2))[:, None]
            ink = ink * torch.from_numpy(self.used[:, cell])[:, None, None, None]
            canvas = torch.lerp(canvas, inks[self.ink[:, cell]][:, :, None, None], ink)
        return canvas.round().to(torch.uint8)

    def facts(self) -> list[CellScene]:
        """All facts about the scenes."""
        digit, inks, backgrounds = strokes()[1][self.stroke], tuple(INKS), tuple(BACKGROUNDS)
        scenes = []
        for row, used in enumerate(self.used):
            fringe = FRINGE * self.size[row]
            corner = np.stack([self.left[row], self.top[row]])
            boxes = np.concatenate([corner - fringe, corner + self.size[row] + fringe]).T.tolist()
            scenes.append(
                CellScene(
                    tuple(DIGITS[digit[row, c]] if used[c] else None for c in range(CELLS)),
                    tuple(inks[self.ink[row, c]] if used[c] else None for c in range(CELLS)),
                    backgrounds[self.background[row]],
                    tuple(tuple(boxes[c]) if used[c] else None for c in range(CELLS)),
                )
            )
        return scenes


def covered(boxes: Sequence[tuple[float, float, float, float]], patch: int) -> np.ndarray:
    """Mark the patches of a canvas that any box touches.

    Args:
        boxes: (left, top, right, bottom) in pixels; they may leave the canvas.
        patch: side of a patch in pixels; a last one that is not whole counts.

    Returns:
        (h, w) bool.
    """
    side = -(-CANVAS // patch)
    found = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in boxes:
        rows = slice(max(0, int(top // patch)), int(-(-bottom // patch)))
        columns = slice(max(0, int(left // patch)), int(-(-right // patch)))
        found[rows, columns] = True
    return found
