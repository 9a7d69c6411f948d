"""How sharply a prompt bends the density of latents: memorized pictures sit on narrow peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.report import measured
from mmforget.detection.report import DetectionReport
from mmforget.detection.trajectory import ScoreTable, Steps, Trajectories, Watched
from mmforget.errors import ConfigurationError, ModelError
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator


def sharpness(
    model: DiffusionGenerator,
    prompts: Sequence[str],
    *,
    n: int = 4,
    steps: Steps = 1,
    sampling_steps: int | None = None,
    guidance: float | None = None,
    normalised: bool = True,
    seed: int = 0,
    batch_size: int = 64,
) -> DetectionReport:
    r"""Score prompts by the curvature that they add to the log-density of noisy latents.

    :math:`\|J_y v - J_\emptyset v\|_2` with :math:`v = s(x_t, y) - s(x_t, \emptyset)`, the
    difference of the scores :math:`s = -\epsilon_\theta / \sigma_t`, and their Jacobians J with
    respect to the latents; higher is memorized. One derivative in forward mode, no second pass
    backwards.

    Args:
        model: the network, in single precision; it is left as it is.
        prompts: texts, at least one.
        n: pictures per prompt.
        steps: how many steps from the first one on count. A flow needs at least 2: at its first
            step the latents are the noise whatever the prompt.
        sampling_steps: of a whole trajectory; None takes the model's own number.
        guidance: None takes the model's own scale.
        normalised: divide by the square root of the number of latent values.
        seed: of the starting noise.
        batch_size: pictures at a time.

    Returns:
        `details` per prompt: ``per_step`` (S values, mean over pictures).

    Raises:
        ModelError: not in single precision.
        ConfigurationError: one step of a flow, or see `Trajectories`.
        RequestError: see `Trajectories`.
        DivergenceError: a prediction is not finite.

    Reference:
        Jeon, Kim, No, Understanding and mitigating memorization in generative models via sharpness
        of probability landscapes, 2025, arXiv 2412.04140.
    """
    if model.dtype_of_network != torch.float32:
        raise ModelError(
            f"the sharpness needs single precision, the pipeline has "
            f"{str(model.dtype_of_network).removeprefix('torch.')}; load it with "
            "`torch_dtype=torch.float32`"
        )
    if steps == 1 and model.prediction == "flow":
        raise ConfigurationError(
            "`steps` is 1, but at the first step of a flow the latents are the noise whatever the "
            "prompt; take at least 2"
        )
    watched = Trajectories(model, prompts, n, steps, sampling_steps, guidance, seed, batch_size)
    table = ScoreTable(len(watched.prompts) * n)
    size = math.prod(model.latent_shape) if normalised else 1

    def observe(now: Watched) -> None:
        table.add(now, _bend(model, now, watched.scale).flatten(1).norm(dim=1) / math.sqrt(size))

    with measured(model) as cost:
        watched.watch(observe)
    values = table.values(n)
    details: dict[str, dict[str, Any]] = {
        prompt: {"per_step": own.mean(0).tolist()}
        for prompt, own in zip(watched.prompts, values, strict=True)
    }
    return DetectionReport(
        name="sharpness",
        scores=dict(zip(watched.prompts, values.mean((1, 2)).tolist(), strict=True)),
        higher_is_memorized=True,
        protocol={
            "normalised": normalised,
            "latent_values": math.prod(model.latent_shape),
            "steps": steps,
        },
        settings=watched.settings(),
        details=details,
        queries=cost.queries,
        seconds=round(cost.seconds, 3),
    )


def _bend(model: DiffusionGenerator, now: Watched, guidance: float) -> Tensor:
    """(B, C, h, w) derivative of the difference of scores along itself."""
    noisy, time = now.step.noisy, now.step.time
    # What is left of noise 1 on a picture of 0 is the noise level.
    level = model.noised(torch.zeros_like(noisy), torch.ones_like(noisy), time)
    both = PromptEmbedding.cat([now.embedding, now.empty])

    def difference(latents: Tensor) -> Tensor:
        twice, times = torch.cat([latents] * 2), torch.cat([time] * 2)
        found = model.as_noise(model.predict(twice, times, both, guidance), twice, times)
        conditional, plain = found.chunk(2)
        return -(conditional - plain) / level

    # Fast attention has no derivative in forward mode.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        along = difference(noisy)
        return torch.func.jvp(difference, (noisy,), (along,))[1]
