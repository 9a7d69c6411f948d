"""Which classes of a conditional generator a concept names, and which take their place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.concept import ConceptSpec, normalised
from mmforget.errors import CapabilityError, ConfigurationError, RequestError, suggest
from mmforget.models.base import frozen
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.generators.class_tables import ClassTable, same_classes

logger = logging.getLogger(__name__)

SCORED = 32
"""Pictures per class by which a guide tells the classes."""

SEEN = 0.5
"""Mean probability from which on a class is what a text names."""


def check_classes(method: str, model: Any) -> None:
    """Refuse a generator without classes.

    Raises:
        CapabilityError: names the method and the network.
    """
    if getattr(model, "num_classes", 0) < 2:
        raise CapabilityError(
            f"{method} needs a generator with classes, but {type(model.network).__name__} has "
            "none; use a method that follows a text, such as TextToUnlearn"
        )


def classes_of(
    model: Any, concepts: Sequence[ConceptSpec], guide: ConceptGuide | None = None, seed: int = 0
) -> dict[int, str]:
    """Find the classes that concepts name.

    A class is named if one of its comma-separated names is the target or a synonym. If the classes
    have numbers only, the guide looks at pictures of each of them.

    Args:
        model: a generator with classes.
        concepts: what to find; their number and order are those of the guide's concepts.
        guide: sees the concepts.
        seed: of the pictures.

    Returns:
        Class number: target that names it.

    Raises:
        RequestError: a concept names no class; all classes are named.
    """
    names = list(model.class_names)
    found: dict[int, str] = {}
    if names == [str(number) for number in range(len(names))] and guide is not None:
        scores = _scores(model, guide, seed)
        for concept, column in zip(concepts, scores.T, strict=True):
            seen = (column > SEEN).nonzero()[:, 0].tolist()
            if not seen:
                best = int(column.argmax())
                raise RequestError(
                    f"the guide sees “{concept.target}” in no class; most, {100 * column[best]:.0f}"
                    f" %, in class {names[best]}; give `class_names`, other words or another guide"
                )
            found |= dict.fromkeys(seen, concept.target)
            logger.info("the guide finds '%s' in the classes %s", concept.target, seen)
    else:
        parts = [{normalised(part) for part in (name, *name.split(","))} for name in names]
        for concept in concepts:
            words = [normalised(word) for word in concept.words]
            named = [number for number, one in enumerate(parts) if one & set(words)]
            if not named:
                raise RequestError(
                    f"`concept.target` '{concept.target}' is no class of this generator; "
                    + suggest(concept.target, names)
                )
            found |= dict.fromkeys(named, concept.target)
    if len(found) == len(names):
        raise RequestError(
            f"the concepts name all {len(names)} classes, so that nothing would be left to draw; "
            "name fewer"
        )
    return found


@torch.no_grad()
def _scores(model: Any, guide: ConceptGuide, seed: int) -> Tensor:
    """Mean probabilities, (classes, concepts)."""
    latents = model.draw(SCORED, seed, purpose="-class-scores")
    guide.to(next(model.network.parameters()).device)
    with frozen(model.network):
        rows = [
            guide.probabilities(model.synthesise(same_classes(latents, number))).mean(0)
            for number in range(model.num_classes)
        ]
    return torch.stack(rows).cpu()


def destinations(
    model: Any,
    erased: dict[int, str],
    concepts: Sequence[ConceptSpec],
    wish: str,
    tables: Sequence[ClassTable],
    guide: ConceptGuide | None = None,
    other: str = "mean",
) -> dict[int, int]:
    """Which class takes the place of each erased one.

    Args:
        model: a generator with classes.
        erased: see `classes_of`.
        concepts: their anchors count if they name a class.
        wish: name of a class, or ``nearest``: the concept's anchor if it names a class, else the
            kept class whose name is nearest for the guide, else the one with the nearest rows.
        tables: of the generator.
        guide: None leaves the names out.
        other: a wish that the caller fulfils, for the message.

    Raises:
        ConfigurationError: there is no such class, or it is to be erased.
    """
    names = list(model.class_names)
    kept = [number for number in range(len(names)) if number not in erased]
    plain = {normalised(names[number]): number for number in kept}
    if wish != "nearest":
        if normalised(wish) not in plain:
            choices = ["nearest", other, *(names[number] for number in kept)]
            raise ConfigurationError(f"`destination` is '{wish}', {suggest(wish, choices)}")
        return dict.fromkeys(erased, plain[normalised(wish)])
    anchors = {concept.target: normalised(concept.anchor_text) for concept in concepts}
    near = _by_text(names, guide) if guide is not None else _by_rows(tables)
    near[:, list(erased)] = -2.0
    return {
        number: plain.get(anchors[target], int(near[number].argmax()))
        for number, target in erased.items()
    }


@torch.no_grad()
def _by_text(names: Sequence[str], guide: ConceptGuide) -> Tensor:
    """Cosines of the class names, (K, K)."""
    texts = F.normalize(guide.texts(names, guide.concepts[0]), dim=1)
    return texts @ texts.T


def _by_rows(tables: Sequence[ClassTable]) -> Tensor:
    """Cosines of the classes' rows in all tables, about their mean, (K, K)."""
    rows = torch.cat([table.rows for table in tables], dim=1).double()
    rows = F.normalize(rows - rows.mean(0), dim=1)
    return rows @ rows.T
