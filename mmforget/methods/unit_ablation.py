"""Ablation of units: switch off the channels of a layer that draw the concept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec, check_together
from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.errors import CapabilityError, ConfigurationError, RequestError, suggest
from mmforget.methods.base import ForgettingMethod
from mmforget.methods.generator_editing import ClipSource, named_alternatives
from mmforget.methods.latent_sorting import sort_latents
from mmforget.methods.text_guided import NO_DATA, at_least_one
from mmforget.models.base import Generates, HasLatents, Latents, Model, Site, Sites
from mmforget.models.concept_guide import ConceptGuide

logger = logging.getLogger(__name__)


class UnitAblation(ForgettingMethod):
    """Zero the weights that read the channels which draw the concept. No training.

    A unit is an input channel of one layer. With m the guide's margin of the concept, the score of
    a unit is how much the margin falls when nothing reads it any more, over latents that show the
    concept, less `balance` times how much it falls over latents that do not. Units with the
    largest scores are switched off until few enough latents show the concept. A baseline: units are
    shared, so that other pictures change as well.

    Args:
        model: a generator whose layers are known, such as `ImageGAN`.
        concepts: what to erase, one or several at once.
        guide: the CLIP model that is followed, or several, or their folders or hub ids.
        alternatives: per target what else a picture could show, or a list for a single concept;
            see `ConceptGuide`.
        copy, seed: see `ForgettingMethod`.
        pool: latents that are sorted.
        bearing: probability above which a latent shows a concept.
        clear: probability below which it does not.
        layer: name of the layer that reads the units; empty takes the middle one.
        units: how many are switched off; None looks for the fewest that suffice.
        left: share of the bearing latents that may go on showing the concept, in [0, 1).
        most: largest share of the units that is switched off, in (0, 1].
        balance: see above, 0 or more.
        samples: latents of each kind that a unit is scored on.

    Raises:
        RequestError: contradictory concepts, or words that the guide cannot tell apart; in
            `finalize`, a concept that the generator hardly draws, or draws always, or that no unit
            draws.
        CapabilityError: the layer reads its channels in groups.
        ConfigurationError: a setting out of range, or a layer that does not exist.

    Reference:
        Bau et al., GAN dissection: visualizing and understanding generative adversarial networks,
        2019, arXiv 1811.10597, where a segmentation network scores the units.
    """

    requires: ClassVar[tuple[type, ...]] = (Generates, HasLatents, Sites)
    access: ClassVar[DataAccess] = NO_DATA
    view: ClassVar[View | None] = None
    needs_guide: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource],
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        pool: int = 2048,
        bearing: float = 0.5,
        clear: float = 0.2,
        layer: str = "",
        units: int | None = None,
        left: float = 0.1,
        most: float = 0.5,
        balance: float = 1.0,
        samples: int = 32,
    ) -> None:
        specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
        check_together(specs)
        at_least_one(pool=pool, samples=samples, units=1 if units is None else units)
        if not 0 < clear <= bearing < 1:
            raise ConfigurationError(
                f"`clear` is {clear} and `bearing` {bearing}; they must satisfy "
                "0 < clear <= bearing < 1"
            )
        if not 0 <= left < 1:
            raise ConfigurationError(f"`left` is {left}, it must lie in [0, 1)")
        if not 0 < most <= 1:
            raise ConfigurationError(f"`most` is {most}, it must lie in (0, 1]")
        if not balance >= 0:
            raise ConfigurationError(f"`balance` is {balance}, it must be 0 or more")
        super().__init__(model, copy=copy, seed=seed)
        self.concepts = specs
        self._guide = (ConceptGuide(guide, specs, named_alternatives(alternatives, specs)),)
        self.pool_size, self.bearing, self.clear = pool, bearing, clear
        self.left, self.most, self.balance, self.samples = left, most, balance, samples
        self.site = self._reading_layer(layer)
        self.units = units
        total = self._columns().shape[0]
        if units is not None and units > total:
            raise ConfigurationError(
                f"`units` is {units}, but '{self.site.name}' reads {total} channels"
            )
        self.scores = torch.zeros(0)
        self.chosen: tuple[int, ...] = ()
        self.prevalence: dict[str, float] = {}
        self.showing = {"before": 1.0, "after": 1.0}

    @property
    def guide(self) -> ConceptGuide:
        """The guide."""
        return self._guide[0]

    def _reading_layer(self, name: str) -> Site:
        sites = [site for site in self.model.sites("all") if not isinstance(site.module, nn.Linear)]
        sites = sites or self.model.sites("all")
        names = [site.name for site in sites]
        if name and name not in names:
            raise ConfigurationError(f"`layer` is '{name}', {suggest(name, names)}")
        site: Site = sites[names.index(name) if name else len(sites) // 2]
        if getattr(site.module, "groups", 1) != 1:
            raise CapabilityError(
                f"'{site.name}' reads its channels in groups, so that no unit can be switched off "
                "alone; choose another `layer`"
            )
        return site

    def _columns(self) -> Tensor:
        """The weight of the layer with its input channels first: a view of it."""
        weight: Any = self.site.module.weight
        transposed = isinstance(self.site.module, nn.ConvTranspose2d)
        found: Tensor = weight if transposed else weight.transpose(0, 1)
        return found

    def _margins(self, latents: Latents) -> Tensor:
        """Largest margins (n,) of the concepts in what the model draws."""
        found = self.guide.margins(self.guide.embed(self.model.synthesise(latents)))
        return found.amax(1)

    def edit(self) -> None:
        """Score the units and switch the best ones off."""
        self.model.eval()
        self.guide.to(next(self.model.network.parameters()).device)
        latents = self.model.draw(self.pool_size, self.seed, purpose="-pool")
        records, self.prevalence = sort_latents(
            self.model, self.guide, latents, self.bearing, self.clear
        )
        self.spend(retain=len(latents))
        bearing = records["forget"].latents
        self.scores = self._score(
            bearing[: self.samples], records["retain"].latents[: self.samples]
        )
        order = self.scores.argsort(descending=True, stable=True)
        useful = int((self.scores > 0).sum())
        if not useful:
            raise RequestError(
                f"no unit that '{self.site.name}' reads draws “{self.concepts[0].target}”; choose "
                "another `layer`"
            )
        tested = bearing[: 8 * self.samples]
        before = self._columns().clone()
        self.showing["before"] = self._share(tested)
        allowed = order[: max(1, min(useful, int(self.most * len(order))))]
        count = self.units or self._fewest(allowed, before, tested)
        self.chosen = tuple(order[:count].tolist())
        self._switch_off(order[:count], before)
        self.showing["after"] = self._share(tested)
        if self.units is None and self.showing["after"] > self.left:
            logger.warning(
                "with %d of %d units of '%s' switched off, %.0f %% of the latents still show what "
                "shall be erased, more than %g", count, len(order), self.site.name,
                100 * self.showing["after"], self.left,
            )  # fmt: skip

    def _score(self, bearing: Latents, clear: Latents) -> Tensor:
        """Scores (units,), see the class."""
        both, n = Latents.cat([bearing, clear]), len(bearing)
        before = self._columns().clone()
        margins = self._margins(both)
        found = []
        for unit in range(len(before)):
            self._columns()[unit] = 0
            fall = margins - self._margins(both)
            found.append(fall[:n].mean() - self.balance * fall[n:].mean())
            self._columns()[unit] = before[unit]
        self.spend(forget=n * len(before), retain=len(clear) * len(before))
        return torch.stack(found).cpu()

    def _switch_off(self, units: Tensor, before: Tensor) -> None:
        self._columns().copy_(before)
        self._columns()[units.to(before.device)] = 0

    def _share(self, latents: Latents) -> float:
        """Share of latents that the model draws as one of the concepts."""
        parts = [latents[start : start + 128] for start in range(0, len(latents), 128)]
        self.spend(forget=len(latents))
        return float(torch.cat([self._margins(part) for part in parts]).gt(0).double().mean())

    def _fewest(self, order: Tensor, before: Tensor, tested: Latents) -> int:
        """How many of the best units suffice; all of them if none does. By bisection."""
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            self._switch_off(order[:middle], before)
            if self._share(tested) <= self.left:
                high = middle
            else:
                low = middle
        return high

    def statistics(self) -> dict[str, Any]:
        """The concepts, the layer and its units."""
        return {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "guide": self.guide.describe(),
            "prevalence": self.prevalence,
            "layer": self.site.name,
            "units": list(self.chosen),
            "of": len(self.scores),
            "showing": self.showing,
        }
