"""IdentityUnlearning: a latent and its neighbourhood learn to draw what lies on the other side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.concept import ConceptSpec
from mmforget.data.hashing import uniform
from mmforget.data.latent_pool import LatentRecords
from mmforget.errors import ConfigurationError
from mmforget.methods.base import samples
from mmforget.methods.generator_editing import ClipSource, GeneratorMethod
from mmforget.methods.latent_sorting import guide_probabilities, sort_latents
from mmforget.methods.text_guided import at_least_one
from mmforget.models.base import Latents, LatentSpace, Model
from mmforget.models.latent_inversion import invert

logger = logging.getLogger(__name__)

LEAST_RECORDS = 512
"""So many rows the sources are repeated to, so that an epoch is more than a step."""


class IdentityUnlearning(GeneratorMethod):
    """Forget one subject, given by a picture, a latent or a text, and the latents around it.

    With u a latent that draws the subject, ``m`` the mean latent and r the mean distance from it,
    u shall draw what the original draws from ``t = m - distance * r * (u - m) / |u - m|``, on the
    other side of the mean. Its neighbours shall draw what those of t do, and all other latents what
    they did. Minimises mean distances d of pictures, with ``s`` a step of a length in
    [0, neighbourhood * r] towards another latent, v::

        forget_weight * d(G(u), G0(t)) + neighbour_weight * d(G(u + s), G0(t + s))
        + retain_weight * d(G(v), G0(v))

    The published method works in the styles of one generator of faces, with lengths 30 and up to
    15 in its units; here lengths are multiples of r, which also suits other style-based generators
    and those that draw from z, where t is the antipode of u. With a guide, an antipode that shows
    the concept as well is replaced by the nearest latent that does not, and neighbours that do not
    show it are left alone.

    Args:
        model: the generator, such as `ImageGAN`.
        concepts: the name of the subject. Without `images` and `latents`, all latents of the pool
            in which the guide sees it are sources.
        guide: a CLIP model, or several, or their folders or hub ids; None with a picture or latent.
        alternatives: of the guide, see `ConceptGuide`.
        copy, seed, lr, batch_size, retain_batch_size, pool: see `GeneratorMethod`.
        bearing, clear, retain, retain_weight, clip: see `GeneratorMethod`.
        train_layers: see `GeneratorMethod`; None takes ``synthesis`` of a style-based network, else
            ``all``.
        images: (n, 3, H, W) in [0, 1], pictures of the subject, which are inverted first.
        latents: latents that draw the subject.
        labels: (n,) classes of `images` for a conditional generator.
        inversion_steps: see `invert`.
        distance: of the target from the mean, in mean distances; 0 takes the mean itself.
        neighbourhood: see above.
        forget_weight, neighbour_weight: see above.
        perceptual: distance of pictures (B, 3, H, W) in [0, 1], twice, to (B,), such as LPIPS, in
            place of `retain`.

    Raises:
        ConfigurationError: a setting out of range, or nothing that says what the subject is.
        RequestError: see `GeneratorMethod`.

    Reference:
        Seo et al., Generative unlearning for any identity, 2024, arXiv 2405.09879.
    """

    needs_guide: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource] | None = None,
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-3,
        batch_size: int = 16,
        retain_batch_size: int = 32,
        pool: int = 4096,
        bearing: float = 0.3,
        clear: float = 0.2,
        retain: str = "pixel",
        retain_weight: float = 10.0,
        train_layers: str | None = None,
        clip: float = 5.0,
        images: Tensor | None = None,
        latents: Latents | None = None,
        labels: Tensor | None = None,
        inversion_steps: int = 200,
        distance: float = 1.0,
        neighbourhood: float = 0.5,
        forget_weight: float = 1.0,
        neighbour_weight: float = 1.0,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if images is not None and latents is not None:
            raise ConfigurationError("`images` and `latents` are both given; give one of them")
        if images is None and latents is None and guide is None:
            raise ConfigurationError(
                "IdentityUnlearning has neither `images` nor `latents` nor `guide`; give one, so "
                "that it knows what the subject looks like"
            )
        if latents is not None and not len(latents):
            raise ConfigurationError("`latents` is empty; give at least one")
        for name, value in (("distance", distance), ("neighbourhood", neighbourhood),
                            ("forget_weight", forget_weight),
                            ("neighbour_weight", neighbour_weight)):  # fmt: skip
            if not value >= 0:
                raise ConfigurationError(f"`{name}` is {value}, it must be 0 or more")
        at_least_one(inversion_steps=inversion_steps)
        styled = "w" in getattr(model, "latent_spaces", ())
        if train_layers is None:
            train_layers = "synthesis" if styled else "all"
        super().__init__(
            model, concepts, guide, alternatives, copy, seed, lr, batch_size, retain_batch_size,
            pool, bearing, clear, retain, retain_weight, train_layers, clip,
        )  # fmt: skip
        self.space: LatentSpace = "w" if styled else "z"
        self._source = (images, latents, labels)
        self.inversion_steps, self.reach, self.neighbourhood = (
            inversion_steps, distance, neighbourhood,
        )  # fmt: skip
        self.forget_weight, self.neighbour_weight = forget_weight, neighbour_weight
        if perceptual is not None:
            self._distance = (perceptual,)
        self.radius = 0.0
        self.inversion_error: list[float] = []
        self.replaced = 0

    # ---- data -----------------------------------------------------------------------------------

    def drawn(self, batch: Mapping[str, Tensor]) -> Latents:
        """The latents of a batch, in the space in which the method works."""
        return Latents(batch["codes"], batch.get("label"), self.space)

    @torch.no_grad()
    def _sort(self) -> None:
        pool = self._plain(self.original.mapped(self.pool(), self.space))
        self.spend(retain=len(pool))
        kept = pool
        bearing = None
        if self._guide:
            probabilities = guide_probabilities(self.original, self.guide, pool)
            kept = pool[(probabilities < self.clear).all(dim=1)]
            if self._source[:2] == (None, None):
                found = sort_latents(self.original, self.guide, pool, self.bearing, self.clear)
                self.prevalence = found.prevalence
                bearing, kept = found.records["forget"].latents, found.records["retain"].latents
        sources = self._sources() if bearing is None else bearing
        centre = torch.zeros_like(pool.codes[0]) if self.space == "z" else pool.codes.mean(0)
        self.radius = float((pool.codes - centre).norm(dim=1).mean())
        targets = self._targets(sources, centre, kept)
        times = -(-LEAST_RECORDS // len(sources))
        rows = torch.arange(len(sources)).repeat(times)
        extra = {"target": targets.codes[rows]}
        if targets.labels is not None:
            extra["target_label"] = targets.labels[rows]
        self.records = {
            "forget": LatentRecords(sources[rows], extra=extra),
            "retain": LatentRecords(kept),
        }

    def _sources(self) -> Latents:
        """The latents of the subject, from a picture or as they were given."""
        images, latents, labels = self._source
        if latents is None:
            assert images is not None
            with torch.enable_grad():
                latents, error = invert(
                    self.original, images, labels, space=self.space, steps=self.inversion_steps,
                    seed=self.seed, purpose="identity",
                )  # fmt: skip
            self.inversion_error = error.tolist()
            self.spend(forget=3 * self.inversion_steps * len(images))
        found = self._plain(self.original.mapped(latents, self.space))
        if self._guide:
            seen = guide_probabilities(self.original, self.guide, found).amax(dim=1)
            if not bool((seen > self.bearing).any()):
                logger.warning(
                    "the guide does not see '%s' in what is drawn from the given latents",
                    self.concepts[0].target,
                )
        return found

    def _targets(self, sources: Latents, centre: Tensor, kept: Latents) -> Latents:
        """What the sources shall draw."""
        unit = F.normalize(sources.codes - centre, dim=1)
        labels = None if sources.labels is None else sources.labels.clone()
        codes = centre - self.reach * self.radius * unit
        if self._guide:
            seen = guide_probabilities(self.original, self.guide, sources.moved(codes))
            shows = (seen > self.clear).any(dim=1)
            near = (F.normalize(kept.codes - centre, dim=1) @ -unit.T).argmax(dim=0)
            codes[shows] = kept.codes[near[shows]]
            if labels is not None and kept.labels is not None:
                labels[shows] = kept.labels[near[shows]]
            self.replaced = int(shows.sum())
        return Latents(codes, labels, self.space)

    @staticmethod
    def _plain(latents: Latents) -> Latents:
        """Detached and on the CPU, as records are."""
        return Latents(latents.codes.detach().cpu(), latents.labels, latents.space)

    # ---- training -------------------------------------------------------------------------------

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """See the class."""
        sources, clear = self.drawn(batch["forget"]), self.drawn(batch["retain"])
        targets = Latents(
            batch["forget"]["target"], batch["forget"].get("target_label"), self.space
        )
        step = self._steps(batch["forget"], sources.codes, clear.codes)
        near = sources.moved(sources.codes + step)
        n = len(sources)
        images = self.model.synthesise(Latents.cat([sources, near, clear]))
        wanted = self.kept(Latents.cat([targets, targets.moved(targets.codes + step)]))
        weight = batch["forget"]["weight"].to(images)
        shown = weight
        if self._guide:
            with torch.no_grad():
                seen = self.guide.probabilities(self.kept(near))
            shown = weight * (seen > self.bearing).any(dim=1)
        there = self.distance(images[:n], wanted[:n])
        beside = self.distance(images[n : 2 * n], wanted[n:])
        return {
            "forget": self.forget_weight * self.global_mean(there, weight),
            "neighbour": self.neighbour_weight * self.global_mean(beside, shown),
            "retain": self.retained(
                images[2 * n :], self.kept(clear), batch["retain"]["weight"].to(images)
            ),
        }

    def _steps(self, batch: Mapping[str, Tensor], codes: Tensor, others: Tensor) -> Tensor:
        """Steps from codes towards others, of random length."""
        ids: np.ndarray = batch["id"].cpu().numpy()
        drawn = uniform(ids, self.seed, "neighbour", self.trainer.global_step)
        towards = others[torch.arange(len(codes), device=codes.device) % len(others)]
        length = self.neighbourhood * self.radius * torch.from_numpy(drawn).to(codes)
        return length[:, None] * F.normalize(towards - codes, dim=1)

    def count(self, batch: Any) -> None:
        """Count forward and backward passes of the generators."""
        forget, retain = samples(batch["forget"]), samples(batch["retain"])
        self.spend(forget=2 * forget, retain=retain, backward=True)
        self.spend(forget=(3 if self._guide else 2) * forget, retain=retain)

    def statistics(self) -> dict[str, Any]:
        """The base's, the lengths in the units of this generator, and how the inversion went."""
        return super().statistics() | {
            "space": self.space,
            "mean_distance": self.radius,
            "inversion_error": self.inversion_error,
            "replaced_targets": self.replaced,
        }
