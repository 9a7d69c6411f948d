"""Latent mappers: small networks that move a latent so that the generator draws a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigurationError
from mmforget.models.base import HasLatents, Latents, LatentSpace, frozen
from mmforget.models.concept_guide import ConceptGuide

COARSE, MEDIUM = 4, 8
"""Styles below the first number form the coarse group, those below the second the medium one."""

BATCH_SIZE = 64
"""Latents per step of the training of a mapper, and per batch of its report."""


class LatentMapper(nn.Module):
    """Moves latents: ``edited = u + strength * scale * M(u)``.

    In ``z`` and ``w``, M is a network of two hidden layers; in ``w+``, one for the coarse, the
    medium and the fine styles each.

    Args:
        size: numbers in a latent or style.
        layers: styles of ``w+``, 0 elsewhere.
        width: of the hidden layers; None takes 128, or `size` in ``w+``.
        scale: of the steps.

    Reference:
        Patashnik et al., StyleCLIP: text-driven manipulation of StyleGAN imagery, 2021,
        arXiv 2103.17249.
    """

    def __init__(
        self, size: int, layers: int = 0, width: int | None = None, scale: float = 1.0
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ConfigurationError(f"`scale` is {scale}, it must be positive")
        self.layers, self.scale = layers, scale
        width = width or (size if layers else 128)
        self.groups = nn.ModuleList(
            nn.Sequential(
                nn.Linear(size, width),
                nn.LeakyReLU(0.2),
                nn.Linear(width, width),
                nn.LeakyReLU(0.2),
                nn.Linear(width, size),
            )
            for _ in self._bounds()
        )

    def _bounds(self) -> list[slice]:
        if not self.layers:
            return [slice(None)]
        edges = sorted({0, min(COARSE, self.layers), min(MEDIUM, self.layers), self.layers})
        return [slice(a, b) for a, b in pairwise(edges)]

    def steps(self, codes: Tensor) -> Tensor:
        """M(u) of codes, in their shape and precision, whatever that of the mapper is."""
        given = codes.to(next(self.parameters()).dtype)
        if not self.layers:
            found: Tensor = self.groups[0](given)
            return found.to(codes.dtype)
        parts = [net(given[:, s]) for net, s in zip(self.groups, self._bounds(), strict=True)]
        return torch.cat(parts, dim=1).to(codes.dtype)

    def forward(self, latents: Latents, strength: Tensor | float = 1.0) -> Latents:
        """Move latents.

        Args:
            latents: of the space that the mapper was made for.
            strength: (B,) or one number; 1 is the full edit, 0 none.
        """
        codes = latents.codes
        if isinstance(strength, Tensor):
            strength = strength.to(codes).view(-1, *[1] * (codes.ndim - 1))
        return latents.moved(codes + strength * self.scale * self.steps(codes))


@dataclass(frozen=True)
class MapperReport:
    """How well a mapper elicits its concept, on latents it was not trained on.

    Attributes:
        elicited: share of edited latents whose picture shows the concept to the guide (P > 0.5).
        native: the same without edit.
        scale: of the steps, after all tries.
        tries: trainings that were made, those before and after the best one too.
        agreement: mean cosine of the pictures' changes, in the guide's embedding, with their mean;
            below 0.3 the edit depends on the picture.
        text_agreement: cosine of the mean change with the text's direction to the concept.
        steps: of each training.
    """

    elicited: float
    native: float
    scale: float
    tries: int
    agreement: float
    text_agreement: float
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def train_mapper(
    model: HasLatents,
    guide: ConceptGuide,
    concept: int = 0,
    *,
    space: LatentSpace | None = None,
    steps: int = 200,
    batch_size: int = BATCH_SIZE,
    lr: float = 2e-3,
    scale: float = 1.0,
    norm_weight: float = 0.02,
    enough: float = 0.7,
    tries: int = 5,
    checked: int = 512,
    seed: int = 0,
    purpose: str = "mapper",
) -> tuple[LatentMapper, Tensor, MapperReport]:
    """Train a mapper that makes a frozen generator draw a concept.

    Minimises ``1 - cos(picture, text) + norm_weight * mean |M(u)|^2``. As long as fewer than
    `enough` of the edits work, the steps are made 1.5 times larger and the training begins anew.

    Args:
        model: the generator; nothing of it changes.
        guide: knows the concept.
        concept: which of the guide's concepts.
        space: of the latents; None takes the last of the model's: ``z``, or ``w+``.
        steps: of Adam.
        batch_size: latents per step, drawn anew each time.
        lr: of Adam.
        scale: of the steps at the first try.
        norm_weight: of the squared length.
        enough: share of edits that must work.
        tries: trainings at most.
        checked: latents for the report.
        seed: base of all draws.
        purpose: keeps the draws of a method and of an audit apart.

    Returns:
        The mapper, the unit direction (d,) in which it moves the guide's embedding on average, and
        the report.

    Raises:
        ConfigurationError: a count below 1.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("tries", tries),
                        ("checked", checked)):  # fmt: skip
        if value < 1:
            raise ConfigurationError(f"`{name}` is {value}, it must be at least 1")
    device = next(model.network.parameters()).device
    best: tuple[LatentMapper, Tensor, MapperReport] | None = None
    made = 0
    with frozen(model.network):
        judged = [
            _drawn(model, min(BATCH_SIZE, checked - start), seed, start, f"{purpose}-check", space)
            for start in range(0, checked, BATCH_SIZE)
        ]
        for number in range(tries):
            mapper = _new_mapper(model, space, scale * 1.5**number, seed, purpose).to(device)
            optimizer = torch.optim.Adam(mapper.parameters(), lr)
            for step in range(steps):
                first = (number * steps + step) * batch_size
                latents = _drawn(model, batch_size, seed, first, purpose, space)
                moves = mapper.steps(latents.codes)
                edited = latents.moved(latents.codes + mapper.scale * moves)
                embedding = guide.embed(model.synthesise(edited))
                away = 1 - embedding @ guide.targets[concept]
                loss = away.mean() + norm_weight * moves.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            mapper.requires_grad_(False).eval()
            made = number + 1
            direction, report = _report(model, guide, concept, mapper, judged, made, steps)
            if best is None or report.elicited > best[2].elicited:
                best = mapper, direction, report
            if best[2].elicited >= enough:
                break
    assert best is not None
    mapper, direction, report = best
    return mapper, direction, replace(report, tries=made)  # the later ones were paid for as well


