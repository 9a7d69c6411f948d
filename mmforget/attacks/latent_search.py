"""Latent search: is there a latent from which the generator still draws the concept?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.generator_report import (
    AT_A_TIME,
    GeneratorAttackReport,
    Region,
    ScoreFn,
    attacked,
    check_attack,
    drawn,
    pictures_of,
    seen,
    shown_first,
)
from mmforget.attacks.report import JudgeFn
from mmforget.models.base import Latents, LatentSpace


def latent_search(
    model: Any,
    see: ScoreFn,
    confirm: JudgeFn,
    n: int = 100,
    steps: int = 60,
    lr: float = 0.1,
    seed: int = 0,
    space: LatentSpace | None = None,
) -> GeneratorAttackReport:
    """Move latents by projected Adam until a judge sees the concept, and ask a second one.

    Latents stay where the prior has them: see `Region`. A trial succeeds if both judges see the
    concept, the one that was followed and the one that was not; otherwise patterns that fool a
    classifier would count as recovery.

    Args:
        model: the generator that is attacked; nothing of it changes.
        see: the judge that is followed, see `judge_logits`.
        confirm: another model, see `guide_sees` and `mmforget.attacks.sees`.
        n: latents to start from.
        steps: of Adam.
        lr: of Adam, in units of a latent.
        seed: of the latents.
        space: where to search; None takes ``z``.

    Returns:
        `details` hold the rates of both judges on their own, ``see`` and ``confirm``.

    Raises:
        CapabilityError: the model is no generator, or has no such space.
        ConfigurationError: a setting out of range.
    """
    check_attack(model, "latent_search", n=n, steps=steps, lr=lr)
    with attacked(model) as watch:
        start = drawn(model, n, seed, "-latent-search", space or "z")
        parts = [
            search(model, see, start[row : row + AT_A_TIME], steps, lr)
            for row in range(0, n, AT_A_TIME)
        ]
        before = pictures_of(model, start)
        after = pictures_of(model, Latents.cat(parts))
        native = seen(see, before) & seen(confirm, before)
        found, confirmed = seen(see, after), seen(confirm, after)
    hits = found & confirmed
    return GeneratorAttackReport(
        name="latent_search",
        rate=float(hits.double().mean()),
        n=n,
        native=float(native.double().mean()),
        seconds=watch.seconds,
        settings={"seed": seed, "steps": steps, "lr": lr, "space": start.space},
        details={
            "see": float(found.double().mean()),
            "confirm": float(confirmed.double().mean()),
        },
        pictures=shown_first(after, hits),
    )


def search(model: Any, see: ScoreFn, start: Latents, steps: int, lr: float) -> Latents:
    """Move latents, inside of their region, to where a score is high."""
    region = Region(model, start)
    codes = start.codes.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([codes], lr)
    for _ in range(steps):
        score: Tensor = see(model.synthesise(start.moved(codes)))
        (codes.grad,) = torch.autograd.grad(-score.sum(), [codes])
        optimizer.step()
        codes.data.copy_(region.project(codes))
    return start.moved(codes.detach())
