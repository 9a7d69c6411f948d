"""Embeddings that are moved until they steer no more than those of ordinary prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mmforget.detection.noise_magnitude import Space, check_space, noise_magnitude, unprompted
from mmforget.detection.trajectory import Trajectories, Watched
from mmforget.errors import ConfigurationError, DivergenceError, RequestError
from mmforget.mitigation.base import Key, PromptMitigation
from mmforget.models.base import PromptEmbedding, frozen
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive


@dataclass(frozen=True)
class OptimisedEmbedding:
    """What became of P prompts.

    Attributes:
        embedding: P rows.
        before: (P,) magnitudes at the start.
        after: (P,) magnitudes at the end.
        iterations: (P,) int64 steps of the optimiser.
        reached: (P,) bool, whether the target was reached.
    """

    embedding: PromptEmbedding
    before: Tensor
    after: Tensor
    iterations: Tensor
    reached: Tensor


@dataclass(frozen=True)
class _Inputs:
    """What the network sees at one step of all trajectories: B pictures, n per prompt."""

    noisy: Tensor
    time: Tensor
    plain: Tensor


@dataclass(frozen=True)
class EmbeddingOptimisation(PromptMitigation):
    r"""Gradient steps on the embedding of a prompt, against its text-conditional noise.

    Minimises the mean of :math:`\|\epsilon_\theta(x_t, y) - \epsilon_\theta(x_t, \emptyset)\|_2`
    over n pictures and the first sampling steps, by AdamW on the token states :math:`y`, and stops
    at a target. Begin tokens and the pooled embedding stay. Then the new embedding is drawn as
    usual. The paper looks at the first step alone, which suffices where samplers start from pure
    noise; there, its target for Stable Diffusion 1.4 is a length of 3, which is 0.023 here.

    One embedding serves all pictures of a prompt. It is found on other noise than theirs.

    Args:
        target: magnitude at which to stop, as `mmforget.detection.noise_magnitude` measures it
            with the same settings: length divided by the square root of the number of latent
            values. See `calibrated`.
        n: pictures per prompt that the magnitude is averaged over.
        steps: how many sampling steps, from the first one on, count.
        iterations: of the optimiser, at most.
        lr: learning rate, in units of the standard deviation of the states of the empty prompt,
            which is about 1 for CLIP ViT-L, for which the published 0.05 is meant.
        space: see `noise_magnitude`.
        sampling_steps: of a whole trajectory; None takes the model's own number.
        guidance: of the trajectory, if `steps` is above 1; None takes the model's own scale.
        batch_size: pictures at a time.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Wen, Liu, Chen, Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion
        Models", 2024, arXiv:2407.21720.
    """

    target: float
    n: int = 4
    steps: int = 1
    iterations: int = 10
    lr: float = 0.05
    space: Space = "noise"
    sampling_steps: int | None = None
    guidance: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not self.target >= 0:
            raise ConfigurationError(f"`target` is {self.target}, it must be at least 0")
        if not self.lr > 0:
            raise ConfigurationError(f"`lr` is {self.lr}, it must be above 0")
        for name in ("n", "steps", "iterations", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"`{name}` is {value!r}, it must be at least 1")

    @classmethod
    def calibrated(
        cls,
        model: DiffusionGenerator,
        ordinary: Sequence[str],
        quantile: float = 0.5,
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """Take as target a quantile of the magnitudes of prompts that are not memorized.

        Args:
            model: the network.
            ordinary: such prompts, at least one.
            quantile: 0 to 1; the median by default.
            seed: of the noise.
            settings: all others of the class.

        Raises:
            ConfigurationError: a setting out of range.
            RequestError: no prompts, or one that an encoder would truncate.
        """
        if not 0 <= quantile <= 1:
            raise ConfigurationError(f"`quantile` is {quantile}, it must be from 0 to 1")
        one = cls(target=0.0, **settings)
        report = noise_magnitude(
            model,
            ordinary,
            n=one.n,
            steps=one.steps,
            sampling_steps=one.sampling_steps,
            guidance=one.guidance,
            space=one.space,
            seed=derive(seed, "embedding-optimisation-target"),
            batch_size=one.batch_size,
        )
        scores = torch.tensor(list(report.scores.values()), dtype=torch.float64)
        return cls(target=float(scores.quantile(quantile)), **settings)

    def embedding(
        self, model: DiffusionGenerator, keys: Sequence[Key], seed: int = 0
    ) -> PromptEmbedding:
        """Embed and optimise every prompt once; see `PromptMitigation.embedding`."""
        texts = list(dict.fromkeys(prompt for prompt, _ in keys))
        found = self.optimised(model, texts, seed).embedding
        rows = torch.tensor([texts.index(prompt) for prompt, _ in keys])
        return found[rows.to(found.states.device)]

    def optimised(
        self, model: DiffusionGenerator, prompts: Sequence[str], seed: int = 0
    ) -> OptimisedEmbedding:
        """Optimise the embeddings of prompts, each for itself.

        Args:
            model: the network; it is left as it is.
            prompts: P different texts, none of them empty.
            seed: of the noise.

        Raises:
            RequestError, ConfigurationError, ModelError: see
                `mmforget.detection.trajectory.Trajectories`.
            DivergenceError: a prediction is not finite.
        """
        check_space(model, self.space, self.steps)
        if len(set(prompts)) < len(prompts):
            raise RequestError("`prompts` has a text twice; give every prompt once")
        together = max(1, self.batch_size // self.n)
        with frozen(model):
            parts = [
                self._part(model, prompts[start : start + together], seed)
                for start in range(0, len(prompts), together)
            ]
        return OptimisedEmbedding(
            PromptEmbedding.cat([part.embedding for part in parts]),
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("before", "after", "iterations", "reached")
            ),
        )

    def _part(
        self, model: DiffusionGenerator, prompts: Sequence[str], seed: int
    ) -> OptimisedEmbedding:
        inputs = self._inputs(model, prompts, seed)
        with torch.no_grad():
            start = model.encode(prompts)
            scale = float(model.encode([""]).states.float().std())
        states = start.states.float().clone().requires_grad_(True)
        fixed = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        for segment in model.segments(prompts):
            fixed[:, segment.start : segment.start + segment.begin] = True
        optimizer = torch.optim.AdamW([states], lr=self.lr * scale)
        values, gradient = self._magnitude(model, inputs, states, start.pooled)
        before, made = values, torch.zeros(len(prompts), dtype=torch.long)
        for _ in range(self.iterations):
            open_rows = values > self.target
            if not bool(open_rows.any()):
                break
            kept = states.detach().clone()
            states.grad = gradient
            optimizer.step()
            with torch.no_grad():
                moved = open_rows.to(states.device)[:, None] & ~fixed
                states.copy_(torch.where(moved[..., None], states, kept))
            made += open_rows
            values, gradient = self._magnitude(model, inputs, states, start.pooled)
        final = PromptEmbedding(states.detach().to(start.states.dtype), start.pooled)
        return OptimisedEmbedding(final, before, values, made, values <= self.target)

    def _inputs(
        self, model: DiffusionGenerator, prompts: Sequence[str], seed: int
    ) -> list[_Inputs]:
        """Per step what the network sees on the way to the pictures of the unchanged prompts."""
        found: dict[int, list[Watched]] = {}
        trajectories = Trajectories(
            model,
            prompts,
            self.n,
            self.steps,
            self.sampling_steps,
            self.guidance,
            derive(seed, "embedding-optimisation"),
            self.batch_size,
        )
        trajectories.watch(lambda now: found.setdefault(now.number, []).append(now))
        with torch.no_grad():
            return [
                _Inputs(
                    torch.cat([now.step.noisy for now in parts]),
                    torch.cat([now.step.time for now in parts]),
                    torch.cat([unprompted(model, now, trajectories.scale) for now in parts]),
                )
                for _, parts in sorted(found.items())
            ]

    def _magnitude(
        self,
        model: DiffusionGenerator,
        inputs: Sequence[_Inputs],
        states: Tensor,
        pooled: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(P,) magnitudes and the gradient (P, L, d) of their sum."""
        every = torch.arange(len(states), device=states.device).repeat_interleave(self.n)
        # A distilled model takes the scale of its trajectory also here, as in `noise_magnitude`.
        scale = model.guidance if self.guidance is None else self.guidance
        values, gradient = torch.zeros(len(states)), torch.zeros_like(states)
        for one in inputs:
            embedding = PromptEmbedding(states, pooled)[every]
            with torch.enable_grad():
                found = model.predict(one.noisy, one.time, embedding, guidance=scale)
                difference = found - one.plain
                if self.space == "noise":
                    difference = model.as_noise(found, one.noisy, one.time) - model.as_noise(
                        one.plain, one.noisy, one.time
                    )
                flat = difference.float().flatten(1)
                lengths = flat.norm(dim=1).unflatten(0, (-1, self.n)).mean(1)
                lengths = lengths / (flat.shape[1] ** 0.5 * len(inputs))
                gradient += torch.autograd.grad(lengths.sum(), states)[0]
            values += lengths.detach().cpu()
        if not bool(values.isfinite().all() and gradient.isfinite().all()):
            raise DivergenceError(
                f"the prediction for a prompt is not finite; lower `lr`, which is {self.lr}, or "
                "load the model in single precision"
            )
        return values, gradient
