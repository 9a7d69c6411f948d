"""Substitution: what shows the concept is replaced by a near picture of the same generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmforget.concept import ConceptSpec
from mmforget.data.hashing import uniform
from mmforget.data.latent_pool import LatentRecords
from mmforget.errors import ConfigurationError, RequestError
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.methods.latent_sorting import MIN_BEARING, guide_probabilities
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Latents, Model

STRENGTHS = (0.3, 1.5)
CERTAIN = -6.0
"""Log-probability at which an anchor is clear enough, and only stays near."""

NEARNESS = 0.02
ASCENT = (2, 6)
"""Steps of the adversarial latents, drawn from this range."""


class AnchorDistillation(GeneratorMethod):
    """Teach latents that show a concept to draw the nearest picture that does not.

    The anchor of a latent z is the first place with ``log P <= -6`` on the way of Adam, from z on,
    through the frozen generator, else the last one::

        max(log P(G0(a)), -6) + 0.02 |a - z|^2 / dim

    With F the latents that show the concept, of their own or after the edit of a latent mapper, the
    generator then minimises::

        mean_F d(G(z), G0(a)) + retain_weight * mean_{P(u) < clear} d(G(u), G0(u))

    Pictures stay those of the same generator, and no gradient of the guide reaches its weights. A
    concept with an anchor of its own goes there: log P is then ``log(1 - Q)``, with Q the
    probability of the anchor among the target and the alternatives.

    `adversarial` looks for what is left: in every second step latents of F are moved towards the
    concept by a few gradient steps of fixed length, through the generator as it is by then. Those
    that showed the concept in the original get anchors of their own, the others their old picture.

    Args:
        model, concepts, guide, alternatives: see `GeneratorMethod`.
        copy, seed, lr, batch_size, retain_batch_size, pool, bearing, clear: see `GeneratorMethod`.
        retain, train_layers, clip: see `GeneratorMethod`; the distance serves all terms.
        retain_weight: see above.
        adversarial: see above; takes about three times as long.
        anchor_steps: of Adam for the anchors.
        anchor_lr: of that Adam, in units of the latent.
        mapper_steps: of the mappers; 0 leaves edits out.
        mapper_tries: trainings of a mapper until it elicits the concept, at most.
        ascent: length of a step of the adversarial latents; their norm is kept.

    Raises:
        ConfigurationError: a setting out of range.
        RequestError: see `GeneratorMethod`; at the start of the training, a concept that no near
            picture is free of.
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
        bearing: float = 0.2,
        clear: float = 0.2,
        retain: str = "pixel",
        retain_weight: float = 4.0,
        train_layers: str = "all",
        clip: float = 5.0,
        adversarial: bool = False,
        anchor_steps: int = 15,
        anchor_lr: float = 0.15,
        mapper_steps: int = 200,
        mapper_tries: int = 5,
        ascent: float = 0.5,
    ) -> None:
        at_least_one(anchor_steps=anchor_steps)
        if mapper_steps < 0:
            raise ConfigurationError(f"`mapper_steps` is {mapper_steps}, it must be 0 or more")
        for name, value in (("anchor_lr", anchor_lr), ("ascent", ascent)):
            if not value > 0:
                raise ConfigurationError(f"`{name}` is {value}, it must be positive")
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, retain_batch_size,
            pool, bearing, clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip
        self.adversarial = adversarial
        self.anchor_steps, self.anchor_lr, self.ascent = anchor_steps, anchor_lr, ascent
        self.mapper_steps, self.mapper_tries = mapper_steps, mapper_tries
        self.anchors: dict[str, float] = {}

    # ---- before the training --------------------------------------------------------------------

    def prepare(self) -> None:
        """Find an anchor for every latent that shows a concept, natively or after an edit."""
        forget = self.records["forget"]
        latents, ids = self._with_edits(forget.latents, forget.ids)
        parts = [
            self.anchor(latents[start : start + 128]).cpu() for start in range(0, len(latents), 128)
        ]
        self.spend(forget=len(latents) * self.anchor_steps, backward=True)
        anchors = torch.cat(parts)
        left = guide_probabilities(self.original, self.guide, latents.moved(anchors))
        free = (left < self.clear).all(1)
        self.anchors = {"looked_for": len(latents), "found": int(free.sum())}
        if int(free.sum()) < MIN_BEARING:
            raise RequestError(
                f"for only {int(free.sum())} of {len(latents)} latents there is a picture nearby "
                f"that is free of the concepts; raise `anchor_steps` (now {self.anchor_steps}) or "
                f"`clear` (now {self.clear:g})"
            )
        extra = {"anchor": anchors[free]}
        self.records["forget"] = LatentRecords(latents[free], ids[free], extra)

    def _with_edits(self, latents: Latents, ids: Tensor) -> tuple[Latents, Tensor]:
        """Native latents and edited ones that show the concept, at most as many of each."""
        clear = self.records["retain"]
        parts, numbers = [latents], [ids]
        if not self.mapper_steps:
            return latents, ids
        found = self.train_mappers(self.mapper_steps, self.mapper_tries)
        for number, (mapper, _) in enumerate(found):
            share = -(-len(latents) // len(self.concepts))
            given, given_ids = clear.latents[:share], clear.ids[:share]
            low, high = STRENGTHS
            drawn = low + (high - low) * uniform(given_ids.numpy(), self.seed, "strength", number)
            device = next(mapper.parameters()).device
            moved = given.moved(given.codes.to(device))
            edited = mapper(moved, torch.from_numpy(drawn).to(moved.codes))
            edited = edited.moved(edited.codes.detach().cpu())
            shows = guide_probabilities(self.original, self.guide, edited)[:, number] > self.bearing
            parts.append(edited[shows])
            numbers.append(given_ids[shows])
        return Latents.cat(parts), torch.cat(numbers)

    def _presence(self, images: Tensor) -> Tensor:
        """Log-probabilities (B,) that pictures show a concept; of several, the largest.

        With an anchor of its own, a concept counts as present as long as the anchor is not.
        """
        embedding = self.guide.embed(images)
        found = logsigmoid(self.guide.margins(embedding))
        scale = self.guide.scale
        for number, concept in enumerate(self.concepts):
            if not concept.anchor_text:
                continue
            names = self.guide.alternatives[concept.target]
            rows = [row for row, name in enumerate(names) if name != concept.anchor_text]
            others = torch.cat([self.guide.targets[number][None], self.guide.others[number][rows]])
            rest = torch.logsumexp(scale * embedding @ others.T, dim=1)
            absent = logsigmoid(rest - scale * embedding @ self.guide.anchors[number])
            found = found.index_copy(
                1, torch.tensor([number], device=found.device), absent[:, None]
            )
        return found.amax(1)

    @torch.enable_grad()
    def anchor(self, latents: Latents) -> Tensor:
        """Codes (n, d) of pictures near to those of latents, without the concepts."""
        start = latents.codes.detach().to(self.guide.targets)
        codes = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([codes], self.anchor_lr)
        found, done = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
        for _ in range(self.anchor_steps):
            present = self._presence(self.original.synthesise(latents.moved(codes)))
            # The first place that is free of the concepts is nearer than those that follow.
            found = torch.where(done[:, None], found, codes.detach())
            done = done | (present.detach() <= CERTAIN)
            away = (codes - start).square().mean(1)
            # A sum: what one latent does must not depend on its neighbours.
            loss = (present.clamp(min=CERTAIN) + NEARNESS * away).sum()
            (codes.grad,) = torch.autograd.grad(loss, [codes])
            optimizer.step()
        return torch.where(done[:, None], found, codes.detach())

    # ---- training -------------------------------------------------------------------------------

    @property
    def attacks(self) -> bool:
        """Whether this step looks for adversarial latents."""
        return self.adversarial and self.trainer.global_step % 2 == 1

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        bearing, clear = self.drawn(batch["forget"]), self.drawn(batch["retain"])
        targets = [self.kept(bearing.moved(batch["forget"]["anchor"])), self.kept(clear)]
        parts = [bearing, clear]
        if self.attacks:
            found = self._ascended(batch["forget"], bearing)
            parts.append(found)
            targets.append(self._taught(found))
        images = self.model.synthesise(Latents.cat(parts)).split([len(part) for part in parts])
        weight = {name: batch[name]["weight"].to(images[0]) for name in ("forget", "retain")}
        terms = {
            "forget": self.global_mean(self.distance(images[0], targets[0]), weight["forget"]),
            "retain": self.retained(images[1], targets[1], weight["retain"]),
        }
        if self.attacks:
            change = self.distance(images[2], targets[2])
            terms["adversarial"] = self.global_mean(change, weight["forget"])
        return terms

    def _ascended(self, batch: Mapping[str, Tensor], latents: Latents) -> Latents:
        """Latents moved towards the concept through the generator as it is now."""
        ids, step = batch["id"].cpu().numpy(), self.trainer.global_step
        low, high = ASCENT
        drawn = low + (high + 1 - low) * uniform(ids, self.seed, "ascent", step)
        steps = torch.from_numpy(drawn).long()
        codes = latents.codes.detach().to(self.guide.targets)
        length = codes.norm(dim=1, keepdim=True)
        for number in range(high):
            moved = codes.clone().requires_grad_(True)
            margins = self.guide.margins(
                self.guide.embed(self.model.synthesise(latents.moved(moved)))
            )
            (slope,) = torch.autograd.grad(margins.amax(1).sum(), [moved])
            slope = slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
            going = (number < steps).to(codes)[:, None]
            codes = codes + going * self.ascent * slope
            codes = codes * length / codes.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return latents.moved(codes)

    def _taught(self, latents: Latents) -> Tensor:
        """Pictures (B, 3, H, W) that adversarial latents shall draw."""
        plain = self.kept(latents)
        with torch.no_grad():
            shows = (self.guide.probabilities(plain) > self.bearing).any(1)
        replaced = self.kept(latents.moved(self.anchor(latents)))
        return torch.where(shows[:, None, None, None], replaced, plain)

    def count(self, batch: Any) -> None:
        """Count passes of both generators."""
        forget, retain = samples(batch["forget"]), samples(batch["retain"])
        self.spend(forget, retain, backward=True)
        self.spend(forget, retain)
        if self.attacks:
            self.spend(forget=forget * (ASCENT[1] + self.anchor_steps + 1), backward=True)

    def statistics(self) -> dict[str, Any]:
        """The base's, and how many anchors were found."""
        return super().statistics() | {"anchors": self.anchors}