def _drawn(
    model: Any, n: int, seed: int, first: int, purpose: str, space: LatentSpace | None
) -> Latents:
    """Latents on the device of the model, detached from its mapping network."""
    device = next(model.network.parameters()).device
    found: Latents = model.mapped(model.draw(n, seed, first, purpose=f"-{purpose}"), space)
    return Latents(found.codes.detach().to(device), found.labels, found.space)


def _new_mapper(
    model: Any, space: LatentSpace | None, scale: float, seed: int, purpose: str
) -> LatentMapper:
    from mmforget.seeds import derive

    example = _drawn(model, 1, seed, 0, purpose, space).codes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, f"{purpose}-weights"))
        layers = example.shape[1] if example.ndim == 3 else 0
        return LatentMapper(example.shape[-1], layers, scale=scale)


@torch.no_grad()
def _report(
    model: Any,
    guide: ConceptGuide,
    concept: int,
    mapper: LatentMapper,
    judged: Sequence[Latents],
    tries: int,
    steps: int,
) -> tuple[Tensor, MapperReport]:
    """The mean direction (d,) of the changes of the guide's embedding, and the report."""
    changes, elicited, native = [], 0.0, 0.0
    for latents in judged:
        plain = guide.embed(model.synthesise(latents))
        edited = guide.embed(model.synthesise(mapper(latents)))
        changes.append(edited - plain)
        elicited += float((guide.margins(edited)[:, concept] > 0).sum())
        native += float((guide.margins(plain)[:, concept] > 0).sum())
    change = torch.cat(changes)
    direction = F.normalize(change.mean(dim=0), dim=0)
    agreement = float((F.normalize(change, dim=1) @ direction).mean())
    text = float(-guide.directions()[concept] @ direction)
    return direction, MapperReport(
        elicited=elicited / len(change),
        native=native / len(change),
        scale=mapper.scale,
        tries=tries,
        agreement=agreement,
        text_agreement=text,
        steps=steps,
    )
