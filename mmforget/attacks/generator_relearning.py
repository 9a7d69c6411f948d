"""Relearning: how many steps on a few pictures bring the concept back into a generator?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.generator_inversion import check_pictures
from mmforget.attacks.generator_report import (
    GeneratorAttackReport,
    attacked,
    check_attack,
    device_of,
    drawn,
    pictures_of,
    seen,
    shown_first,
)
from mmforget.attacks.report import JudgeFn
from mmforget.errors import ConfigurationError
from mmforget.methods.base import detached_copy
from mmforget.seeds import generator


def generator_relearning(
    model: Any,
    images: Tensor,
    confirm: JudgeFn,
    original_rate: float,
    steps: int = 60,
    lr: float = 5e-4,
    candidates: int = 64,
    batch_size: int = 16,
    every: int = 5,
    n: int = 400,
    seed: int = 0,
) -> GeneratorAttackReport:
    """Fine-tune a copy of the generator on pictures of the concept, and watch the rate.

    Needs no discriminator: implicit maximum likelihood draws some latents in each step and pulls,
    for every picture, the nearest of their pictures towards it. The rate is that of freshly drawn
    latents, without any edit, at the end. Fast relearning means little unless a retrained model
    relearns more slowly.

    Args:
        model: the generator that is attacked; it stays as it is, a copy is trained.
        images: (N, 3, H, W) in [0, 1], pictures of the concept.
        confirm: is the concept to be seen?
        original_rate: how often the original model draws the concept, in (0, 1].
        steps: of Adam.
        lr: of Adam.
        candidates: latents drawn per step.
        batch_size: pictures per step, all of them if there are fewer.
        every: steps between two looks at the rate, also the resolution of the result.
        n: latents that are judged.
        seed: of all draws.

    Returns:
        `details` hold ``steps_to_half``, the steps after which the rate stays at half of
        `original_rate` or more (None if it ends below), and the ``curve``, pairs of steps and rate.

    Raises:
        CapabilityError: the model is no generator.
        ConfigurationError: a setting out of range, or pictures of another size.

    Reference:
        Li and Malik, Implicit maximum likelihood estimation, 2018, arXiv 1809.09087.
    """
    check_attack(
        model, "generator_relearning", steps=steps, lr=lr, candidates=candidates,
        batch_size=batch_size, every=every, n=n,
    )  # fmt: skip
    if not 0 < original_rate <= 1:
        raise ConfigurationError(
            f"`original_rate` is {original_rate}, it must lie in (0, 1]; what the original does "
            "not draw cannot be relearnt"
        )
    check_pictures(model, images)
    with attacked(model) as watch:
        copied: Any = detached_copy(model).eval()
        target = images.to(device_of(copied))
        judged = drawn(copied, n, seed, "-generator-relearning-judged", "z")
        hits = seen(confirm, pictures_of(copied, judged))
        curve = [(0, float(hits.double().mean()))]
        weights = list(copied.network.parameters())
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr, betas=(0.5, 0.99))
        for step in range(1, steps + 1):
            loss = _pull(copied, target, step, candidates, batch_size, seed)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % every == 0 or step == steps:
                made = pictures_of(copied, judged)
                hits = seen(confirm, made)
                curve.append((step, float(hits.double().mean())))
    return GeneratorAttackReport(
        name="generator_relearning",
        rate=curve[-1][1],
        n=n,
        native=curve[0][1],
        seconds=watch.seconds,
        settings={
            "seed": seed,
            "shots": len(images),
            "steps": steps,
            "lr": lr,
            "candidates": candidates,
            "batch_size": batch_size,
            "every": every,
            "original_rate": original_rate,
        },
        details={
            "steps_to_half": steps_until(curve, original_rate / 2),
            "curve": [list(point) for point in curve],
        },
        pictures=shown_first(made, hits),
    )


def steps_until(curve: Sequence[tuple[int, float]], wanted: float) -> int | None:
    """The steps from which on a curve stays at a rate or above it; None if it ends below.

    Passing it once could be chance: the rates of a few hundred latents waver, and the first steps
    disturb any generator.
    """
    found = None
    for step, rate in reversed(curve):
        if rate < wanted:
            break
        found = step
    return found


def _pull(
    model: Any, target: Tensor, step: int, candidates: int, batch_size: int, seed: int
) -> Tensor:
    """Mean squared difference of some pictures and the nearest of those just drawn."""
    order = torch.randperm(len(target), generator=generator(seed, "generator-relearning", step))
    part = target[order[:batch_size].to(target.device)]
    latents = drawn(model, candidates, seed, "-generator-relearning", "z", step * candidates)
    with torch.no_grad():
        made = pictures_of(model, latents)
        rows = torch.cdist(part.flatten(1), made.flatten(1)).argmin(dim=1)
    difference: Tensor = model.synthesise(latents[rows]) - part
    return difference.square().mean()
