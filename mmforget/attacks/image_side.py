"""Attacks that start from a picture instead of a text: does the denoiser still know the concept?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.report import (
    AttackReport,
    Budget,
    Cases,
    JudgeFn,
    Key,
    Sampling,
    check_settings,
    concept_cases,
    judged,
    measured,
    rate,
    unrelated_text,
)
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError
from mmforget.models.base import PromptEmbedding
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import generator

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Share of the sampling steps that are done again; at 1 nothing of the picture would be left."""

ROUNDS = 3
"""Fixed-point rounds per step backwards."""


_EXACT = " exact"
"""Ends the names of conditions that are reported but do not count."""


@dataclass(frozen=True)
class _Preset:
    templates: int
    pictures: int
    sampling_steps: int


_PRESETS = {"smoke": _Preset(1, 8, 12), "standard": _Preset(5, 16, 30)}

Redo = Callable[[DiffusionGenerator, Tensor, Sequence[Key], str], dict[str, Tensor]]
"""From a model, (B, C, h, w) latents of pictures, their keys and a prompt to new latents, per
condition."""


def sdedit_attack(
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    concept: ConceptSpec,
    judge_fn: JudgeFn,
    *,
    seed: int = 0,
    budget: Budget = "smoke",
    strengths: Sequence[float] | None = None,
    pictures: int | None = None,
    templates: Sequence[str] | None = None,
    unrelated: str | None = None,
    reference: DiffusionGenerator | None = None,
    sampling_steps: int | None = None,
    guidance: float | None = None,
) -> AttackReport:
    """Noise pictures of the concept partly, and let the unlearned model finish them.

    Once with the prompt of the concept and once with the empty prompt. A picture counts as brought
    back if the concept is seen in any condition; see `details` for the single ones. The lower the
    strength, the more of the concept comes from the picture and not from the model: compare with
    `reference`.

    Args:
        model: the unlearned model.
        original: the model before; it makes the pictures of the concept.
        concept: what was to be forgotten.
        judge_fn: is the concept to be seen?
        seed: of all noise.
        budget: ``smoke``: one sentence, strengths 0.5, 0.7 and 0.9; ``standard``: five sentences
            and all of `STRENGTHS`.
        strengths: in (0, 1), share of the sampling steps that the unlearned model does.
        pictures: per sentence, instead of the budget's.
        templates: sentences with one ``{}``; None takes the first of the concept's.
        unrelated: prompt of the pictures for the floor, which are treated alike; None takes a
            preserved concept, or the anchor.
        reference: a model that never learnt the concept, treated alike.
        sampling_steps: per picture, instead of the budget's.
        guidance: scale with the concept's prompt; None takes the model's own.

    Returns:
        `details["conditions"]` holds, per prompt and strength, such as ``concept 0.7``, the rates
        ``attack``, ``floor`` and ``reference``; None where nothing was measured.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Meng, He, Song, Song, Wu, Zhu, Ermon, "SDEdit: Guided Image Synthesis and Editing with
        Stochastic Differential Equations", 2021, arXiv:2108.01073. As a probe of forgetting:
        Lu, Kriplani, Gandikota, et al., "When Are Concepts Erased From Diffusion Models?", 2025,
        arXiv:2505.17013.
    """
    steps = _steps(budget, sampling_steps)
    chosen = tuple(strengths or (STRENGTHS if budget == "standard" else STRENGTHS[::2]))
    for strength in chosen:
        if not 0 < strength < 1:
            raise ConfigurationError(
                f"`strengths` has {strength}, it must lie between 0 and 1, both excluded"
            )

    def redo(
        attacked: DiffusionGenerator, latents: Tensor, keys: Sequence[Key], prompt: str
    ) -> dict[str, Tensor]:
        noise = torch.stack(
            [
                torch.randn(latents.shape[1:], generator=generator(seed, "sdedit", text, number))
                for text, number in keys
            ]
        ).to(latents)
        found = {}
        for name, text, scale in (("concept", prompt, guidance), ("empty", "", 1.0)):
            for strength in chosen:
                first = min(max(steps - round(strength * steps), 1), steps - 1)
                found[f"{name} {strength:g}"] = attacked.sample(
                    partly_noised(attacked, latents, noise, steps, first),
                    attacked.encode([text])[[0] * len(latents)],
                    attacked.unconditional(),
                    steps=steps,
                    guidance=scale,
                    draws=[generator(seed, "sdedit-sampler", *key) for key in keys],
                    start=first,
                )
        return found

    return _attack(
        "sdedit",
        redo,
        {"strengths": list(chosen)},
        model,
        original,
        concept,
        judge_fn,
        seed,
        budget,
        pictures,
        templates,
        unrelated,
        reference,
        steps,
        guidance,
    )


