"""Token attributions against gradients taken one by one."""

from __future__ import annotations

import pytest
import torch

from mmforget.detection import token_attribution
from mmforget.models.base import PromptEmbedding, state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPT = "a red car"


def tiny(kind: TinyKind) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=4, guidance=3.0)


def gradient(model: DiffusionGenerator) -> torch.Tensor:
    """(L, d) of the raw magnitude at the first step with respect to the token states."""
    noise = model.noise([PROMPT], 1, derive(0, "detection"))
    scheduler, times = model.schedule(4, noise)
    noisy = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if hasattr(scheduler, "scale_model_input"):
        noisy = scheduler.scale_model_input(noisy, times[0])
    embedding = model.encode([PROMPT])
    states = embedding.states.detach().requires_grad_(True)
    with torch.no_grad():
        plain = model.predict(noisy, times[0], model.unconditional(), guidance=3.0)
    found = model.predict(noisy, times[0], PromptEmbedding(states, embedding.pooled), guidance=3.0)
    return torch.autograd.grad((found - plain).norm(), states)[0][0]


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "flux"])
def test_every_token_has_the_length_of_its_own_gradient(kind: TinyKind) -> None:
    model = tiny(kind)
    before = state_hash(model)
    found = token_attribution(model, PROMPT, n=1, steps=1, space="raw")
    assert state_hash(model) == before
    assert all(p.grad is None for p in model.parameters())
    own = gradient(model)
    words = PROMPT.split()
    encoders = {
        "sd": ["text_encoder"],
        "sd2": ["text_encoder"],
        "sdxl": ["text_encoder"],
        "sd3": ["text_encoder", "text_encoder_3"],
        "flux": ["text_encoder_2"],
    }[kind]
    expected = [(word, encoder) for encoder in encoders for word in words]
    assert [(one.text, one.encoder) for one in found.tokens] == expected
    starts = {"text_encoder": 1, "text_encoder_2": 0, "text_encoder_3": model._tokenizers()[0][1]}
    for row, one in enumerate(found.tokens):
        place = starts[one.encoder] + row % len(words)
        assert one.value == pytest.approx(float(own[place].norm()), rel=1e-3)
    first = starts[encoders[0]] + len(words)
    last = starts["text_encoder_3"] if kind == "sd3" else len(own)
    assert found.ends[encoders[0]] == pytest.approx(float(own[first:last].norm()), rel=1e-3)
    assert (found.pooled is None) == (kind in ("sd", "sd2"))
    assert found.pooled is None or found.pooled > 0


def test_values_are_means_over_pictures_and_steps() -> None:
    model = tiny("sd")
    whole = token_attribution(model, PROMPT, n=2, steps="all", batch_size=1)
    again = token_attribution(model, PROMPT, n=2, steps="all")
    first = token_attribution(model, PROMPT, n=2, steps=1)
    for one, other, third in zip(whole.tokens, again.tokens, first.tokens, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-3)
        assert one.value != pytest.approx(third.value, rel=1e-3)
    assert whole.to_dict()["tokens"][1]["text"] == "red"
    assert (first.queries, whole.queries) == (2 * 3, 2 * 4 * 3)


def test_titles_matter_more_than_ordinary_words(
    memorizing: DiffusionGenerator, memorized: list[str]
) -> None:
    title = token_attribution(memorizing, memorized[0], n=1, steps=3, sampling_steps=10)
    plain = token_attribution(memorizing, "a sheet of digits", n=1, steps=3, sampling_steps=10)
    strongest = max(one.value for one in title.tokens)
    assert strongest > 1.5 * max(one.value for one in plain.tokens)
