"""CLIP tokenizers made in memory from a list of words, for tiny models that need no download."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

from mmforget.errors import ConfigurationError

_CHARACTERS = string.ascii_lowercase + string.digits + ".,-'+!?"
_END = "</w>"
BEGIN_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"


def word_tokenizer(words: Sequence[str], length: int) -> Any:
    """Build a byte-pair tokenizer in which every given word is one token.

    Other words are split into characters, or into pieces that happen to be words.

    Args:
        words: of lower-case letters, or single other characters; CLIP's rules split all else.
        length: tokens of a prompt at most, with begin and end.

    Raises:
        ConfigurationError: an empty word, or one with characters that the tokenizer lacks.

    Returns:
        A `transformers.CLIPTokenizer` that pads with its end token, as Stable Diffusion's does.
    """
    from transformers import CLIPTokenizer

    merges: dict[tuple[str, str], int] = {}
    pieces: list[str] = [*_CHARACTERS, *(character + _END for character in _CHARACTERS)]
    for word in dict.fromkeys(words):
        if not word or set(word) - set(_CHARACTERS):
            raise ConfigurationError(
                f"`words` has '{word}', a word needs at least one character, all of them from "
                f"'{_CHARACTERS}'"
            )
        parts = _split(word, merges)
        while len(parts) > 1:
            # Appended merges have the lowest rank, so that earlier words stay whole.
            merges[(parts[0], parts[1])] = len(merges)
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    vocabulary = {piece: row for row, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary[BEGIN_TOKEN] = len(vocabulary)
    vocabulary[END_TOKEN] = len(vocabulary)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=cast(Any, list(merges)),  # transformers types it as texts, but takes pairs
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        unk_token=END_TOKEN,
        pad_token=END_TOKEN,
        model_max_length=length,
    )


def _split(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges to one word."""
    parts = [*word[:-1], word[-1] + _END]
    while len(parts) > 1:
        rank, place = min(
            (merges.get((left, right), len(merges)), i)
            for i, (left, right) in enumerate(pairwise(parts))
        )
        if rank == len(merges):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
