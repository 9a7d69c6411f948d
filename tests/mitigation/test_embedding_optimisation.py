"""Optimised embeddings: what moves, when it stops, and that a planted copy disappears."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.data.planted import ordinary, planted
from mmforget.detection import noise_magnitude
from mmforget.errors import ConfigurationError, DivergenceError, RequestError
from mmforget.mitigation import EmbeddingOptimisation, mitigated_pictures
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.seeds import derive
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPTS = ["a red cat", "a photo of a dog"]


def made(kind: TinyKind = "sd") -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=4)


def scores(model: DiffusionGenerator, seed: int, **settings: Any) -> Tensor:
    """What the detector measures on the noise that the optimisation uses."""
    report = noise_magnitude(
        model, PROMPTS, seed=derive(seed, "embedding-optimisation"), **settings
    )
    return torch.tensor([report.scores[prompt] for prompt in PROMPTS])


@pytest.mark.parametrize(
    ("kind", "steps", "space"),
    [("sd", 1, "noise"), ("sd2", 3, "noise"), ("sdxl", 2, "raw"), ("sd3", 1, "raw"),
     ("flux", 1, "raw")],
)  # fmt: skip
def test_the_magnitude_is_that_of_the_detector_and_goes_down(
    kind: TinyKind, steps: int, space: Any
) -> None:
    model = made(kind)
    one = EmbeddingOptimisation(0.0, n=2, steps=steps, space=space, iterations=3)
    found = one.optimised(model, PROMPTS, seed=3)
    expected = scores(model, 3, n=2, steps=steps, space=space)
    assert torch.allclose(found.before, expected.float(), rtol=1e-3, atol=1e-6)
    assert bool((found.after < found.before).all())
    assert found.iterations.tolist() == [3, 3] and not found.reached.any()
    assert not torch.equal(found.embedding.states, model.encode(PROMPTS).states)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_begin_tokens_and_the_pooled_embedding_stay(kind: TinyKind) -> None:
    model = made(kind)
    plain = model.encode(PROMPTS)
    one = EmbeddingOptimisation(0.0, n=1, iterations=2, space="raw")
    found = one.optimised(model, PROMPTS).embedding
    moved = (found.states - plain.states).abs().amax(2) > 0
    begins = torch.zeros_like(moved)
    for segment in model.segments(PROMPTS):
        begins[:, segment.start : segment.start + segment.begin] = True
    assert not moved[begins].any() and begins.any() == (kind != "flux")
    assert moved[~begins].float().mean() > 0.5
    if plain.pooled is not None:
        assert found.pooled is not None and torch.equal(found.pooled, plain.pooled)


def test_a_prompt_stops_at_the_target_while_others_go_on() -> None:
    model = made()
    free = EmbeddingOptimisation(0.0, n=2, iterations=6).optimised(model, PROMPTS)
    low, high = sorted(free.before.tolist())
    easy = int(free.before.argmin())
    found = EmbeddingOptimisation((low + high) / 2, n=2, iterations=6).optimised(model, PROMPTS)
    assert found.reached[easy] and found.iterations[easy] == 0
    assert torch.equal(found.embedding.states[easy], model.encode(PROMPTS).states[easy])
    assert found.iterations[1 - easy] > 0
    assert found.after[1 - easy] < found.before[1 - easy]


def test_a_prompt_is_optimised_for_itself() -> None:
    model = made()
    one = EmbeddingOptimisation(0.0, n=2, iterations=4)
    both = one.optimised(model, PROMPTS, seed=1)
    alone = one.optimised(model, PROMPTS[1:], seed=1)
    assert torch.allclose(alone.embedding.states[0], both.embedding.states[1], atol=1e-3)
    apart = EmbeddingOptimisation(0.0, n=2, iterations=4, batch_size=1).optimised(
        model, PROMPTS, seed=1
    )
    assert torch.allclose(apart.after, both.after, rtol=1e-2)


def test_all_pictures_of_a_prompt_share_its_embedding() -> None:
    model = made()
    keys = [(PROMPTS[1], 0), (PROMPTS[0], 0), (PROMPTS[1], 1)]
    found = EmbeddingOptimisation(0.0, n=1, iterations=2).embedding(model, keys)
    assert len(found) == 3 and torch.equal(found.states[0], found.states[2])
    assert not torch.equal(found.states[0], found.states[1])


def test_a_target_can_be_taken_from_ordinary_prompts() -> None:
    model = made()
    report = noise_magnitude(
        model, PROMPTS, n=2, steps=2, seed=derive(7, "embedding-optimisation-target")
    )
    low, high = sorted(report.scores.values())
    for quantile, expected in ((0.0, low), (0.25, 0.75 * low + 0.25 * high), (1.0, high)):
        one = EmbeddingOptimisation.calibrated(
            model, PROMPTS, quantile, seed=7, n=2, steps=2, iterations=3
        )
        assert one.target == pytest.approx(expected) and (one.n, one.iterations) == (2, 3)
    with pytest.raises(ConfigurationError, match="`quantile` is 2"):
        EmbeddingOptimisation.calibrated(model, PROMPTS, 2.0)


def test_the_model_is_left_as_it_is() -> None:
    model = made()
    before = state_hash(model)
    EmbeddingOptimisation(0.0, n=1, steps=2, iterations=2).optimised(model, PROMPTS)
    assert state_hash(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": -1.0}, "`target`"),
        ({"target": float("nan")}, "`target`"),
        ({"lr": 0.0}, "`lr`"),
        ({"n": 0}, "`n`"),
        ({"steps": 0}, "`steps`"),
        ({"iterations": 0}, "`iterations`"),
        ({"batch_size": 0.5}, "`batch_size`"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EmbeddingOptimisation(**{"target": 1.0} | settings)


@pytest.mark.parametrize(
    ("kind", "settings", "prompts", "error", "message"),
    [
        ("sd3", {}, PROMPTS, ConfigurationError, "space='raw'"),
        ("sd", {"space": "pixels"}, PROMPTS, ConfigurationError, "`space`"),
        ("sd", {"steps": 9}, PROMPTS, ConfigurationError, "`steps` is 9"),
        ("sd", {}, ["a cat", "a cat"], RequestError, "twice"),
        ("sd", {}, [" "], RequestError, "empty text"),
        ("sd", {}, ["cat " * 40], RequestError, "tokens"),
    ],
)
def test_what_cannot_be_optimised_is_refused(
    kind: TinyKind,
    settings: dict[str, Any],
    prompts: list[str],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        EmbeddingOptimisation(0.0, **settings).optimised(made(kind), prompts)


def test_a_learning_rate_that_is_far_too_large_is_reported() -> None:
    with pytest.raises(DivergenceError, match="lower `lr`"):
        EmbeddingOptimisation(0.0, n=1, lr=1e30, iterations=3).optimised(made(), PROMPTS)


def test_planted_copies_disappear() -> None:
    folder = Path(str(files("mmforget"))) / "assets/digit_world/memorizing_unet"
    model = load_generator(folder, steps=20, guidance=3.0)
    sheets = [sheet for sheet in planted() if sheet.kind == "verbatim"][:2]
    prompts = [sheet.prompt for sheet in sheets]
    captions = list(dict.fromkeys(ordinary(40)[1]))[:6]
    one = EmbeddingOptimisation.calibrated(model, captions, n=2, iterations=40, lr=0.1)
    found = one.optimised(model, prompts)
    assert bool((found.before > 2 * one.target).all()) and bool(found.reached.all())

    def copied(images: Tensor) -> Tensor:
        originals = torch.stack([sheet.image for sheet in sheets])
        rows = torch.stack([images, originals]).flatten(2)
        rows = rows - rows.mean(2, keepdim=True)
        return torch.cosine_similarity(rows[0], rows[1])

    assert bool((copied(model.generate(prompts, 1, seed=5)) > 0.8).all())
    assert copied(mitigated_pictures(model, one, prompts, 1, seed=5)).mean() < 0.6
