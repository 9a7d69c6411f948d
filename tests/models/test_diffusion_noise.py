"""Raw predictions as noise, and the hook before every pass of a trajectory."""

from __future__ import annotations

from typing import Any, get_args

import diffusers
import pytest
import torch
from torch import Tensor

from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator, SamplingStep
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

KINDS = get_args(TinyKind)
PREDICTIONS = {"sd": "epsilon", "sd2": "v_prediction", "sd3": "flow", "flux": "flow"}
PROMPTS = ["a red cat", "a dog"]


def made(kind: TinyKind, **settings: Any) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), **({"steps": 3} | settings))


def drawn(model: DiffusionGenerator, count: int, seed: int) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


# ---- as noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_noise_is_recovered_from_a_perfect_prediction(kind: TinyKind) -> None:
    model = made(kind)
    assert model.prediction == PREDICTIONS[kind]
    latents, noise = drawn(model, 4, 0), drawn(model, 4, 1)
    time = torch.tensor([1, 250, 600, 999])
    noisy, target = model.noised(latents, noise, time), model.target(latents, noise, time)
    assert torch.allclose(model.as_noise(target, noisy, time), noise, atol=1e-4)
    # Only a network that predicts noise already returns it.
    assert torch.allclose(target, noise) == (model.prediction == "epsilon")


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("sd", lambda m, t: 1.0), ("sd3", lambda m, t: 1 - t / 1000),
     ("sd2", lambda m, t: float(m.pipeline.scheduler.alphas_cumprod[t].sqrt()))],
)  # fmt: skip
def test_differences_of_predictions_are_scaled_by_the_share_of_the_picture(
    kind: TinyKind, factor: Any
) -> None:
    model = made(kind)
    noisy, first, second = (drawn(model, 1, seed) for seed in range(3))
    for number in (1, 400, 999):
        time = torch.tensor([number])
        found = model.as_noise(first, noisy, time) - model.as_noise(second, noisy, time)
        expected = factor(model, number) * (first - second)
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_prediction_is_not_the_noise(kind: TinyKind) -> None:
    model = made(kind)
    latents, noise = drawn(model, 2, 0), drawn(model, 2, 1)
    time = torch.tensor([100, 500])
    noisy, target = model.noised(latents, noise, time), model.target(latents, noise, time)
    assert not torch.allclose(model.as_noise(target + 0.5, noisy, time), noise, atol=0.05)


def test_noise_keeps_the_precision_and_the_gradient() -> None:
    model = made("sd2")
    noisy = drawn(model, 1, 0).double()
    found = drawn(model, 1, 1).double().requires_grad_(True)
    noise = model.as_noise(found, noisy, torch.tensor([300]))
    assert noise.dtype == torch.float64
    noise.sum().backward()
    assert found.grad is not None and bool((found.grad > 0).all())


# ---- the hook before every pass -----------------------------------------------------------------


def sampled(
    model: DiffusionGenerator, guidance: float, record: Any = None
) -> tuple[list[tuple[float, slice]], list[int], list[float], Tensor]:
    """Calls of the hook, sizes and times of the passes, and what came out."""
    calls: list[tuple[float, slice]] = []
    sizes: list[int] = []
    predict = model.predict

    def watched(noisy: Tensor, time: Tensor, embedding: PromptEmbedding, **more: Any) -> Tensor:
        assert len(calls) == len(sizes) + 1, "the hook comes before the pass"
        sizes.append(len(noisy))
        times.append(float(time))
        return predict(noisy, time, embedding, **more)

    times: list[float] = []
    model.predict = watched  # type: ignore[method-assign]
    with torch.no_grad():
        found = model.sample(
            drawn(model, 2, 0),
            model.encode(PROMPTS),
            model.unconditional(),
            guidance=guidance,
            record=record,
            before=lambda time, rows: calls.append((time, rows)),
        )
    return calls, sizes, times, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_hook_gets_every_time_and_the_rows_that_are_conditioned(
    kind: TinyKind, guidance: float
) -> None:
    model = made(kind)
    calls, sizes, times, _ = sampled(model, guidance)
    assert len(calls) == 3 and [time for time, _ in calls] == times
    guided = guidance > 1 and not model.distilled
    assert sizes == [4 if guided else 2] * 3
    assert all(rows == (slice(2, 4) if guided else slice(0, 2)) for _, rows in calls)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_recording_without_guidance_makes_both_passes(kind: TinyKind) -> None:
    model = made(kind)
    steps: list[SamplingStep] = []
    calls, sizes, _, _ = sampled(model, 1.0, record=steps.append)
    assert len(steps) == 3
    if model.distilled:
        assert sizes == [2] * 3 and calls[0][1] == slice(0, 2)
        assert torch.equal(steps[0].conditional, steps[0].unconditional)
    else:
        assert sizes == [4] * 3 and calls[0][1] == slice(2, 4)
        assert not torch.equal(steps[0].conditional, steps[0].unconditional)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_the_rows_that_the_hook_names_are_those_that_depend_on_the_prompts(
    kind: TinyKind,
) -> None:
    model = made(kind, steps=1)
    seen: list[Tensor] = []
    rows: list[slice] = []
    handle = model.network.register_forward_hook(
        lambda module, args, output: seen.append(output[0].detach())
    )
    with torch.no_grad():
        for prompts in (PROMPTS, ["a blue house", "van gogh"]):
            model.sample(
                drawn(model, 2, 0),
                model.encode(prompts),
                model.unconditional(),
                before=lambda time, part: rows.append(part),
            )
    handle.remove()
    assert rows == [slice(2, 4)] * 2
    assert torch.equal(seen[0][:2], seen[1][:2])
    assert not torch.allclose(seen[0][2:], seen[1][2:], atol=1e-4)


def test_the_hook_comes_as_often_as_a_sampler_asks_the_network() -> None:
    model = made("sdxl")
    pipe = model.pipeline
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    calls, sizes, _, _ = sampled(model, 3.0)
    assert len(calls) == len(sizes) == 5  # two evaluations per step, one for the last


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_the_hook_changes_nothing_by_itself(kind: TinyKind) -> None:
    model = made(kind)
    with torch.no_grad():
        plain = model.sample(drawn(model, 2, 0), model.encode(PROMPTS), model.unconditional())
    assert torch.equal(sampled(model, model.guidance)[3], plain)