def latent_inversion_attack(
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    concept: ConceptSpec,
    judge_fn: JudgeFn,
    *,
    seed: int = 0,
    budget: Budget = "smoke",
    pictures: int | None = None,
    templates: Sequence[str] | None = None,
    unrelated: str | None = None,
    reference: DiffusionGenerator | None = None,
    sampling_steps: int | None = None,
    guidance: float | None = None,
) -> AttackReport:
    """Look for the noise that a picture of the concept comes from, and draw again from there.

    The unlearned model's own deterministic sampler is run backwards without guidance (DDIM for
    noise and velocity, Euler for flow). The noise found is scaled to a mean square of 1; from there
    it draws with the concept's prompt and guidance (``concept``), and with the empty prompt and no
    guidance (``empty``).

    The scaling matters. The sampler's equation can be followed backwards from any picture, and
    forwards again to the same one, also by a model that has never learnt anything like it; but such
    a picture then comes from noise that is never drawn. That repetition is reported as
    ``empty exact`` and does not count. A network that hardly changes its input, such as an
    untrained one, repeats pictures even after the scaling: compare with `reference`.

    Args:
        model: the unlearned model.
        original: the model before; it makes the pictures of the concept.
        concept: what was to be forgotten.
        judge_fn: is the concept to be seen?
        seed: of the pictures.
        budget: ``smoke``: one sentence, 8 pictures, 12 steps; ``standard``: five, 16, 30.
        pictures: per sentence, instead of the budget's.
        templates: sentences with one ``{}``; None takes the first of the concept's.
        unrelated: prompt of the pictures for the floor, which are treated alike; None takes a
            preserved concept, or the anchor.
        reference: a model that never learnt the concept, treated alike.
        sampling_steps: per picture, instead of the budget's.
        guidance: scale with the concept's prompt; None takes the model's own.

    Returns:
        `details["conditions"]` as of `sdedit_attack`, for ``concept``, ``empty`` and
        ``empty exact``.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020, arXiv:2010.02502.
    """
    steps = _steps(budget, sampling_steps)

    def redo(
        attacked: DiffusionGenerator, latents: Tensor, keys: Sequence[Key], prompt: str
    ) -> dict[str, Tensor]:
        every = [0] * len(latents)
        empty = attacked.unconditional()
        draws = [generator(seed, "inversion-sampler", *key) for key in keys]
        found = {}
        for name, text, scale in (("concept", prompt, guidance), ("empty", "", 1.0)):
            embedding = attacked.encode([text])[every]
            exact = latents_to_noise(attacked, latents, embedding, steps)
            starts = {name: exact / exact.square().mean((1, 2, 3), keepdim=True).sqrt()}
            if name == "empty":
                starts[f"empty{_EXACT}"] = exact
            for condition, noise in starts.items():
                found[condition] = attacked.sample(
                    noise, embedding, empty, steps=steps, guidance=scale, draws=draws
                )
        return found

    return _attack(
        "latent_inversion",
        redo,
        {"rounds": ROUNDS},
        model,
        original,
        concept,
        judge_fn,
        seed,
        budget,
        pictures,
        templates,
        unrelated,
        reference,
        steps,
        guidance,
    )


def partly_noised(
    model: DiffusionGenerator, latents: Tensor, noise: Tensor, steps: int, first: int
) -> Tensor:
    """Latents at the noise level of one sampling step, as `DiffusionGenerator.sample` starts there.

    Args:
        model: whose sampler it is.
        latents: (B, C, h, w).
        noise: (B, C, h, w).
        steps: of the whole sampling run.
        first: index of the step, from 0.
    """
    scheduler, times = model.schedule(steps, latents)
    time = times[first].expand(len(latents))
    if hasattr(scheduler, "add_noise"):
        # Some samplers work on another scale than the network, which they know themselves.
        noised: Tensor = scheduler.add_noise(latents, noise, time)
        return noised
    return model.noised(latents, noise, time)


@torch.no_grad()
def latents_to_noise(
    model: DiffusionGenerator, latents: Tensor, embedding: PromptEmbedding, steps: int
) -> Tensor:
    r"""Run the deterministic sampler backwards, without guidance.

    A step of the sampler from the noise level b to a is :math:`x_a = p\,x_b + q\,f(x_b, t_b)`;
    backwards, :math:`x_b` is found by fixed-point rounds.

    Args:
        model: whose sampler is reversed.
        latents: (B, C, h, w) of finished pictures.
        embedding: of B prompts.
        steps: sampling steps.

    Returns:
        (B, C, h, w), from which `DiffusionGenerator.sample` with as many steps, guidance 1 and a
        deterministic sampler leads back to `latents`.
    """
    scheduler, times = model.schedule(steps, latents)
    one, none = torch.ones_like(latents[:1, :1, :1, :1]), torch.zeros_like(latents[:1, :1, :1, :1])
    signal, level = one, none
    state, found = latents, torch.zeros_like(latents)
    for time in reversed(times):
        next_signal = model.noised(one, none, time[None])
        next_level = model.noised(none, one, time[None])
        keep, add = _step(model.prediction, signal, level, next_signal, next_level)
        signal, level = next_signal, next_level
        before = state
        state = (before - add * found) / keep  # predictions change little from step to step
        for _ in range(ROUNDS):
            found = model.predict(state, time, embedding)
            state = (before - add * found) / keep
    if hasattr(scheduler, "scale_model_input"):
        # `state` is on the network's scale; where the sampler's is another, go back to it.
        unit = scheduler.scale_model_input(torch.ones_like(state), times[0])
        state = state / unit
    return state / getattr(scheduler, "init_noise_sigma", 1.0)


