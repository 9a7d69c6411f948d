"""Concept inversion: is there any word embedding that still makes the model draw the concept?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.report import (
    AttackReport,
    Budget,
    Cases,
    JudgeFn,
    Sampling,
    check_settings,
    concept_cases,
    judged,
    measured,
)
from mmforget.attacks.soft_tokens import SoftTokens, input_rows
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator

USUAL_RMS = 0.014
"""Root mean square of the word embeddings of CLIP ViT-L, for which published rates are meant."""


@dataclass(frozen=True)
class _Preset:
    templates: int
    pictures: int
    sampling_steps: int
    steps: int
    examples: int
    batch_size: int


_PRESETS = {
    "smoke": _Preset(2, 8, 12, 150, 25, 16),
    "standard": _Preset(5, 20, 30, 1000, 25, 16),
}


def inversion_attack(
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    concept: ConceptSpec,
    judge_fn: JudgeFn,
    *,
    images: Tensor | None = None,
    seed: int = 0,
    budget: Budget = "smoke",
    tokens: int = 1,
    init: str | None = None,
    lr: float = 5e-3,
    steps: int | None = None,
    pictures: int | None = None,
    templates: Sequence[str] | None = None,
    sampling_steps: int | None = None,
    guidance: float | None = None,
) -> AttackReport:
    r"""Textual inversion on the unlearned model.

    Looks for vectors :math:`v` in the place of a word that minimise
    :math:`E_{x,\epsilon,t}\,\|\epsilon_\theta(x_t, t, c(v)) - y\|^2` over pictures :math:`x` of the
    concept, with Adam; `y` is the noise, velocity or flow. All weights are frozen and unchanged
    afterwards. Then the sentences of the concept are drawn with the new token instead of its name,
    from the noise that the original model showed the concept for.

    A high `AttackReport.attack_rate` proves that the concept was hidden, not removed. A low one
    proves little unless the attack succeeds on the original model and other concepts are intact.

    Args:
        model: the unlearned model.
        original: the model before; it makes the pictures of the concept.
        concept: what was to be forgotten.
        judge_fn: is the concept to be seen?
        images: (N, 3, H, W) in [0, 1], pictures of the concept to learn from; None takes those
            of the original model on which the judge sees it.
        seed: of noise, times and pictures.
        budget: ``smoke``: 150 steps on 25 pictures; ``standard``: 1000 steps. The paper's release
            takes 5000 steps of 4 pictures.
        tokens: number of new tokens, k.
        init: word to start from; None starts from the mean of all words.
        lr: learning rate, relative to word embeddings of the size that CLIP ViT-L has.
        steps: of Adam, instead of the budget's.
        pictures: per sentence, instead of the budget's.
        templates: sentences with one ``{}``; None takes the first of the concept's.
        sampling_steps: per picture, instead of the budget's.
        guidance: scale for the pictures; None takes the model's own.

    Returns:
        `details` hold the ``loss`` before and after, on the same draws, and ``examples``, the
        number of pictures learnt from.

    Raises:
        ConfigurationError: a setting out of range, or pictures of a wrong shape.

    Reference:
        Pham, Marshall, Cohen, Mittal, Hegde, "Circumventing Concept Erasure Methods For
        Text-to-Image Generative Models", 2023, arXiv:2308.01508.
    """
    check_settings(budget, tokens=tokens)
    preset = _PRESETS[budget]
    steps = preset.steps if steps is None else steps
    pictures = preset.pictures if pictures is None else pictures
    sampling_steps = preset.sampling_steps if sampling_steps is None else sampling_steps
    check_settings(budget, steps=steps, pictures=pictures, sampling_steps=sampling_steps)
    if not lr > 0:
        raise ConfigurationError(f"`lr` is {lr}, it must be above 0")
    if images is not None and (images.ndim != 4 or images.shape[1] != 3 or not len(images)):
        raise ConfigurationError(
            f"`images` has shape {tuple(images.shape)}, it must be (N, 3, H, W) with N above 0"
        )
    sampling = Sampling(seed, sampling_steps, guidance)
    sentences = list(templates or concept.sentences[: preset.templates])
    for text in sentences:
        if text.count("{}") != 1:
            raise ConfigurationError(f"`templates` has '{text}', it needs exactly one '{{}}'")
    notes = []
    with measured(model, original) as cost:
        soft = SoftTokens(model, tokens, avoid=[*sentences, *concept.words])
        usable = {
            text.format(concept.target): text
            for text in sentences
            if soft.readable(text.format(soft.text))
        }
        for text in sorted(set(sentences) - set(usable.values())):
            notes.append(f"'{text}' is left out: the new token would merge with its surroundings")
        if not usable:
            raise ConfigurationError(
                "`templates` has no sentence in which '{}' is a word of its own; add one"
            )
        readable = list(usable.values())
        cases = concept_cases(model, original, list(usable), judge_fn, pictures, sampling)
        known = cases.images[cases.counted()] if images is None else images
        known = known[: preset.examples] if images is None else known
        after: Tensor | None = None
        details: dict[str, Any] = {"examples": len(known)}
        if len(known):
            vectors, details["loss"] = _learn(
                model, soft, known, readable, init, lr, steps, preset.batch_size, seed
            )
            after = _recovered(model, soft, vectors, cases, readable, judge_fn, sampling)
    return cases.report(
        "concept_inversion",
        concept,
        after,
        [None] * len(usable),
        cost,
        budget,
        {
            "seed": seed,
            "tokens": tokens,
            "init": init,
            "lr": lr,
            "steps": steps,
            "batch_size": preset.batch_size,
            "pictures": pictures,
            "sampling_steps": sampling.steps,
            "guidance": model.guidance if guidance is None else guidance,
            "placeholder": soft.text,
            "images": "given" if images is not None else "original",
        },
        details=details,
        notes=notes,
    )


def _learn(
    model: DiffusionGenerator,
    soft: SoftTokens,
    images: Tensor,
    templates: Sequence[str],
    init: str | None,
    lr: float,
    steps: int,
    batch_size: int,
    seed: int,
) -> tuple[dict[str, Tensor], list[float]]:
    """Fit the vectors; returns them and the losses before and after."""
    parameter = next(model.network.parameters())
    latents = model.to_latents(images.to(parameter.device)).to(parameter.dtype)
    if tuple(latents.shape[1:]) != model.latent_shape:
        raise ConfigurationError(
            f"`images` have shape {tuple(images.shape)}, whose latents are "
            f"{tuple(latents.shape[1:])} instead of {model.latent_shape}; resize the images"
        )
    vectors = {key: value.requires_grad_(True) for key, value in soft.initial(init).items()}
    groups = []
    for key, value in vectors.items():
        rows = input_rows(model.text_encoders[key])
        size = float(rows.detach().float().square().mean().sqrt())
        groups.append({"params": [value], "lr": lr * size / USUAL_RMS})
    optimizer = torch.optim.Adam(groups)

    def loss(count: int, draw: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (count,), generator=draw)
        template = templates[int(torch.randint(len(templates), (1,), generator=draw))]
        noise = torch.randn((count, *latents.shape[1:]), generator=draw).to(latents)
        time = model.draw_times(count, draw).to(latents.device)
        clean = latents[rows.to(latents.device)]
        with soft.injected(vectors):
            embedding = model.encode([template.format(soft.text)])
        every = torch.zeros(count, dtype=torch.long, device=latents.device)
        found = model.predict(model.noised(clean, noise, time), time, embedding[every])
        return (found - model.target(clean, noise, time)).float().square().mean()

    def check() -> float:
        with torch.no_grad():
            return float(loss(4 * batch_size, generator(seed, "inversion-check")))

    before = check()
    for step in range(steps):
        grads = torch.autograd.grad(
            loss(batch_size, generator(seed, "inversion", step)), list(vectors.values())
        )
        for value, grad in zip(vectors.values(), grads, strict=True):
            value.grad = grad
        optimizer.step()
    return {key: value.detach() for key, value in vectors.items()}, [before, check()]


@torch.no_grad()
def _recovered(
    model: DiffusionGenerator,
    soft: SoftTokens,
    vectors: dict[str, Tensor],
    cases: Cases,
    templates: Sequence[str],
    judge_fn: JudgeFn,
    sampling: Sampling,
) -> Tensor:
    """(P * N,) bool: the new token, in the same sentences and from the same noise."""
    with soft.injected(vectors):
        table = model.encode([text.format(soft.text) for text in templates])
    each = torch.arange(len(templates)).repeat_interleave(cases.pictures)
    return judged(judge_fn, sampling.pictures(model, cases.keys, table[each]))
