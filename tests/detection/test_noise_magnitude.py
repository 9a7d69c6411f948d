"""Noise magnitudes against a loop of our own, for every family of pipelines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmforget.detection import DetectionReport, noise_magnitude
from mmforget.errors import ConfigurationError, ModelError, RequestError
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPTS = ["a red car", "a church by van gogh"]


def tiny(kind: TinyKind, **settings: float) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=4, guidance=3.0, **settings)  # type: ignore[arg-type]


def by_hand(model: DiffusionGenerator, prompt: str, space: str) -> torch.Tensor:
    """(S,) magnitudes of the first picture of a prompt, pass by pass."""
    noise = model.noise([prompt], 1, derive(0, "detection"))
    embedding, empty = model.encode([prompt]), model.unconditional()
    scheduler, times = model.schedule(4, noise)
    latents, found = noise * getattr(scheduler, "init_noise_sigma", 1.0), []
    for time in times:
        scaled = latents
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latents, time)
        one, none = (model.predict(scaled, time, y, guidance=3.0) for y in (embedding, empty))
        factor = torch.ones(())
        if space == "noise" and model.prediction == "flow":
            factor = 1 - time / 1000
        elif space == "noise" and model.prediction == "v_prediction":
            factor = model.pipeline.scheduler.alphas_cumprod[int(time)].sqrt()
        found.append(factor * (one - none).norm())
        guided = one if model.distilled else none + 3.0 * (one - none)
        latents = scheduler.step(guided, time, latents, return_dict=False)[0]
    return torch.stack(found).detach()


@pytest.mark.parametrize("space", ["noise", "raw"])
@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "flux"])
def test_the_magnitude_is_the_length_of_the_guided_difference(kind: TinyKind, space: str) -> None:
    model = tiny(kind)
    found = noise_magnitude(model, PROMPTS, n=1, normalised=False, space=space)  # type: ignore[arg-type]
    for prompt in PROMPTS:
        expected = by_hand(model, prompt, space)
        steps = torch.tensor(found.details[prompt]["per_step"])
        torch.testing.assert_close(steps, expected.double().float(), rtol=2e-3, atol=1e-5)
        assert found.scores[prompt] == pytest.approx(float(expected.mean()), rel=2e-3)
    # one pass with and one without the prompt, also where the model itself makes only one
    assert found.queries == len(PROMPTS) * 4 * 2
    assert any("distilled" in note for note in found.notes) == (kind == "flux")


def test_the_model_is_left_as_it_is() -> None:
    model = tiny("sd")
    model.network.train()
    before, random = state_hash(model), torch.get_rng_state()
    noise_magnitude(model, PROMPTS, n=1, steps=1)
    assert state_hash(model) == before and model.network.training
    assert all(p.grad is None and p.requires_grad for p in model.network.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_scores_depend_on_neither_batches_nor_company_but_on_the_seed() -> None:
    model = tiny("sd")
    together = noise_magnitude(model, [*PROMPTS, PROMPTS[0]], n=3, batch_size=5)
    alone = noise_magnitude(model, PROMPTS[1:], n=3)
    assert list(together.scores) == PROMPTS
    assert together.scores[PROMPTS[1]] == pytest.approx(alone.scores[PROMPTS[1]], rel=1e-4)
    per_picture = together.details[PROMPTS[1]]["per_picture"]
    assert len(set(per_picture)) == 3
    assert sum(per_picture) / 3 == pytest.approx(together.scores[PROMPTS[1]])
    other = noise_magnitude(model, PROMPTS[1:], n=3, seed=1)
    assert other.scores[PROMPTS[1]] != alone.scores[PROMPTS[1]]


def test_only_the_first_steps_are_sampled() -> None:
    model = tiny("sd")
    short, full = (noise_magnitude(model, PROMPTS, n=2, steps=s) for s in (1, "all"))  # type: ignore[arg-type]
    assert (short.queries, full.queries) == (8, 32)
    own = full.details[PROMPTS[0]]["per_step"]
    assert short.scores[PROMPTS[0]] == pytest.approx(own[0], rel=1e-5)
    assert len(own) == 4 and own[0] != pytest.approx(own[-1], rel=1e-3)


def test_normalised_values_do_not_grow_with_the_latents() -> None:
    model = tiny("sd")
    plain = noise_magnitude(model, PROMPTS, n=1, steps=1, normalised=False)
    scaled = noise_magnitude(model, PROMPTS, n=1, steps=1)
    assert plain.scores[PROMPTS[0]] == pytest.approx(16 * scaled.scores[PROMPTS[0]])
    assert plain.protocol != scaled.protocol and scaled.protocol["latent_values"] == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "`n` is 0"),
        ({"steps": 0}, "`steps` is 0"),
        ({"steps": 5}, "a trajectory has 4"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"sampling_steps": 0}, "`sampling_steps` is 0"),
        ({"space": "latent"}, "`space` is 'latent'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        noise_magnitude(tiny("sd"), PROMPTS, **settings)


def test_what_cannot_be_detected_is_refused_before_any_work() -> None:
    model = tiny("sd")
    for prompts, message in (
        ([], "is empty"),
        (["a red car", "  "], "empty text"),
        (["red " * 40], "shorten it"),
        ("a red car", "give a list"),
    ):
        with pytest.raises(RequestError, match=message):
            noise_magnitude(model, prompts)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="first step of a flow"):
        noise_magnitude(tiny("sd3"), PROMPTS, steps=1)
    model.network.half()
    with pytest.raises(ModelError, match="single precision"):
        noise_magnitude(model, PROMPTS)


def test_planted_memories_are_found(
    memorizing: DiffusionGenerator, memorized: list[str], harmless: list[str]
) -> None:
    report = noise_magnitude(memorizing, memorized + harmless, n=2, sampling_steps=10)
    found = report.quality(memorized, harmless)
    assert found["auc"] >= 0.99 and found["balanced_accuracy"] >= 0.95
    assert found["tpr_at_1_percent"] is None
    assert {prompt for prompt, _ in report.ranked()[:10]} <= set(memorized)


def test_a_report_answers_for_its_prompts_only() -> None:
    report = DetectionReport("any", {"a": 1.0, "b": 3.0, "c": 2.0}, True, {}, {})
    assert report.of(["c", "a"]).tolist() == [2.0, 1.0]
    assert [prompt for prompt, _ in report.ranked()] == ["b", "c", "a"]
    assert report.quality(["b"], ["a", "c"])["auc"] == 1
    turned = replace(report, higher_is_memorized=False)
    assert turned.quality(["b"], ["a", "c"])["auc"] == 0
    assert [prompt for prompt, _ in turned.ranked()] == ["a", "c", "b"]
    assert report.to_dict()["scores"] == report.scores
    with pytest.raises(RequestError, match="no score for 'd'"):
        report.of(["d"])
