"""Words given to the tokenizer are one token each, whatever else they are part of."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmforget.data.digit_captions import PROMPT_LENGTH, WORDS
from mmforget.errors import ConfigurationError
from mmforget.testing.word_tokenizer import BEGIN_TOKEN, END_TOKEN, word_tokenizer


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    "words",
    [
        ["seven", "seventeen", "even", "eleven", "a", "an", "ann", "anna"],
        ["anna", "ann", "an", "a", "eleven", "even", "seventeen", "seven"],
        ["aaa", "aa", "aaaaa", "aaaa"],
        ["banana", "ana", "nana", "ban", "bananas", "ba"],
    ],
)
def test_words_that_contain_each_other(words: list[str]) -> None:
    tokenizer = word_tokenizer(words, 16)
    for word in words:
        assert pieces(tokenizer, word) == [f"{word}</w>"]
        assert pieces(tokenizer, f"{word} {word.upper()}") == [f"{word}</w>"] * 2


def test_every_word_of_the_digit_world_is_one_token() -> None:
    tokenizer = word_tokenizer(WORDS, PROMPT_LENGTH)
    found = [pieces(tokenizer, word) for word in dict.fromkeys(WORDS)]
    assert found == [[f"{word}</w>"] for word in dict.fromkeys(WORDS)]


def test_other_words_are_spelled() -> None:
    tokenizer = word_tokenizer(["cat"], 8)
    assert pieces(tokenizer, "cot") == ["c", "o", "t</w>"]
    assert pieces(tokenizer, "Cat!") == ["cat</w>", "!</w>"]


def test_prompts_begin_end_and_are_padded_with_the_end() -> None:
    tokenizer = word_tokenizer(["cat"], 8)
    ids = tokenizer("a cat", padding="max_length").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == [BEGIN_TOKEN, "a</w>", "cat</w>", *[END_TOKEN] * 5]
    assert tokenizer.model_max_length == 8
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1


def test_ids_survive_saving(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = word_tokenizer(["seven", "even", "cat"], 8)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("a seven even", "zebra cat", ""):
        assert loaded(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize("word", ["", "Cat", "café", "two words"])
def test_words_that_cannot_be_spelled(word: str) -> None:
    with pytest.raises(ConfigurationError, match=f"`words` has '{word}', a word needs"):
        word_tokenizer(["cat", word], 8)
