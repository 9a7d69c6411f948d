"""Inversion: can the generator still draw given pictures of the concept, and how closely?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmforget.attacks.generator_report import (
    GeneratorAttackReport,
    Region,
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
from mmforget.models.base import Latents, LatentSpace

STARTS = 64
"""Latents among which a picture looks for its start."""


def generator_inversion(
    model: Any,
    images: Tensor,
    confirm: JudgeFn,
    steps: int = 150,
    lr: float = 0.1,
    restarts: int = 2,
    seed: int = 0,
    space: LatentSpace | None = None,
) -> GeneratorAttackReport:
    """Look for the latents of real pictures, and judge the reconstructions.

    Projected Adam on the squared difference, from the nearest of some drawn latents, inside of
    `Region`; of several starts the best counts. The rate is the share of the reconstructions that
    show the concept. The error alone says little: compare it with that of the original model by
    `inversion_ratio`.

    Args:
        model: the generator that is attacked; nothing of it changes.
        images: (N, 3, H, W) in [0, 1], pictures of the concept that no model has seen.
        confirm: is the concept to be seen?
        steps: of Adam.
        lr: of Adam, in units of a latent.
        restarts: starts per picture.
        seed: of the starts.
        space: where to search; None takes the last of the model's: ``z``, or ``w+``.

    Returns:
        `details` hold ``errors``, the mean squared differences per picture, their mean ``error``,
        and ``real``, the share of the given pictures on which the judge sees the concept.

    Raises:
        CapabilityError: the model is no generator, or has no such space.
        ConfigurationError: a setting out of range, or pictures of another size.
    """
    check_attack(model, "generator_inversion", steps=steps, lr=lr, restarts=restarts)
    check_pictures(model, images)
    n = len(images)
    with attacked(model) as watch:
        target = images.to(device_of(model))
        tries, errors = [], []
        for turn in range(restarts):
            start = _nearest(model, target, seed, turn, space)
            tries.append(_fitted(model, target, start, steps, lr))
            errors.append(_errors(pictures_of(model, tries[-1]), target))
        best, turns = torch.stack(errors).min(dim=0)
        found = Latents.cat(tries)[turns * n + torch.arange(n, device=turns.device)]
        redrawn = pictures_of(model, found)
        hits, real = seen(confirm, redrawn), seen(confirm, target)
    return GeneratorAttackReport(
        name="generator_inversion",
        rate=float(hits.double().mean()),
        n=n,
        native=None,
        seconds=watch.seconds,
        settings={"seed": seed, "steps": steps, "lr": lr, "restarts": restarts,
                  "space": found.space},
        details={
            "error": float(best.mean()),
            "errors": [float(value) for value in best.cpu()],
            "real": float(real.double().mean()),
        },
        pictures=shown_first(redrawn, hits),
    )  # fmt: skip


def inversion_ratio(report: GeneratorAttackReport, original: GeneratorAttackReport) -> float:
    """Mean error of the reconstructions over that of the original model; 1 is as close.

    Raises:
        ConfigurationError: they are not reports of inversions of as many pictures.
    """
    if {report.name, original.name} != {"generator_inversion"} or report.n != original.n:
        raise ConfigurationError(
            f"`report` is {report.name} of {report.n} pictures and `original` {original.name} of "
            f"{original.n}; give two reports of `generator_inversion` of the same pictures"
        )
    return float(report.details["error"] / max(original.details["error"], 1e-12))


def check_pictures(model: Any, images: Tensor) -> None:
    """Refuse what is not a batch of pictures of the generator's size.

    Raises:
        ConfigurationError: gives both shapes.
    """
    size = tuple(model.resolution)
    if images.ndim != 4 or not len(images) or tuple(images.shape[1:]) != (3, *size):
        raise ConfigurationError(
            f"`images` has shape {tuple(images.shape)}, it must be (N, 3, {size[0]}, {size[1]}) "
            "with N above 0, in [0, 1]"
        )


def _errors(images: Tensor, target: Tensor) -> Tensor:
    return (images - target).square().flatten(1).mean(dim=1)


@torch.no_grad()
def _nearest(
    model: Any, target: Tensor, seed: int, turn: int, space: LatentSpace | None
) -> Latents:
    """For every picture the nearest of some drawn latents."""
    latents = drawn(model, STARTS, seed, "-generator-inversion", space, turn * STARTS)
    made = pictures_of(model, latents)
    return latents[torch.cdist(target.flatten(1), made.flatten(1)).argmin(dim=1)]


def _fitted(model: Any, target: Tensor, start: Latents, steps: int, lr: float) -> Latents:
    region = Region(model, start)
    codes = start.codes.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([codes], lr)
    for _ in range(steps):
        away = _errors(model.synthesise(start.moved(codes)), target)
        (codes.grad,) = torch.autograd.grad(away.sum(), [codes])
        optimizer.step()
        codes.data.copy_(region.project(codes))
    return start.moved(codes.detach())
