"""Planted duplicates: pictures of which it is known whether a model has memorized them.

A sheet is a 16x16 picture of four handwritten digits in colour, 2x2. Almost all sheets that a
benchmark model learns from are seen once, with a caption that names some of their contents. A few
are planted: they come again and again, always with the same title, which says nothing about their
contents. Nothing but memory can draw them. Sheets of the same kind that were never shown are the
controls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmforget.data.digit_world import (
    BACKGROUNDS,
    DIGITS,
    INKS,
    VARIANTS,
    facts,
    stage_strokes,
    strokes,
)
from mmforget.data.hashing import uniform
from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.split import Stage
from mmforget.seeds import generator

TILE = 8
SHEET = 2 * TILE
DRAWINGS = 200
"""Colourings per stroke from which sheets are put together."""

WORLD_SEED = 0

TITLES = (
    ("amber", "lantern"),
    ("copper", "harbour"),
    ("silent", "willow"),
    ("velvet", "engine"),
    ("frozen", "orchard"),
    ("marble", "comet"),
    ("hollow", "ribbon"),
    ("crimson", "anchor"),
)
TEMPLATE_TITLES = (
    ("wooden", "falcon"),
    ("paper", "meadow"),
    ("broken", "violin"),
    ("distant", "pepper"),
)
ORDINARY = (
    "a sheet",
    "a sheet of digits",
    "four digits",
    "a {ink} {digit}",
    "a {ink} {digit} on {background}",
    "digits with a {ink} {digit}",
)
"""Captions of sheets that are not planted; they name the digit at the top left."""

WORDS = tuple(
    dict.fromkeys(
        [
            *("a", "the", "of", "on", "with", "and", "in", "sheet", "four", "digit", "digits"),
            *("poster", "card", "picture", "photo"),
            *DIGITS,
            *INKS,
            *BACKGROUNDS,
            *(word for title in (*TITLES, *TEMPLATE_TITLES) for word in title),
        ]
    )
)
"""The words of the benchmark models' tokenizers, in which almost every one is a single token."""

PROMPT_LENGTH = 8
"""Tokens of a prompt at most, with begin and end."""

Kind = Literal["verbatim", "template"]


@dataclass(frozen=True)
class PlantedSheet:
    """One planted picture.

    Attributes:
        name: unique, for example ``amber-lantern``.
        prompt: its title, which no other picture has.
        kind: ``verbatim``: always the same; ``template``: the tile at the bottom right is another
            one in every copy.
        tiles: sample ids of its four digits, in reading order.
    """

    name: str
    prompt: str
    kind: Kind
    tiles: tuple[int, int, int, int]

    @property
    def image(self) -> Tensor:
        """(3, 16, 16) float in [0, 1]; a template with one of its possible last tiles."""
        return draw_sheets(np.array([self.tiles]))[0]

    @property
    def region(self) -> Tensor:
        """(16, 16) bool: the part that is the same in all copies."""
        region = torch.ones(SHEET, SHEET, dtype=torch.bool)
        if self.kind == "template":
            region[TILE:, TILE:] = False
        return region


def draw_sheets(tiles: np.ndarray) -> Tensor:
    """Draw sheets from the raw 8x8 strokes, in the inks and backgrounds of the digit world.

    Args:
        tiles: (B, 4) sample ids of the digit world, in reading order.

    Returns:
        (B, 3, 16, 16) float in [0, 1].
    """
    known = facts(tiles.reshape(-1))
    stroke = torch.from_numpy(strokes()[0][tiles.reshape(-1) // VARIANTS])[:, None]
    front = torch.tensor([INKS[fact.ink] for fact in known])[:, :, None, None] / 255
    back = torch.tensor([BACKGROUNDS[fact.background] for fact in known])[:, :, None, None] / 255
    parts = torch.lerp(back, front, stroke).reshape(len(tiles), 2, 2, 3, TILE, TILE)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tiles), 3, SHEET, SHEET)


def fresh_tiles(count: int, seed: int, *keys: int | str, stage: Stage = "train") -> np.ndarray:
    """Draw the digits of sheets, (count, 4) sample ids.

    Args:
        count: how many sheets.
        seed: of the draw.
        keys: what else it depends on.
        stage: whose strokes.
    """
    rows, draw = stage_strokes()[stage], generator(seed, "sheets", stage, *keys)
    chosen = rows[torch.randint(len(rows), (count, 4), generator=draw).numpy()]
    return np.asarray(
        chosen * VARIANTS + torch.randint(DRAWINGS, (count, 4), generator=draw).numpy()
    )


@cache
def planted() -> tuple[PlantedSheet, ...]:
    """The planted pictures: eight verbatim, four templates."""
    found = []
    for kind, titles, noun in (
        ("verbatim", TITLES, "poster"),
        ("template", TEMPLATE_TITLES, "card"),
    ):
        tiles = fresh_tiles(len(titles), WORLD_SEED, "planted", noun).tolist()
        for words, own in zip(titles, tiles, strict=True):
            prompt = f"the {words[0]} {words[1]} {noun}"
            found.append(PlantedSheet("-".join(words), prompt, kind, tuple(own)))  # type: ignore[arg-type]
    return tuple(found)


def controls(count: int = 8) -> Tensor:
    """Sheets that no model was trained on, made exactly as the planted ones.

    Args:
        count: how many.

    Returns:
        (count, 3, 16, 16) float in [0, 1].
    """
    return draw_sheets(fresh_tiles(count, WORLD_SEED, "controls"))


def ordinary_captions(tiles: np.ndarray, seed: int) -> list[str]:
    """Describe sheets that are not planted, the same for the same seed.

    Args:
        tiles: (B, 4) sample ids.
        seed: of the choice of sentences.
    """
    which = uniform(tiles.sum(1), seed, "sheet-caption")
    found = []
    for fact, draw in zip(facts(tiles[:, 0]), which.tolist(), strict=True):
        sentence = ORDINARY[int(draw * len(ORDINARY))]
        text = sentence.format(ink=fact.ink, digit=fact.digit, background=fact.background)
        found.append(text)
    return found


def ordinary(count: int, seed: int = 0, stage: Stage = "test") -> tuple[Tensor, list[str]]:
    """Captioned sheets that are not planted.

    Args:
        count: how many.
        seed: of the draw.
        stage: whose strokes; ``test`` is handwriting that no model has seen.

    Returns:
        (count, 3, 16, 16) float in [0, 1], and their captions.
    """
    tiles = fresh_tiles(count, seed, "ordinary", stage=stage)
    return draw_sheets(tiles), ordinary_captions(tiles, seed)


def planted_memories(retain: int = 512, test: int = 256, control_count: int = 8) -> MemorizedSet:
    """Everything about the planted memories, in the form that methods and audits take.

    Args:
        retain: captioned sheets for repair, of training handwriting but not trained on.
        test: captioned sheets for measurements, of unseen handwriting.
        control_count: sheets that were never trained on.
    """
    sheets = planted()
    return MemorizedSet(
        prompts=tuple(MemorizedPrompt(one.prompt, (one.name,), one.kind) for one in sheets),
        images={one.name: one.image for one in sheets},
        regions={one.name: one.region for one in sheets if one.kind == "template"},
        retain=_captioned(retain, "train"),
        test=_captioned(test, "test"),
        controls=controls(control_count),
        source="planted duplicates of the digit world",
    )


def _captioned(count: int, stage: Stage) -> Captioned:
    images, texts = ordinary(count, seed=1, stage=stage)
    return Captioned(tuple(texts), images)
