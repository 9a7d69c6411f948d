"""Sharpness against differences of scores at two points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmforget.detection import sharpness
from mmforget.errors import ConfigurationError, ModelError
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPT = "a red car"


def tiny(kind: TinyKind) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=4, guidance=3.0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_the_bend_is_a_difference_quotient_of_scores(kind: TinyKind) -> None:
    model = tiny(kind)
    before = state_hash(model)
    found = sharpness(model, [PROMPT], n=1, normalised=False)
    assert state_hash(model) == before
    noise = model.noise([PROMPT], 1, derive(0, "detection"))
    scheduler, times = model.schedule(4, noise)
    time = times[:1]
    noisy = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, times[0])
    model.network.double()  # small differences of large numbers
    noisy, empty = noisy.double(), model.unconditional()
    embedding = model.encode([PROMPT])
    signal = model.pipeline.scheduler.alphas_cumprod[int(time)].double()
    level = (1 - signal).sqrt()

    def score(latents: Tensor, y: object) -> Tensor:
        out = model.predict(latents, time, y)  # type: ignore[arg-type]
        if model.prediction == "v_prediction":
            out = signal.sqrt() * out + level * latents
        return -out / level

    v = score(noisy, embedding) - score(noisy, empty)
    bends = [
        (score(noisy + 1e-3 * v, y) - score(noisy - 1e-3 * v, y)) / 2e-3 for y in (embedding, empty)
    ]
    assert found.scores[PROMPT] == pytest.approx(float((bends[0] - bends[1]).norm()), rel=1e-2)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flows_need_a_second_step(kind: TinyKind) -> None:
    with pytest.raises(ConfigurationError, match="at least 2"):
        sharpness(tiny(kind), [PROMPT])
    found = sharpness(tiny(kind), [PROMPT], n=1, steps=2)
    first, second = found.details[PROMPT]["per_step"]
    assert first == 0 < second


def test_half_precision_is_refused() -> None:
    model = tiny("sd")
    model.network.half()
    with pytest.raises(ModelError, match="single precision"):
        sharpness(model, [PROMPT])


def test_planted_memories_are_sharp(
    memorizing: DiffusionGenerator, memorized: list[str], harmless: list[str]
) -> None:
    report = sharpness(memorizing, memorized + harmless, n=1, steps=1)
    assert report.quality(memorized, harmless)["auc"] >= 0.95
