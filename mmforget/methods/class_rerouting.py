"""ClassRerouting: the rows of a class are replaced by those of others, and nothing else changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmforget.concept import ConceptSpec, check_together
from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.errors import CapabilityError
from mmforget.methods.base import ForgettingMethod
from mmforget.methods.class_target import check_classes, classes_of, destinations
from mmforget.methods.generator_editing import ClipSource, named_alternatives
from mmforget.methods.text_guided import NO_DATA
from mmforget.models.base import Generates, HasLatents, Model
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.generators.class_tables import ClassTable, class_tables, same_classes

logger = logging.getLogger(__name__)

CHECKED = 2
"""Pictures per class by which the edit is checked."""

COMPARED = 8
"""Kept classes that are compared, at most."""


class ClassRerouting(ForgettingMethod):
    """Let a class of a conditional generator draw what another one draws.

    The class's rows in every table that reads it become those of a kept class, or the mean of all
    kept ones. Pictures of all other classes stay bit by bit the same. There is no training:
    ``ClassRerouting(model, ConceptSpec("seven")).finalize()``.

    All that is forgotten is where the class was: convolutions still know how to draw it, and
    somebody who searches for a row, or still has the old one, gets it back. `ClassDistillation`
    goes further.

    Args:
        model: a generator with classes, such as `ImageGAN`.
        concepts: whose names are those of classes.
        guide: a CLIP model, or several, or their folders or hub ids, for finding the class if
            classes have no names, and the nearest one; None does without.
        alternatives: of the guide, see `ConceptGuide`.
        copy, seed: see `ForgettingMethod`.
        destination: name of a kept class; ``nearest``, see `destinations`; or ``mean`` of all kept
            classes, which need not look like anything.

    Raises:
        CapabilityError: the generator has no classes, or they enter in another way.
        RequestError: a concept names no class, or they name all.
        ConfigurationError: no such destination.

    Reference:
        Conditional tables: Dumoulin et al., A learned representation for artistic style, 2017,
        arXiv 1610.07629; Brock et al., Large scale GAN training for high fidelity natural image
        synthesis, 2018, arXiv 1809.11096.
    """

    requires: ClassVar[tuple[type, ...]] = (Generates, HasLatents)
    access: ClassVar[DataAccess] = NO_DATA
    view: ClassVar[View | None] = None
    needs_guide: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        concepts: ConceptSpec | Sequence[ConceptSpec],
        guide: ClipSource | Sequence[ClipSource] | None = None,
        alternatives: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        destination: str = "nearest",
    ) -> None:
        specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
        check_together(specs)
        super().__init__(model, copy=copy, seed=seed)
        check_classes("ClassRerouting", self.model)
        self.concepts, self.destination = specs, destination
        self._tables: list[ClassTable] = class_tables(self.model)
        known = None
        if guide is not None:
            known = ConceptGuide(guide, specs, named_alternatives(alternatives, specs))
        self.erased = classes_of(self.model, specs, known, seed)
        self.destinations: dict[int, int] = {}
        if destination != "mean":
            self.destinations = destinations(
                self.model, self.erased, specs, destination, self._tables, known
            )

    @torch.no_grad()
    def edit(self) -> None:
        """Replace the rows, and check that this did what it should.

        Raises:
            CapabilityError: the class also enters elsewhere.
        """
        before = self._drawn()
        kept = [k for k in range(self.model.num_classes) if k not in self.erased]
        originals = [table.rows.clone() for table in self._tables]
        for table, rows in zip(self._tables, originals, strict=True):
            for number in self.erased:
                to = self.destinations.get(number)
                table.write(number, rows[kept].mean(0) if to is None else rows[to])
        try:
            self._check(before, self._drawn())
        except CapabilityError:
            for table, rows in zip(self._tables, originals, strict=True):
                for number in self.erased:
                    table.write(number, rows[number])
            raise

    def _drawn(self) -> dict[int, Tensor]:
        """Pictures of the erased classes, their destinations, and some others."""
        others = [k for k in range(self.model.num_classes) if k not in self.erased]
        chosen = {*self.erased, *self.destinations.values(), *others[:COMPARED]}
        latents = self.model.draw(CHECKED, self.seed, purpose="-class-check")
        return {k: self.model.pictures(same_classes(latents, k)) for k in sorted(chosen)}

    def _check(self, before: dict[int, Tensor], after: dict[int, Tensor]) -> None:
        who = type(self.model.network).__name__
        names = self.model.class_names
        for number, images in after.items():
            if number not in self.erased:
                fits = torch.equal(images, before[number])
            elif number in self.destinations:
                fits = torch.allclose(images, before[self.destinations[number]], atol=1e-5)
            else:
                fits = not torch.equal(images, before[number])
            if not fits:
                raise CapabilityError(
                    f"class '{names[number]}' of {who} does not follow its rows in "
                    f"{', '.join(table.name for table in self._tables)}: the class also enters "
                    "elsewhere; use ClassDistillation"
                )

    def statistics(self) -> dict[str, Any]:
        """The concepts, their classes, what takes their place, and the tables."""
        names = self.model.class_names
        return {
            "concepts": [concept.to_dict() for concept in self.concepts],
            "classes": {names[number]: target for number, target in self.erased.items()},
            "destinations": {
                names[number]: names[self.destinations[number]] if self.destinations else "mean"
                for number in self.erased
            },
            "tables": [table.parameter for table in self._tables],
            "level": "rerouted: the rows of the class were replaced, other weights still know it",
        }
