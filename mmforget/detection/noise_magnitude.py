"""How strongly a prompt steers: the length of the difference that guidance multiplies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from mmforget.attacks.report import measured
from mmforget.detection.report import DetectionReport
from mmforget.detection.trajectory import ScoreTable, Steps, Trajectories, Watched
from mmforget.errors import ConfigurationError, suggest
from mmforget.models.diffusion import DiffusionGenerator

Space = Literal["noise", "raw"]


def noise_magnitude(
    model: DiffusionGenerator,
    prompts: Sequence[str],
    *,
    n: int = 4,
    steps: Steps = "all",
    sampling_steps: int | None = None,
    guidance: float | None = None,
    space: Space = "noise",
    normalised: bool = True,
    seed: int = 0,
    batch_size: int = 64,
) -> DetectionReport:
    r"""Score prompts by the magnitude of the text-conditional noise.

    :math:`\|\epsilon_\theta(x_t, y) - \epsilon_\theta(x_t, \emptyset)\|_2`, averaged over pictures
    and steps; higher is memorized. The first step alone is cheap and good where the sampler starts
    from pure noise; for schedules that keep some signal at the end it says little. Never look at
    the last step alone.

    For distilled models, which make no prediction without a prompt, a second pass with the empty
    text is made, and the report says so.

    Args:
        model: the network; it is left as it is.
        prompts: texts, at least one.
        n: pictures per prompt.
        steps: how many steps from the first one on count.
        sampling_steps: of a whole trajectory; None takes the model's own number.
        guidance: None takes the model's own scale.
        space: ``noise`` converts what the network predicts into noise, ``raw`` takes it as it is.
            The two differ by a factor per step for velocity and flow, which for flow is 0 at the
            first step.
        normalised: divide by the square root of the number of latent values; published thresholds
            are for lengths that are not divided.
        seed: of the starting noise.
        batch_size: pictures at a time.

    Returns:
        `details` per prompt: ``per_step`` (S values, mean over pictures) and ``per_picture`` (n
        values, mean over steps).

    Raises:
        RequestError, ConfigurationError, ModelError: see `Trajectories`.
        DivergenceError: a prediction is not finite.

    Reference:
        Wen, Liu, Chen, Lyu, Detecting, explaining, and mitigating memorization in diffusion
        models, 2024, arXiv 2407.21720.
    """
    check_space(model, space, steps)
    watched = Trajectories(model, prompts, n, steps, sampling_steps, guidance, seed, batch_size)
    table = ScoreTable(len(watched.prompts) * n)
    size = math.prod(model.latent_shape) if normalised else 1

    def observe(now: Watched) -> None:
        difference = text_difference(model, now, space, watched.scale)
        table.add(now, difference.float().flatten(1).norm(dim=1) / math.sqrt(size))

    with measured(model) as cost:
        watched.watch(observe)
    values = table.values(n)
    notes = []
    if model.distilled:
        notes.append(
            "the model is distilled and makes no prediction without a prompt; one with the empty "
            "text was made besides"
        )
    details: dict[str, dict[str, Any]] = {
        prompt: {"per_step": own.mean(0).tolist(), "per_picture": own.mean(1).tolist()}
        for prompt, own in zip(watched.prompts, values, strict=True)
    }
    return DetectionReport(
        name="noise_magnitude",
        scores=dict(zip(watched.prompts, values.mean((1, 2)).tolist(), strict=True)),
        higher_is_memorized=True,
        protocol={
            "space": space,
            "normalised": normalised,
            "latent_values": math.prod(model.latent_shape),
            "steps": steps,
        },
        settings=watched.settings(),
        details=details,
        queries=cost.queries,
        seconds=round(cost.seconds, 3),
        notes=tuple(notes),
    )


def check_space(model: DiffusionGenerator, space: str, steps: Steps) -> None:
    """Refuse an unknown space, and one in which nothing can be seen.

    Raises:
        ConfigurationError: names the remedy.
    """
    if space not in get_args(Space):
        raise ConfigurationError(f"`space` is '{space}', {suggest(space, get_args(Space))}")
    if space == "noise" and steps == 1 and model.prediction == "flow":
        raise ConfigurationError(
            "`steps` is 1, but at the first step of a flow the latents are the noise whatever the "
            "prompt; take `space='raw'` or more steps"
        )


def text_difference(
    model: DiffusionGenerator, now: Watched, space: Space, guidance: float
) -> Tensor:
    """(B, C, h, w) prediction for the prompts minus that for the empty text.

    Args:
        model: the network.
        now: a watched step.
        space: see `noise_magnitude`.
        guidance: embedded guidance of a distilled model.
    """
    step = now.step
    plain = unprompted(model, now, guidance)
    if space == "raw":
        return step.conditional - plain
    return model.as_noise(step.conditional, step.noisy, step.time) - model.as_noise(
        plain, step.noisy, step.time
    )


def unprompted(model: DiffusionGenerator, now: Watched, guidance: float) -> Tensor:
    """(B, C, h, w) raw prediction for the empty text, also of a distilled model."""
    if not model.distilled:
        return now.step.unconditional
    return model.predict(now.step.noisy, now.step.time, now.empty, guidance=guidance)
