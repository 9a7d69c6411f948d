"""Text-to-Unlearn: remove what a text names from a generator, native pictures and edits alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec
from mmforget.data.hashing import uniform
from mmforget.errors import ConfigurationError, suggest
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Latents, Model
from mmforget.models.latent_mapper import LatentMapper

logger = logging.getLogger(__name__)

Objective = Literal["margin", "direction"]
STRENGTHS = (0.3, 1.5)
AGREEMENT = 0.3
"""Below this, an edit depends on the picture, which the published method must exclude."""


class TextToUnlearn(GeneratorMethod):
    """Push pictures away from a text until the guide no longer sees it, and keep the others.

    Phase 1 trains a latent mapper on the frozen generator that makes it draw the concept. Phase 2
    fine-tunes a copy. With P the original generator's probability of the concept, m the guide's
    margin, u latents and û edited ones of random strength in [0.3, 1.5], the objective ``margin``
    minimises::

        forget_weight * (mean_{P(u) > bearing} relu(m(G(u)) + kappa) + mean relu(m(G(û)) + kappa))
        + retain_weight * mean_{P(u) < clear} d(G(u), G0(u))
        + edit_weight * mean_{P(u) < clear} d(G(û), G0(u))

    The objective ``direction`` is our reconstruction of the published one: the change that the
    tuned generator makes to edited pictures shall point against the mean change i that the edit
    makes in the original, ``1 - cos(e(G(û)) - e(G0(û)), -i)``, with the same retain terms on all
    latents. It blocks that one edit and leaves what the generator draws without any edit: we keep
    it for comparison, and made ``margin`` the default, which works on native pictures as well.
    Where the paper uses LPIPS, small pictures use squared differences.

    Args:
        model, concepts, guide, alternatives: see `GeneratorMethod`.
        copy, seed, lr, batch_size, retain_batch_size, pool, bearing, clear: see `GeneratorMethod`.
        retain, retain_weight, train_layers, clip: see `GeneratorMethod`.
        objective: see above.
        forget_weight: see above.
        kappa: the margin is pushed below minus this, in logits.
        edit_weight: see above.
        mapper_steps: of phase 1; 0 leaves edits out, for the objective ``margin`` only.
        mapper_scale: of the edits, at the first try.
        mapper_tries: trainings of a mapper until it elicits the concept, at most.

    Raises:
        ConfigurationError: a setting out of range.
        RequestError: see `GeneratorMethod`.

    Reference:
        Prompting forgetting: unlearning in GANs via textual guidance, 2025, arXiv 2504.01218. There
        is no public code; the losses are known from its abstract and public reviews only.
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
        retain_batch_size: int = 64,
        pool: int = 4096,
        bearing: float = 0.05,
        clear: float = 0.02,
        retain: str = "pixel",
        retain_weight: float = 20.0,
        train_layers: str = "all",
        clip: float = 5.0,
        objective: Objective = "margin",
        forget_weight: float = 0.2,
        kappa: float = 4.0,
        edit_weight: float = 2.0,
        mapper_steps: int = 200,
        mapper_scale: float = 1.0,
        mapper_tries: int = 5,
    ) -> None:
        if objective not in get_args(Objective):
            raise ConfigurationError(
                f"`objective` is '{objective}', {suggest(objective, get_args(Objective))}"
            )
        for name, value in (("forget_weight", forget_weight), ("edit_weight", edit_weight)):
            if not value >= 0:
                raise ConfigurationError(f"`{name}` is {value}, it must be 0 or more")
        if mapper_steps < 0:
            raise ConfigurationError(f"`mapper_steps` is {mapper_steps}, it must be 0 or more")
        at_least_one(mapper_tries=mapper_tries)
        if objective == "direction":
            at_least_one(mapper_steps=mapper_steps)
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, retain_batch_size,
            pool, bearing, clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip
        self.objective: Objective = objective
        self.forget_weight, self.kappa, self.edit_weight = forget_weight, kappa, edit_weight
        self.mapper_steps, self.mapper_scale = mapper_steps, mapper_scale
        self.mapper_tries = mapper_tries
        self._mappers: tuple[LatentMapper, ...] = ()
        self._directions = torch.zeros(0)

    def prepare(self) -> None:
        """Phase 1."""
        if not self.mapper_steps:
            return
        found = self.train_mappers(self.mapper_steps, self.mapper_tries, self.mapper_scale)
        for concept, report in zip(self.concepts, self.mapper_reports, strict=True):
            if report.agreement < AGREEMENT and self.objective == "direction":
                logger.warning(
                    "the edit towards '%s' depends on the picture (agreement %.2f, below %g)",
                    concept.target, report.agreement, AGREEMENT,
                )  # fmt: skip
        self._mappers = tuple(mapper for mapper, _ in found)
        self._directions = torch.stack([direction for _, direction in found])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        if self.objective == "direction":
            return self._along_direction(batch)
        bearing, clear = self.drawn(batch["forget"]), self.drawn(batch["retain"])
        edited, which = self._edited(batch["retain"], clear)
        images = self.model.synthesise(Latents.cat([bearing, *edited, clear]))
        n, kept = len(bearing), self.kept(clear)
        pushed = images[: len(images) - len(clear)]
        over = torch.relu(self.guide.margins(self.guide.embed(pushed)) + self.kappa)
        # A latent that shows one of several concepts is pushed away from that one.
        shown = (batch["forget"]["probability"].to(over) > self.bearing).to(over)
        native = (over[:n] * shown).sum(1) / shown.sum(1).clamp(min=1)
        weight = batch["retain"]["weight"].to(over)
        terms = {
            "forget": self.forget_weight
            * self.global_mean(native, batch["forget"]["weight"].to(over)),
            "retain": self.retained(images[len(pushed) :], kept, weight),
        }
        if edited:
            rows = torch.arange(len(which), device=over.device)
            edits = over[n:][rows, which]
            back = self.distance(images[n : len(pushed)], kept)
            terms["edit"] = self.forget_weight * self.global_mean(edits, weight)
            terms["edit_retain"] = self.edit_weight * self.global_mean(back, weight)
        return terms

    def _edited(
        self, batch: Mapping[str, Tensor], latents: Latents
    ) -> tuple[list[Latents], Tensor]:
        """Clear latents, each edited towards one of the concepts, and which one it was."""
        count = len(self._mappers)
        ids, step = batch["id"].cpu().numpy(), self.trainer.global_step
        turn = torch.from_numpy(uniform(ids, self.seed, "edit", step) * max(count, 1))
        which = turn.long().to(latents.codes.device)
        if not count:
            return [], which
        low, high = STRENGTHS
        drawn = torch.from_numpy(low + (high - low) * uniform(ids, self.seed, "strength", step))
        strength = drawn.to(latents.codes)
        every = torch.stack([mapper(latents, strength).codes for mapper in self._mappers])
        codes = every[which, torch.arange(len(which), device=which.device)]
        return [latents.moved(codes)], which

    def _along_direction(self, batch: Any) -> dict[str, Tensor]:
        """Our reconstruction of the published objective."""
        parts = [self.drawn(batch[name]) for name in ("forget", "retain")]
        latents = Latents.cat(parts)
        both = {
            key: torch.cat([batch["forget"][key], batch["retain"][key]]) for key in ("id", "weight")
        }
        edited, which = self._edited(both, latents)
        images = self.model.synthesise(Latents.cat([*edited, latents]))
        kept, moved = self.kept(latents), self.kept(edited[0])
        change = self.guide.embed(images[: len(latents)]) - self.guide.embed(moved)
        # At the first step both generators are the same, and the change has no direction.
        unit = change / (change.norm(dim=1, keepdim=True) + 1e-3)
        away = 1 + (unit * self._directions.to(unit)[which]).sum(1)
        weight = both["weight"].to(away)
        back = self.distance(images[: len(latents)], kept)
        return {
            "forget": self.global_mean(away, weight),
            "retain": self.retained(images[len(latents) :], kept, weight),
            "edit_retain": self.edit_weight * self.global_mean(back, weight),
        }

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the generators."""
        forget, retain = samples(batch["forget"]), samples(batch["retain"])
        edits = retain if self._mappers else 0
        self.spend(forget=forget + edits, retain=retain, backward=True)
        self.spend(retain=retain)

    def statistics(self) -> dict[str, Any]:
        """The base's, and the objective."""
        return super().statistics() | {"objective": self.objective}
