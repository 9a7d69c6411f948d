"""Randomised prompts: what is inserted, where, and how much noise there is."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from mmforget.errors import ConfigurationError, RequestError
from mmforget.mitigation import EmbeddingNoise, TokenRandomisation
from mmforget.mitigation.token_randomisation import Insertion
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import WORDS, TinyKind, tiny_pipeline

PROMPT = "a red cat"


@pytest.fixture(scope="module")
def model() -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline("sd"), steps=2)


def is_within(part: list[str], whole: list[str]) -> bool:
    """Whether the words come in this order, with others in between."""
    rest = iter(whole)
    return all(word in rest for word in part)


@pytest.mark.parametrize(
    ("insert", "count"), [("tokens", 1), ("tokens", 3), ("repeats", 3), ("numbers", 2)]
)
def test_as_many_words_as_asked_for_are_inserted_and_the_others_keep_their_order(
    model: DiffusionGenerator, insert: Insertion, count: int
) -> None:
    texts = TokenRandomisation(insert, count).texts(model, [(PROMPT, n) for n in range(12)])
    for text in texts:
        words = text.split()
        assert len(words) == 3 + count and is_within(PROMPT.split(), words)
    assert len(set(texts)) > 3
    # First and last place are possible too.
    firsts = {text.split()[0] for text in texts}
    lasts = {text.split()[-1] for text in texts}
    assert "a" in firsts and len(firsts) > 1 and "cat" in lasts and len(lasts) > 1


def test_inserted_tokens_are_whole_words_of_the_vocabulary(model: DiffusionGenerator) -> None:
    tokenizer = model.pipeline.tokenizer
    texts = TokenRandomisation("tokens", 1).texts(model, [(PROMPT, n) for n in range(40)])
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == 4 and not set(ids) & set(tokenizer.all_special_ids)
    inserted = {word for text in texts for word in text.split()} - set(PROMPT.split())
    assert inserted & set(WORDS)


def test_repeats_are_words_of_the_prompt_and_numbers_are_numbers(
    model: DiffusionGenerator,
) -> None:
    for text in TokenRandomisation("repeats", 4).texts(model, [(PROMPT, n) for n in range(5)]):
        assert set(text.split()) == set(PROMPT.split())
    for text in TokenRandomisation("numbers", 1).texts(model, [(PROMPT, n) for n in range(5)]):
        assert [word.isdigit() and int(word) < 100_000 for word in text.split()].count(True) == 1


def test_words_depend_on_seed_prompt_and_number_only(model: DiffusionGenerator) -> None:
    one = TokenRandomisation("tokens", 2)
    both = one.texts(model, [(PROMPT, 0), ("a dog", 1)], seed=4)
    assert one.texts(model, [("a dog", 1)], seed=4) == both[1:]
    assert one.texts(model, [(PROMPT, 0)], seed=5) != both[:1]
    assert one.texts(model, [(PROMPT, 1)], seed=4) != both[:1]


def test_prompts_that_get_too_long_are_refused(model: DiffusionGenerator) -> None:
    with pytest.raises(RequestError, match=r"with `count` 12 .* 17 tokens.* insert fewer"):
        TokenRandomisation("repeats", 12).embedding(model, [(PROMPT, 0)])


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_noise_has_the_spread_that_was_asked_for(kind: TinyKind) -> None:
    model = DiffusionGenerator(tiny_pipeline(kind), steps=2)
    keys = [(PROMPT, n) for n in range(40)]
    plain = model.encode([PROMPT])
    unit = float(model.encode([""]).states.std())
    found = EmbeddingNoise(0.5).embedding(model, keys, seed=2)
    noise = found.states - plain.states
    assert float(noise.std()) == pytest.approx(0.5 * unit, rel=0.05)
    assert abs(float(noise.mean())) < 0.05 * unit
    assert not torch.allclose(found.states[0], found.states[1])
    again = EmbeddingNoise(0.5).embedding(model, keys[3:4], seed=2)
    assert torch.allclose(again.states[0], found.states[3], atol=1e-5)
    if plain.pooled is not None:
        assert found.pooled is not None
        assert torch.equal(found.pooled, plain.pooled.expand_as(found.pooled))


def test_no_noise_changes_nothing(model: DiffusionGenerator) -> None:
    found = EmbeddingNoise(0.0).embedding(model, [(PROMPT, 0)])
    assert torch.equal(found.states, model.encode([PROMPT]).states)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenRandomisation("words"), "valid are: 'tokens', 'numbers', 'repeats'"),  # type: ignore[arg-type]
        (lambda: TokenRandomisation(count=0), "`count` is 0"),
        (lambda: EmbeddingNoise(-0.1), "`std` is -0.1"),
        (lambda: EmbeddingNoise(float("nan")), "`std` is nan"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
