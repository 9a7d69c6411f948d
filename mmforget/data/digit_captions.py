"""Words of the digit world: how its pictures are described, for models that read text."""

from __future__ import annotations

import numpy as np

from mmforget.data.digit_world import BACKGROUNDS, DIGITS, INKS, DigitFacts, facts
from mmforget.data.hashing import uniform

DIGIT_SYNONYMS = {word: str(value) for value, word in enumerate(DIGITS)}
INK_SYNONYMS = {
    "red": "scarlet",
    "green": "emerald",
    "blue": "azure",
    "yellow": "golden",
    "pink": "rosy",
    "white": "ivory",
}

DIGIT_TEMPLATES = (
    "{}",
    "the digit {}",
    "a photo of the digit {}",
    "a drawing of the digit {}",
    "a picture of a {}",
)
INK_TEMPLATES = (
    "{}",
    "a {} digit",
    "a photo of a {} digit",
    "a drawing in {}",
    "something in {} ink",
)
MIXED_TEMPLATES = (
    "a {ink} {digit}",
    "a photo of a {ink} {digit}",
    "the digit {digit} in {ink} ink",
    "a {ink} {digit} on a {background} background",
    "a photo of a {ink} {digit} on a {background} background",
    "a drawing of the digit {digit} in {ink} on {background}",
)

_OTHERS = """
a an the of in on and with no not this that is ink digit number colour color
photo picture drawing painting sketch image background something anything
small large big tiny bright dark old new good clean single handwritten round tall
cat dog house tree person sky water street car flower face hand book art style
curve line loop stroke corner circle top bottom left right centre half open closed
"""

WORDS = (
    *DIGITS,
    *DIGIT_SYNONYMS.values(),
    *INKS,
    *INK_SYNONYMS.values(),
    *BACKGROUNDS,
    *_OTHERS.split(),
)
"""Every word that is one token of the shipped tokenizer; the others are there for attacks."""

PROMPT_LENGTH = 16
"""Tokens of a prompt at most, with begin and end."""


def caption(fact: DigitFacts, draw: float, synonym: tuple[bool, bool] = (False, False)) -> str:
    """Describe a picture in one of many ways.

    Args:
        fact: what is to be seen.
        draw: [0, 1), chooses the sentence. Six of ten sentences name digit and ink.
        synonym: whether to replace the words for digit and ink by their synonyms.
    """
    digit = DIGIT_SYNONYMS[fact.digit] if synonym[0] else fact.digit
    ink = INK_SYNONYMS[fact.ink] if synonym[1] else fact.ink
    if draw < 0.2:
        return DIGIT_TEMPLATES[int(draw / 0.2 * len(DIGIT_TEMPLATES))].format(digit)
    if draw < 0.4:
        return INK_TEMPLATES[int((draw - 0.2) / 0.2 * len(INK_TEMPLATES))].format(ink)
    template = MIXED_TEMPLATES[int((draw - 0.4) / 0.6 * len(MIXED_TEMPLATES))]
    return template.format(digit=digit, ink=ink, background=fact.background)


def captions(ids: np.ndarray, seed: int, synonyms: float = 0.25, empty: float = 0.0) -> list[str]:
    """Draw one description per sample, the same for the same seed.

    Args:
        ids: (N,) sample ids of the digit world.
        seed: of the draw.
        synonyms: share of the words for digit and for ink that are replaced by their synonyms.
        empty: share of the descriptions that are left out, for classifier-free guidance.
    """
    which, gone = uniform(ids, seed, "caption"), uniform(ids, seed, "caption-empty")
    swap_digit, swap_ink = (
        uniform(ids, seed, f"caption-{factor}") < synonyms for factor in ("digit", "ink")
    )
    rows = zip(facts(ids), which.tolist(), swap_digit, swap_ink, strict=True)
    texts = [caption(fact, draw, (bool(one), bool(two))) for fact, draw, one, two in rows]
    return ["" if drop else text for text, drop in zip(texts, gone < empty, strict=True)]
