"""Erase by direction: the change of a picture points from the concept's words to its anchor's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.models.base import Latents, Model

Reference = Literal["text", "mapper"]
SOFT_LENGTH = 1e-3
"""Added to a change's length: at the first step both generators agree, and nothing has changed."""


class ClipDirection(GeneratorMethod):
    """Move pictures of a concept along the guide's direction away from it.

    The directional loss of StyleGAN-NADA, turned to removal: it trains on latents that show the
    concept only, and keeps the pictures of the others. With e the guide's embedding and d the unit
    direction from the concept's text to that of its anchor, it minimises::

        mean_{P(u) > bearing} 1 - cos(e(G(u)) - e(G0(u)), d)
        + retain_weight * mean_{P(u) < clear} d(G(u), G0(u))

    The cosine knows no length. So a picture that the guide no longer takes for the concept by a
    margin of `kappa` is pushed no further. Suits features, which have an opposite; of a kind of
    object it leaves more than `TextToUnlearn` does.

    Args:
        model, concepts, guide, alternatives: see `GeneratorMethod`. The anchor of a concept is
            where its pictures go; without one it is ``a picture``.
        copy, seed, lr, batch_size, retain_batch_size, pool, bearing, clear: see `GeneratorMethod`.
        retain, retain_weight, train_layers, clip: see `GeneratorMethod`.
        reference: where d comes from: ``text``, or ``mapper`` for the reverse of the mean change
            that a latent mapper makes when it elicits the concept.
        kappa: margin in logits, see above; infinity pushes until the end.
        mapper_steps: of the mapper.
        mapper_tries: trainings of a mapper until it elicits the concept, at most.

    Raises:
        ConfigurationError: a setting out of range.
        RequestError: see `GeneratorMethod`.

    Reference:
        Gal et al., StyleGAN-NADA: CLIP-guided domain adaptation of image generators, 2021,
        arXiv 2108.00946.
    """

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-3,
        batch_size: int = 32,
        retain_batch_size: int = 32,
        pool: int = 4096,
        bearing: float = 0.3,
        clear: float = 0.2,
        retain: str = "pixel",
        retain_weight: float = 10.0,
        train_layers: str = "all",
        clip: float = 5.0,
        reference: Reference = "text",
        kappa: float = 3.0,
        mapper_steps: int = 200,
        mapper_tries: int = 5,
    ) -> None:
        if reference not in get_args(Reference):
            raise ConfigurationError(
                f"`reference` is '{reference}', {suggest(reference, get_args(Reference))}"
            )
        if math.isnan(kappa):
            raise ConfigurationError(f"`kappa` is {kappa}, it must be a number of logits")
        if mapper_steps < 1:
            raise ConfigurationError(f"`mapper_steps` is {mapper_steps}, it must be at least 1")
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, retain_batch_size,
            pool, bearing, clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip
        self.reference: Reference = reference
        self.kappa = kappa
        self.mapper_steps, self.mapper_tries = mapper_steps, mapper_tries
        self._directions = torch.zeros(0)

    def prepare(self) -> None:
        """Find the directions (K, d)."""
        if self.reference == "text":
            self._directions = self.guide.directions()
            return
        found = self.train_mappers(self.mapper_steps, self.mapper_tries)
        self._directions = torch.stack([-elicited for _, elicited in found])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        bearing, clear = self.drawn(batch["forget"]), self.drawn(batch["retain"])
        kept = self.kept(Latents.cat([bearing, clear]))
        images = self.model.synthesise(Latents.cat([bearing, clear]))
        n = len(bearing)
        embedding = self.guide.embed(images[:n])
        change = embedding - self.guide.embed(kept[:n])
        unit = change / (change.norm(dim=1, keepdim=True) + SOFT_LENGTH)
        away = 1 - unit @ self._directions.to(unit).T
        with torch.no_grad():
            shown = batch["forget"]["probability"].to(away) > self.bearing
            left = self.guide.margins(embedding) > -self.kappa
            pushed = (shown & left).to(away)
        forget = (away * pushed).sum(1) / shown.sum(1).clamp(min=1)
        weight = {name: batch[name]["weight"].to(away) for name in ("forget", "retain")}
        return {
            "forget": self.global_mean(forget, weight["forget"]),
            "retain": self.retained(images[n:], kept[n:], weight["retain"]),
        }

    def count(self, batch: Any) -> None:
        """Count passes of both generators."""
        forget, retain = samples(batch["forget"]), samples(batch["retain"])
        self.spend(forget, retain, backward=True)
        self.spend(forget, retain)

    def statistics(self) -> dict[str, Any]:
        """The base's, and the direction that was followed."""
        return super().statistics() | {"reference": self.reference}
