"""What detectors look at: the first steps, or all, of the usual trajectories of some prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmforget.concept import normalised
from mmforget.errors import ConfigurationError, DivergenceError, RequestError
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator, SamplingStep
from mmforget.seeds import derive, generator

Steps = int | Literal["all"]


@dataclass(frozen=True)
class Watched:
    """One step of a batch, handed to a detector.

    Attributes:
        rows: (B,) positions in the table of prompts and numbers, n per prompt.
        number: of the step, from 0.
        step: what the network got and gave.
        embedding: of the B prompts.
        empty: what guidance leads away from, B rows.
    """

    rows: Tensor
    number: int
    step: SamplingStep
    embedding: PromptEmbedding
    empty: PromptEmbedding


class _Enough(Exception):
    """Ends a trajectory whose later steps nobody wants to see."""


@dataclass(frozen=True)
class Trajectories:
    """Guided sampling of n pictures per prompt, watched step by step.

    Args:
        model: the network. Detecting on the CPU needs single precision.
        prompts: texts; equal ones are watched once.
        n: pictures per prompt.
        steps: how many steps from the first one on are watched.
        sampling_steps: of a whole trajectory; None takes the model's own number.
        guidance: None takes the model's own scale.
        seed: of the starting noise, which is other noise than that of pictures with this seed.
        batch_size: pictures at a time.

    Raises:
        RequestError: no prompt, an empty one, or one that an encoder would truncate.
        ConfigurationError: a number out of range.
        ModelError: half precision on the CPU.
    """

    model: DiffusionGenerator
    prompts: Sequence[str]
    n: int
    steps: Steps
    sampling_steps: int | None
    guidance: float | None
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        self.model.require_full_precision("detection")
        self.model.check_length(self.prompts)
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(self.prompts)))
        for prompt in self.prompts:
            if not normalised(prompt):
                raise RequestError(
                    "`prompts` has an empty text, with which all others are compared; leave it out"
                )
        total = self.model.steps if self.sampling_steps is None else self.sampling_steps
        object.__setattr__(self, "sampling_steps", total)
        if self.guidance is None:
            object.__setattr__(self, "guidance", self.model.guidance)
        for name, value in (
            ("n", self.n),
            ("sampling_steps", total),
            ("batch_size", self.batch_size),
            ("steps", 1 if self.steps == "all" else self.steps),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"`{name}` is {value!r}, it must be at least 1")
        if self.steps != "all" and self.steps > total:
            raise ConfigurationError(
                f"`steps` is {self.steps}, but a trajectory has {total}; take at most as many, or "
                "'all'"
            )

    @property
    def scale(self) -> float:
        """The guidance scale, whoever chose it."""
        assert self.guidance is not None
        return self.guidance

    def watch(
        self,
        observe: Callable[[Watched], None],
        before: Callable[[float, slice], None] | None = None,
    ) -> None:
        """Sample, and hand over every watched step; the pictures themselves are not made.

        Args:
            observe: receives the steps.
            before: see `DiffusionGenerator.sample`.
        """
        model, seed = self.model, derive(self.seed, "detection")
        empty = model.unconditional()
        keys = [(prompt, number) for prompt in self.prompts for number in range(self.n)]
        for start in range(0, len(keys), self.batch_size):
            part = keys[start : start + self.batch_size]
            texts = list(dict.fromkeys(prompt for prompt, _ in part))
            where = torch.tensor([texts.index(prompt) for prompt, _ in part])
            table = model.encode(texts)
            embedding = table[where.to(table.states.device)]
            self._watch(part, torch.arange(start, start + len(part)), embedding, empty,
                        seed, observe, before)  # fmt: skip

    @torch.no_grad()
    def _watch(
        self,
        keys: list[tuple[str, int]],
        rows: Tensor,
        embedding: PromptEmbedding,
        empty: PromptEmbedding,
        seed: int,
        observe: Callable[[Watched], None],
        before: Callable[[float, slice], None] | None,
    ) -> None:
        number = 0
        every = torch.zeros(len(keys), dtype=torch.long, device=empty.states.device)

        def record(step: SamplingStep) -> None:
            nonlocal number
            if not bool(step.conditional.isfinite().all()):
                raise DivergenceError(
                    f"the predictions for '{keys[0][0][:60]}' are not finite; if the model is in "
                    "half precision, load it with `torch_dtype=torch.float32`, else it is damaged"
                )
            observe(Watched(rows, number, step, embedding, empty[every]))
            number += 1
            if number == self.steps:
                raise _Enough

        noise = [self.model.noise([prompt], 1, seed, first=place) for prompt, place in keys]
        try:
            self.model.sample(
                torch.cat(noise),
                embedding,
                empty,
                steps=self.sampling_steps,
                guidance=self.guidance,
                record=record,
                draws=[generator(seed, "sampler", prompt, place) for prompt, place in keys],
                before=before,
            )
        except _Enough:
            return

    def settings(self) -> dict[str, Any]:
        """Plain data for the report."""
        return {
            "n": self.n,
            "steps": self.steps,
            "sampling_steps": self.sampling_steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "scheduler": type(self.model.pipeline.scheduler).__name__,
            "prediction": self.model.prediction,
        }


class ScoreTable:
    """Values per picture and step, collected batch by batch.

    Args:
        pictures: number of pictures of all prompts, n per prompt.
    """

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures
        self._steps: dict[int, Tensor] = {}

    def add(self, watched: Watched, values: Tensor) -> None:
        """Note (B,) values of one step."""
        column = self._steps.setdefault(watched.number, torch.zeros(self.pictures).double())
        column[watched.rows] = values.double().cpu()

    def values(self, n: int) -> Tensor:
        """(P, n, S) float64."""
        return torch.stack([self._steps[key] for key in sorted(self._steps)], 1).unflatten(
            0, (-1, n)
        )
