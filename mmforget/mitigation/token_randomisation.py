"""Randomised prompts: other words in between, or noise on the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from mmforget.errors import ConfigurationError, RequestError, suggest
from mmforget.mitigation.base import Key, PromptMitigation
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator

Insertion = Literal["tokens", "numbers", "repeats"]

LARGEST_NUMBER = 100_000
ATTEMPTS = 1000
"""Draws until a token is found that is a word of its own."""


@dataclass(frozen=True)
class TokenRandomisation(PromptMitigation):
    """Insert words at random places of the prompt, other ones for every picture.

    Args:
        insert: ``tokens`` of the vocabulary, ``numbers`` below 100000, or ``repeats`` of words that
            are there.
        count: how many. A prompt that gets too long for the text encoder is refused.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Somepalli, Singla, Goldblum, Geiping, Goldstein, "Understanding and Mitigating Copying in
        Diffusion Models", 2023, arXiv:2305.20086.
    """

    insert: Insertion = "tokens"
    count: int = 4

    def __post_init__(self) -> None:
        if self.insert not in get_args(Insertion):
            raise ConfigurationError(
                f"`insert` is '{self.insert}', {suggest(self.insert, get_args(Insertion))}"
            )
        if self.count < 1:
            raise ConfigurationError(f"`count` is {self.count}, it must be at least 1")

    def embedding(
        self, model: DiffusionGenerator, keys: Sequence[Key], seed: int = 0
    ) -> PromptEmbedding:
        """Embed the randomised texts; see `PromptMitigation.embedding`."""
        return model.encode(self.texts(model, keys, seed))

    def texts(self, model: DiffusionGenerator, keys: Sequence[Key], seed: int = 0) -> list[str]:
        """The randomised prompts.

        Args:
            model: its first tokenizer gives the words.
            keys: prompts and numbers of pictures.
            seed: of words and places.

        Raises:
            RequestError: a prompt that gets too long.
        """
        found = [self._text(model.pipeline.tokenizer, key, seed) for key in keys]
        try:
            model.check_length(found)
        except RequestError as error:
            raise RequestError(
                f"with `count` {self.count} words inserted, {error}, or insert fewer"
            ) from error
        return found

    def _text(self, tokenizer: Any, key: Key, seed: int) -> str:
        draw = generator(seed, "token-randomisation", self.insert, *key)
        words = key[0].split()
        own = list(words)
        for _ in range(self.count):
            place = int(torch.randint(len(words) + 1, (1,), generator=draw))
            words.insert(place, self._word(tokenizer, own, draw))
        return " ".join(words)

    def _word(self, tokenizer: Any, own: Sequence[str], draw: torch.Generator) -> str:
        if self.insert == "numbers":
            return str(int(torch.randint(LARGEST_NUMBER, (1,), generator=draw)))
        if self.insert == "repeats":
            return own[int(torch.randint(len(own), (1,), generator=draw))]
        special = set(tokenizer.all_special_ids)
        for _ in range(ATTEMPTS):
            token = int(torch.randint(len(tokenizer), (1,), generator=draw))
            word = tokenizer.decode([token]).strip()
            # Pieces of words change when they stand alone; only whole words come back as they were.
            if (
                token not in special
                and word
                and tokenizer(word, add_special_tokens=False).input_ids == [token]
            ):
                return str(word)
        raise ConfigurationError(
            f"none of {ATTEMPTS} tokens is a word of its own; use `insert='repeats'` or 'numbers'"
        )


@dataclass(frozen=True)
class EmbeddingNoise(PromptMitigation):
    """Add Gaussian noise to the token states, other noise for every picture.

    Args:
        std: of the noise, in units of the standard deviation of the states of the empty prompt,
            which is about 1 for CLIP ViT-L, for which the published 0.1 is meant.

    Raises:
        ConfigurationError: a negative `std`.

    Reference:
        Somepalli, Singla, Goldblum, Geiping, Goldstein, "Understanding and Mitigating Copying in
        Diffusion Models", 2023, arXiv:2305.20086.
    """

    std: float = 0.1

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise ConfigurationError(f"`std` is {self.std}, it must be at least 0")

    @torch.no_grad()
    def embedding(
        self, model: DiffusionGenerator, keys: Sequence[Key], seed: int = 0
    ) -> PromptEmbedding:
        """Embed with noise; see `PromptMitigation.embedding`."""
        plain = super().embedding(model, keys, seed)
        size = self.std * float(model.encode([""]).states.float().std())
        noise = torch.stack([
            torch.randn(plain.states.shape[1:], generator=generator(seed, "embedding-noise", *key))
            for key in keys
        ])  # fmt: skip
        return PromptEmbedding(plain.states + size * noise.to(plain.states), plain.pooled)
