"""The common form of mitigations at inference time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DivergenceError
from mmforget.models.base import PromptEmbedding, frozen
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator

Key = tuple[str, int]
"""Which picture: a prompt and a number."""

Before = Callable[[float, slice], None]
"""Called before every pass of the network, see `DiffusionGenerator.sample`."""


@dataclass(frozen=True)
class PromptMitigation:
    """A way to draw a prompt so that the picture which it has memorized does not appear.

    A subclass is a frozen dataclass of its settings. It changes the embedding of a prompt, how the
    network reads it, or both.
    """

    def embedding(
        self, model: DiffusionGenerator, keys: Sequence[Key], seed: int = 0
    ) -> PromptEmbedding:
        """What is drawn instead of the prompts.

        Args:
            model: the network.
            keys: B prompts and numbers of pictures; what is random differs from picture to picture.
            seed: of what is random.

        Returns:
            B rows; those of equal keys are equal, whatever the others are.

        Raises:
            RequestError: a prompt that an encoder would truncate.
        """
        texts = list(dict.fromkeys(prompt for prompt, _ in keys))
        rows = torch.tensor([texts.index(prompt) for prompt, _ in keys])
        table = model.encode(texts)
        return table[rows.to(table.states.device)]

    @contextmanager
    def reading(self, model: DiffusionGenerator, prompts: Sequence[str]) -> Iterator[Before | None]:
        """Change how the network reads, for a while.

        Args:
            model: the network.
            prompts: B texts, those of the rows of the batches that come.

        Yields:
            What is to be called before every pass.
        """
        yield None

    def to_dict(self) -> dict[str, Any]:
        """Settings with the key ``mitigation``, the class name."""
        return {"mitigation": type(self).__name__, **asdict(self)}


def mitigated_pictures(
    model: DiffusionGenerator,
    mitigation: PromptMitigation,
    prompts: Sequence[str],
    n: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw prompts under a mitigation, from the noise that `DiffusionGenerator.generate` uses.

    Pictures of the same seed, prompt and number with and without mitigation are comparable one by
    one. The model is left as it is.

    Args:
        model: the network.
        mitigation: what to do with the prompts.
        prompts: texts, at least one.
        n: pictures per prompt.
        seed: of starting noise, sampler and mitigation.
        steps: sampling steps; None takes the model's own number.
        guidance: None takes the model's own scale.
        batch_size: pictures at a time.
        progress: called with the number of pictures made so far after every batch.

    Returns:
        (len(prompts) * n, 3, H, W) float32 in [0, 1], on the CPU.

    Raises:
        RequestError: no prompts, or one that an encoder would truncate.
        ConfigurationError: a number below 1.
        ModelError: half precision on the CPU.
        DivergenceError: a picture is not finite.
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")
    model.require_full_precision("`mitigated_pictures`")
    model.check_length(prompts)
    made: list[Tensor] = []
    with frozen(model):
        empty = model.unconditional()
        # Whole prompts at a time, so that nothing is computed twice for one.
        together = max(1, batch_size // n)
        for first in range(0, len(prompts), together):
            part = prompts[first : first + together]
            keys = [(prompt, number) for prompt in part for number in range(n)]
            embedding = mitigation.embedding(model, keys, seed)
            for start in range(0, len(keys), batch_size):
                rows = slice(start, start + batch_size)
                latents = _drawn(model, mitigation, keys[rows], embedding[rows], empty, seed,
                                 steps, guidance)  # fmt: skip
                if not bool(latents.isfinite().all()):
                    raise DivergenceError(
                        f"the pictures for '{keys[rows][0][0][:60]}' are not finite; mitigate "
                        "less, or load the model in single precision"
                    )
                with torch.no_grad():
                    made.append(model.to_images(latents).float().cpu())
                if progress is not None:
                    progress(sum(map(len, made)))
    return torch.cat(made)


@torch.no_grad()
def _drawn(
    model: DiffusionGenerator,
    mitigation: PromptMitigation,
    keys: Sequence[Key],
    embedding: PromptEmbedding,
    empty: PromptEmbedding,
    seed: int,
    steps: int | None,
    guidance: float | None,
) -> Tensor:
    """(B, C, h, w) latents."""
    noise = [model.noise([prompt], 1, seed, first=number) for prompt, number in keys]
    with mitigation.reading(model, [prompt for prompt, _ in keys]) as before:
        return model.sample(
            torch.cat(noise),
            embedding,
            empty,
            steps=steps,
            guidance=guidance,
            draws=[generator(seed, "sampler", prompt, number) for prompt, number in keys],
            before=before,
        )
