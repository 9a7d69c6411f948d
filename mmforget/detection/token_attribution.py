"""Which words bring a memorized picture back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmforget.attacks.report import measured
from mmforget.attacks.soft_tokens import tokenizers
from mmforget.detection.noise_magnitude import Space, check_space, unprompted
from mmforget.detection.trajectory import Steps, Trajectories, Watched
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator


class TokenValue(NamedTuple):
    """One token of a prompt.

    Attributes:
        text: as the tokenizer spells it.
        value: how much it matters, at least 0.
        encoder: text encoder that read it, by its name in the pipeline.
    """

    text: str
    value: float
    encoder: str


@dataclass(frozen=True)
class TokenAttribution:
    """How much every token of a prompt contributes to the noise magnitude.

    Attributes:
        prompt: the text.
        tokens: those of the text itself, in order; encoder after encoder.
        ends: per text encoder the value of end and padding together: the length of their joint
            gradient.
        pooled: value of the pooled embedding, None where the family has none.
        settings: everything that shaped it.
        queries: evaluations of the denoiser.
        seconds: processor time; on a GPU, time on the clock.
    """

    prompt: str
    tokens: tuple[TokenValue, ...]
    ends: dict[str, float]
    pooled: float | None
    settings: dict[str, Any]
    queries: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        return asdict(self) | {"tokens": [one._asdict() for one in self.tokens]}


def token_attribution(
    model: DiffusionGenerator,
    prompt: str,
    *,
    n: int = 4,
    steps: Steps = "all",
    sampling_steps: int | None = None,
    guidance: float | None = None,
    space: Space = "noise",
    seed: int = 0,
    batch_size: int = 64,
) -> TokenAttribution:
    r"""Differentiate the noise magnitude with respect to the embedding of every token.

    :math:`\|\partial\,\|\epsilon_\theta(x_t, y) - \epsilon_\theta(x_t, \emptyset)\|_2 /
    \partial y_j\|_2`, averaged over pictures and steps of the usual guided trajectory. The
    prediction for the empty text is held fixed. The begin token, which is the same in every
    prompt, is left out.

    Text encoders mix words: the embedding of a token knows those before it, with T5 all of them.
    A large value says that the place matters, not that its word alone would do.

    Args:
        model: the network; it is left as it is.
        prompt: the text.
        n: pictures.
        steps: how many steps from the first one on count.
        sampling_steps: of a whole trajectory; None takes the model's own number.
        guidance: None takes the model's own scale.
        space: see `noise_magnitude`.
        seed: of the starting noise.
        batch_size: pictures at a time.

    Raises:
        RequestError, ConfigurationError, ModelError: see `Trajectories`.
        DivergenceError: a prediction is not finite.

    Reference:
        Wen, Liu, Chen, Lyu, Detecting, explaining, and mitigating memorization in diffusion
        models, 2024, arXiv 2407.21720.
    """
    check_space(model, space, steps)
    watched = Trajectories(model, [prompt], n, steps, sampling_steps, guidance, seed, batch_size)
    segments = model.segments([prompt])
    spelt = _by_segment(model, len(segments))
    groups, tokens = list[slice](), list[tuple[str, str]]()
    for (name, tokenizer), segment in zip(spelt, segments, strict=True):
        places = segment.content[0].nonzero().flatten()
        for place in places.tolist():
            text = tokenizer.convert_ids_to_tokens(int(segment.ids[0, place]))
            tokens.append((text.removesuffix("</w>").removeprefix("▁"), name))
            groups.append(slice(segment.start + place, segment.start + place + 1))
    for segment in segments:
        end = segment.begin + int(segment.content[0].sum())
        groups.append(slice(segment.start + end, segment.start + segment.ids.shape[1]))
    total = torch.zeros(len(groups) + 1, dtype=torch.float64)
    count = 0

    def observe(now: Watched) -> None:
        nonlocal count
        states, pooled = _gradients(model, now, space, watched.scale)
        for row, place in enumerate(groups):
            total[row] += states[:, place].flatten(1).norm(dim=1).sum().double().cpu()
        if pooled is not None:
            total[-1] += pooled.norm(dim=1).sum().double().cpu()
        count += len(now.rows)

    with measured(model) as cost:
        watched.watch(observe)
    values = (total / count).tolist()
    own = [TokenValue(t, v, name) for (t, name), v in zip(tokens, values, strict=False)]
    ends = {name: values[len(tokens) + row] for row, (name, _) in enumerate(spelt)}
    return TokenAttribution(
        prompt=prompt,
        tokens=tuple(own),
        ends=ends,
        pooled=None if model.unconditional().pooled is None else values[-1],
        settings=watched.settings() | {"space": space},
        queries=cost.queries,
        seconds=round(cost.seconds, 3),
    )


def _by_segment(model: DiffusionGenerator, count: int) -> list[tuple[str, Any]]:
    """Name and tokenizer of the encoder that stands for each segment of the token states."""
    found = list(tokenizers(model).items())
    # FLUX takes its states from T5 alone; SDXL and SD3 join two CLIP encoders feature by feature.
    if model.kind == "flux":
        return found[1:]
    return [found[0], *found[2:]][:count]


@torch.enable_grad()
def _gradients(
    model: DiffusionGenerator, now: Watched, space: Space, guidance: float
) -> tuple[Tensor, Tensor | None]:
    """Of the magnitudes with respect to states (B, L, d) and pooled embedding (B, p)."""
    step = now.step
    plain = unprompted(model, now, guidance).detach()
    leaves = [
        part.detach().clone().requires_grad_(True)
        for part in (now.embedding.states, now.embedding.pooled)
        if part is not None
    ]
    found = model.predict(step.noisy, step.time, PromptEmbedding(*leaves), guidance=guidance)
    if space == "noise":
        found, plain = (model.as_noise(part, step.noisy, step.time) for part in (found, plain))
    # Pictures do not depend on each other, so the gradient of the sum is that of each.
    magnitude = (found - plain).float().flatten(1).norm(dim=1).sum()
    states, *pooled = torch.autograd.grad(magnitude, leaves)
    return states.float(), pooled[0].float() if pooled else None
