"""Inversion: the latent from which a generator draws a given picture, as nearly as it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.models.base import Latents, LatentSpace, frozen


def invert(
    model: Any,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    space: LatentSpace | None = None,
    steps: int = 200,
    lr: float = 0.05,
    starts: int = 512,
    seed: int = 0,
    purpose: str = "inversion",
) -> tuple[Latents, Tensor]:
    """Find latents of pictures by Adam on the squared difference, from the nearest drawn ones.

    Latents stay within the largest distance from the mean that a drawn one has, so that what is
    found is something that the generator might draw.

    Args:
        model: a generator, such as `ImageGAN`; nothing of it changes.
        images: (n, 3, H, W) in [0, 1], of the generator's size.
        labels: (n,) classes of the pictures, needed by a conditional generator.
        space: of the latents; None takes ``w`` of a style-based network, else ``z``.
        steps: of Adam; 0 returns the nearest drawn ones.
        lr: of Adam, in units of the standard deviation of the latents.
        starts: latents that are drawn.
        seed: of the draw.
        purpose: keeps draws for different uses apart.

    Returns:
        n latents, and (n,) mean squared differences of values in [0, 1].

    Raises:
        ConfigurationError: pictures of another size, missing labels, or a setting out of range.

    Reference:
        Abdal et al., Image2StyleGAN: how to embed images into the StyleGAN latent space?, 2019,
        arXiv 1904.03189.
    """
    shape = (3, *model.resolution)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        raise ConfigurationError(
            f"`images` has the shape {tuple(images.shape)}, it must be (n, {shape[0]}, {shape[1]}, "
            f"{shape[2]}), values in [0, 1]"
        )
    if model.num_classes and (labels is None or len(labels) != len(images)):
        raise ConfigurationError(
            f"`labels` is {labels}, but this generator has {model.num_classes} classes; give the "
            f"class of each of the {len(images)} pictures"
        )
    if steps < 0 or starts < 2 or not lr > 0:
        raise ConfigurationError(
            f"`steps` is {steps}, `starts` {starts} and `lr` {lr}; they must be at least 0, at "
            "least 2, and positive"
        )
    space = space or ("w" if "w" in model.latent_spaces else "z")
    device = next(model.network.parameters()).device
    images = images.to(device)
    with frozen(model.network):
        codes, every = _nearest(model, images, labels, space, starts, seed, purpose)
        centre, spread = every.mean(0), every.std()
        reach = (every - centre).norm(dim=1).max()
        found = codes.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([found], lr * float(spread))
        for _ in range(steps):
            loss = _away(model.synthesise(Latents(found, labels, space)), images).sum()
            (found.grad,) = torch.autograd.grad(loss, [found])
            optimizer.step()
            with torch.no_grad():
                offset = found - centre
                length = offset.norm(dim=-1, keepdim=True).clamp(min=1e-12)
                found.copy_(centre + offset * (reach / length).clamp(max=1))
        latents = Latents(found.detach(), labels, space)
        with torch.no_grad():
            return latents, _away(model.synthesise(latents), images)


@torch.no_grad()
def _nearest(
    model: Any,
    images: Tensor,
    labels: Tensor | None,
    space: LatentSpace,
    starts: int,
    seed: int,
    purpose: str,
) -> tuple[Tensor, Tensor]:
    """Codes of the nearest drawn pictures, and all that were drawn."""
    best: dict[int, Tensor] = {}
    every: list[Tensor] = []
    classes = [None] if labels is None else labels.unique().tolist()
    for number in classes:
        of_class = None if number is None else torch.full((starts,), number)
        latents = model.mapped(
            model.draw(starts, seed, labels=of_class, purpose=f"-{purpose}"), space
        )
        codes, made = latents.codes.to(images), model.pictures(latents)
        every.append(codes)
        for row, image in enumerate(images):
            if labels is None or int(labels[row]) == number:
                best[row] = codes[_away(made, image).argmin()]
    return torch.stack([best[row] for row in range(len(images))]), torch.cat(every)


def _away(images: Tensor, wanted: Tensor) -> Tensor:
    return (images - wanted).square().flatten(1).mean(1)
