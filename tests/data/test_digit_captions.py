"""Captions say what is to be seen, in many ways, and the same ones for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from mmforget.data.digit_captions import (
    DIGIT_SYNONYMS,
    DIGIT_TEMPLATES,
    INK_SYNONYMS,
    INK_TEMPLATES,
    MIXED_TEMPLATES,
    PROMPT_LENGTH,
    WORDS,
    caption,
    captions,
)
from mmforget.data.digit_world import BACKGROUNDS, DIGITS, INKS, VARIANTS, facts, stage_strokes

IDS = stage_strokes()["train"][:400] * VARIANTS


def test_vocabulary() -> None:
    assert list(DIGIT_SYNONYMS) == list(DIGITS) and set(INK_SYNONYMS) == set(INKS)
    spoken = [*DIGITS, *DIGIT_SYNONYMS.values(), *INKS, *INK_SYNONYMS.values(), *BACKGROUNDS]
    assert set(spoken) <= set(WORDS)
    sentences = [*DIGIT_TEMPLATES, *INK_TEMPLATES, *MIXED_TEMPLATES]
    for sentence in sentences:
        plain = sentence.replace("{ink}", "").replace("{digit}", "").replace("{background}", "")
        assert set(plain.replace("{}", "").split()) <= set(WORDS)
        assert len(sentence.split()) <= PROMPT_LENGTH - 2


def test_captions_are_true() -> None:
    texts = captions(IDS, seed=0)
    named = 0
    for fact, text in zip(facts(IDS), texts, strict=True):
        words = text.split()
        digits = set(words) & {*DIGITS, *DIGIT_SYNONYMS.values()}
        inks = set(words) & {*INKS, *INK_SYNONYMS.values()} - {fact.background}
        assert digits <= {fact.digit, DIGIT_SYNONYMS[fact.digit]}
        if fact.background not in INKS:
            assert inks <= {fact.ink, INK_SYNONYMS[fact.ink]}
        assert digits or inks
        named += bool(digits)
    assert 0.7 < named / len(texts) < 0.9  # four of five sentences


def test_draws() -> None:
    texts = captions(IDS, seed=0)
    assert captions(IDS, seed=0) == texts != captions(IDS, seed=1)
    assert captions(IDS[5:9], seed=0) == texts[5:9]
    empty = [not text for text in captions(IDS, seed=0, empty=0.25)]
    assert 0.15 < np.mean(empty) < 0.35
    synonyms = {*DIGIT_SYNONYMS.values()}
    shares = [
        np.mean([bool(set(text.split()) & synonyms) for text in captions(IDS, 0, synonyms=share)])
        for share in (0.0, 0.25, 1.0)
    ]
    assert shares[0] == 0 and 0.1 < shares[1] < 0.35 and 0.7 < shares[2] < 0.9


@pytest.mark.parametrize("draw", [0.0, 0.2, 0.4, 1.0])
def test_every_draw_has_a_sentence(draw: float) -> None:
    fact = facts(IDS[:1])[0]
    assert caption(fact, np.nextafter(draw, 0.5) if draw != 1.0 else np.nextafter(1.0, 0.0))
    if 0 < draw < 1:
        assert caption(fact, draw) and caption(fact, np.nextafter(draw, 0.0))


def test_sentences_are_all_used() -> None:
    fact = facts(IDS[:1])[0]
    found = {caption(fact, draw) for draw in np.linspace(0, 1, 2000, endpoint=False)}
    every = len(DIGIT_TEMPLATES) + len(INK_TEMPLATES) + len(MIXED_TEMPLATES)
    assert len(found) == every
    other = caption(fact, 0.0, synonym=(True, False))
    assert other == DIGIT_SYNONYMS[fact.digit] != caption(fact, 0.0) == fact.digit