def _step(
    prediction: str, signal: Tensor, level: Tensor, from_signal: Tensor, from_level: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of state and prediction in one deterministic step to a lower noise level."""
    if prediction == "flow":
        return torch.ones_like(level), level - from_level
    if prediction == "epsilon":
        return signal / from_signal, level - signal * from_level / from_signal
    keep = signal * from_signal + level * from_level
    return keep, level * from_signal - signal * from_level


def _steps(budget: Budget, given: int | None) -> int:
    check_settings(budget)
    steps = _PRESETS[budget].sampling_steps if given is None else given
    if steps < 2:
        raise ConfigurationError(f"`sampling_steps` is {steps}, it must be at least 2")
    return steps


def _attack(
    name: str,
    redo: Redo,
    particular: dict[str, Any],
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    concept: ConceptSpec,
    judge_fn: JudgeFn,
    seed: int,
    budget: Budget,
    pictures: int | None,
    templates: Sequence[str] | None,
    unrelated: str | None,
    reference: DiffusionGenerator | None,
    steps: int,
    guidance: float | None,
) -> AttackReport:
    """What both attacks have in common: pictures, judging, floor, reference, report."""
    preset = _PRESETS[budget]
    pictures = preset.pictures if pictures is None else pictures
    check_settings(budget, pictures=pictures)
    sampling = Sampling(seed, steps, guidance)
    sentences = list(templates or concept.sentences[: preset.templates])
    other = unrelated_text(concept, unrelated)
    models = [model, original, *([reference] if reference is not None else [])]
    notes: list[str] = []
    with measured(*models) as cost, torch.no_grad():
        prompts = [text.format(concept.target) for text in sentences]
        cases = concept_cases(model, original, prompts, judge_fn, pictures, sampling)
        seen = _redone(redo, model, original, cases, cases.prompts, judge_fn)
        known = _redone(redo, reference, original, cases, cases.prompts, judge_fn)
        floor = None
        if cases.counted():
            plain = concept_cases(original, original, [other], judge_fn, pictures, sampling)
            # Pictures that show the concept by chance are no floor.
            plain = replace(plain, counts=~plain.counts)
            floor = _redone(redo, model, original, plain, cases.prompts[:1], judge_fn)
            if floor is None:
                notes.append(f"no floor: the original shows '{concept.target}' for '{other}' too")
    rows = cases.counted()
    after = None if seen is None else _union(seen)
    conditions = {
        condition: {
            "attack": rate(own, rows),
            "floor": None if floor is None else rate(floor[condition], plain.counted()),
            "reference": None if known is None else rate(known[condition], rows),
        }
        for condition, own in (seen or {}).items()
    }
    if reference is None:
        notes.append(
            "no reference model that never learnt the concept was given; part of the concept may "
            "come from the pictures themselves"
        )
    return cases.report(
        name,
        concept,
        after,
        [None] * len(cases.prompts),
        cost,
        budget,
        {
            "seed": seed,
            **particular,
            "pictures": pictures,
            "sampling_steps": sampling.steps,
            "guidance": model.guidance if guidance is None else guidance,
            "unrelated": other,
            "reference": reference is not None,
        },
        floor=None if floor is None else rate(_union(floor), plain.counted()),
        details={"conditions": conditions},
        notes=notes,
    )


def _union(seen: dict[str, Tensor]) -> Tensor:
    return torch.stack([own for name, own in seen.items() if not name.endswith(_EXACT)]).any(0)


def _redone(
    redo: Redo,
    model: DiffusionGenerator | None,
    original: DiffusionGenerator,
    cases: Cases,
    prompts: Sequence[str],
    judge_fn: JudgeFn,
) -> dict[str, Tensor] | None:
    """Per condition (P * N,) bool, false for pictures that do not count; None if none does.

    `prompts` are those of the attack, one per prompt of the cases.
    """
    if model is None or not cases.counted():
        return None
    parameter = next(model.network.parameters())
    found: dict[str, Tensor] = {}
    for own, prompt in zip(cases.prompts, prompts, strict=True):
        rows = cases.counted(own)
        if not rows:
            continue
        images = cases.images[rows].to(parameter.device)
        latents = original.to_latents(images).to(parameter)
        made = redo(model, latents, [cases.keys[row] for row in rows], prompt)
        for condition, result in made.items():
            images = model.to_images(result).float().cpu()
            table = found.setdefault(condition, torch.zeros(len(cases.counts), dtype=torch.bool))
            table[rows] = judged(judge_fn, images)
    return found
