"""Word embeddings that no word has: put into frozen text encoders while they read a prompt.

Text encoders of transformers take token ids only, so an ordinary word serves as a placeholder, and
a hook on the embedding layer replaces its output. The row of that word, and all weights, stay
untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import ModelError, RequestError
from mmforget.models.diffusion import DiffusionGenerator


@dataclass(frozen=True)
class Vocabulary:
    """Words that every text encoder of a model reads as one token.

    Attributes:
        words: M texts that survive encoding and decoding, in the order of the first tokenizer.
        ids: per text encoder (M,) token ids.
    """

    words: tuple[str, ...]
    ids: dict[str, Tensor]

    def __len__(self) -> int:
        """Number of words."""
        return len(self.words)


def tokenizers(model: DiffusionGenerator) -> dict[str, Any]:
    """Tokenizer of every text encoder, by the encoder's name in the pipeline."""
    return {
        key: getattr(model.pipeline, key.replace("text_encoder", "tokenizer"))
        for key in model.text_encoders
    }


def vocabulary(model: DiffusionGenerator) -> Vocabulary:
    """Collect the words that every tokenizer of a model has as one token.

    Raises:
        ModelError: the tokenizers have no word in common.
    """
    found = tokenizers(model)
    first = next(iter(found.values()))
    words = list(dict.fromkeys(_spelt(first, range(len(first)))))
    words = [word for word in words if word.isprintable() and word and " " not in word]
    for tokenizer in found.values():
        encoded = _plain(tokenizer, words)
        back = _spelt(tokenizer, [ids[0] if len(ids) == 1 else None for ids in encoded])
        words = [word for word, text in zip(words, back, strict=True) if text == word]
        if not words:
            raise ModelError("the model's tokenizers have no word in common that is one token")
    return Vocabulary(
        tuple(words),
        {key: torch.tensor(_plain(tokenizer, words))[:, 0] for key, tokenizer in found.items()},
    )


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]


def _spelt(tokenizer: Any, ids: Iterable[int | None]) -> list[str]:
    """Tokens as they are written; empty for special tokens and None.

    `tokenizer.decode` is not used: copies of a CLIP tokenizer leave the marks of word ends in.
    """
    special = set(tokenizer.all_special_ids)
    return [
        ""
        if row is None or row in special
        else tokenizer.convert_ids_to_tokens(row).removesuffix("</w>").removeprefix("▁")
        for row in ids
    ]


def word_rows(model: DiffusionGenerator, words: Vocabulary) -> dict[str, Tensor]:
    """Per text encoder the (M, d) embeddings of a vocabulary, in single precision."""
    return {
        key: input_rows(encoder)[words.ids[key].to(input_rows(encoder).device)].detach().float()
        for key, encoder in model.text_encoders.items()
    }


def input_rows(encoder: Any) -> Tensor:
    """(V, d) word embeddings of a text encoder, the parameter itself."""
    weight: Tensor = encoder.get_input_embeddings().weight
    return weight


class SoftTokens:
    """Some free token embeddings, standing in a prompt as placeholder words.

    Args:
        model: whose text encoders read them.
        count: number of tokens, k.
        avoid: texts whose tokens must not become placeholders.
        words: `vocabulary` of the model, if it is at hand.

    Attributes:
        text: the k placeholders, to be put into prompts as they are.

    Raises:
        ModelError: the vocabulary is too small.

    Example:
        >>> soft = SoftTokens(model, avoid=["a photo of {}"])  # doctest: +SKIP
        >>> with soft.injected(vectors):  # doctest: +SKIP
        ...     embedding = model.encode([f"a photo of {soft.text}"])
    """

    def __init__(
        self,
        model: DiffusionGenerator,
        count: int = 1,
        avoid: Sequence[str] = (),
        words: Vocabulary | None = None,
    ) -> None:
        self.model = model
        words = vocabulary(model) if words is None else words
        taken = {
            key: {token for ids in _plain(tokenizer, avoid) for token in ids} if avoid else set()
            for key, tokenizer in tokenizers(model).items()
        }
        # The last tokens of a byte-pair vocabulary are its rarest.
        free = [
            row
            for row in reversed(range(len(words)))
            if all(int(words.ids[key][row]) not in taken[key] for key in taken)
        ][:count]
        if len(free) < count:
            raise ModelError(
                f"the vocabulary has {len(free)} words that could stand for {count} new tokens; "
                "use fewer tokens"
            )
        self.text = " ".join(words.words[row] for row in free)
        self.ids = {key: words.ids[key][free] for key in words.ids}

    def __len__(self) -> int:
        """Number of tokens."""
        return len(next(iter(self.ids.values())))

    def readable(self, prompt: str) -> bool:
        """Whether every encoder finds each placeholder once in a prompt."""
        for key, tokenizer in tokenizers(self.model).items():
            ids = _plain(tokenizer, [prompt])[0]
            if any(ids.count(int(token)) != 1 for token in self.ids[key]):
                return False
        return True

    def initial(self, word: str | None = None) -> dict[str, Tensor]:
        """Per text encoder (k, d) vectors to start from.

        Args:
            word: start from the mean of its tokens; None takes the mean of all rows.

        Raises:
            RequestError: the word is empty.
        """
        start = {}
        for key, tokenizer in tokenizers(self.model).items():
            weight = input_rows(self.model.text_encoders[key]).detach().float()
            if word is not None:
                ids = _plain(tokenizer, [word])[0]
                if not ids:
                    raise RequestError("`init` is empty; give a word, or None for the mean of all")
                weight = weight[ids]
            start[key] = weight.mean(0).expand(len(self), -1).clone()
        return start

    @contextmanager
    def injected(self, vectors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the placeholders mean these vectors; gradients flow into them.

        Args:
            vectors: per text encoder (k, d).

        Raises:
            ModelError: an encoder reads its words in a way that the hook does not see.
        """
        fired: set[str] = set()
        with ExitStack() as stack:
            for key, encoder in self.model.text_encoders.items():
                weight = input_rows(encoder)
                for module in encoder.modules():
                    # T5 has two layers of one weight; `get_input_embeddings` is the unused one.
                    if isinstance(module, nn.Embedding) and module.weight is weight:
                        hook = _Replacement(key, self.ids[key], vectors[key], fired)
                        stack.callback(module.register_forward_hook(hook).remove)
            yield
        if fired and fired != set(self.model.text_encoders):
            missed = sorted(set(self.model.text_encoders) - fired)
            raise ModelError(
                f"{', '.join(missed)} did not use its input embeddings, so that no token could be "
                "injected; load the pipeline without offloading or wrappers"
            )


class _Replacement:
    """Forward hook that replaces the output at some tokens."""

    def __init__(self, key: str, ids: Tensor, vectors: Tensor, fired: set[str]) -> None:
        self.key, self.ids, self.vectors, self.fired = key, ids.tolist(), vectors, fired

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.fired.add(self.key)
        for token, vector in zip(self.ids, self.vectors, strict=True):
            output = torch.where((args[0] == token)[..., None], vector.to(output), output)
        return output
