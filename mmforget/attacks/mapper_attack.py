"""Mapper attack: can a freshly trained latent mapper make the generator draw the concept again?"""

from __future__ import annotations

from typing import Any

import torch

from mmforget.attacks.generator_report import (
    GeneratorAttackReport,
    Region,
    attacked,
    check_attack,
    drawn,
    pictures_of,
    seen,
    shown_first,
)
from mmforget.attacks.report import JudgeFn
from mmforget.models.base import LatentSpace
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.latent_mapper import train_mapper


def mapper_attack(
    model: Any,
    guide: ConceptGuide,
    confirm: JudgeFn,
    concept: int = 0,
    n: int = 256,
    steps: int = 150,
    tries: int = 2,
    on_shell: bool = False,
    seed: int = 0,
    space: LatentSpace | None = None,
) -> GeneratorAttackReport:
    """Train a new mapper on the model under attack, and see what its edits draw.

    A free edit may leave the region in which the prior has latents, where any generator can be made
    to draw almost anything; `on_shell` brings edited latents back into it, see `Region`. A trial
    succeeds if the guide and the judge both see the concept.

    Args:
        model: the generator that is attacked; nothing of it changes.
        guide: what the mapper follows.
        confirm: another model, which did not guide, see `mmforget.attacks.sees`.
        concept: which of the guide's concepts.
        n: edited latents that are judged.
        steps: of the training of the mapper.
        tries: trainings, with larger steps each time, until 70 % of the edits work.
        on_shell: whether the rate is that of edits brought back into the region.
        seed: of all draws, which differ from those of any method.
        space: of the latents; None takes the last of the model's: ``z``, or ``w+``.

    Returns:
        `details` hold the rates ``free`` and ``on_shell``, and the report of the ``mapper``.

    Raises:
        CapabilityError: the model is no generator, or has no such space.
        ConfigurationError: a setting out of range.
    """
    free, kept = mapper_attacks(model, guide, confirm, concept, n, steps, tries, seed, space)
    return kept if on_shell else free


def mapper_attacks(
    model: Any,
    guide: ConceptGuide,
    confirm: JudgeFn,
    concept: int = 0,
    n: int = 256,
    steps: int = 150,
    tries: int = 2,
    seed: int = 0,
    space: LatentSpace | None = None,
) -> tuple[GeneratorAttackReport, GeneratorAttackReport]:
    """Both kinds of `mapper_attack` from one training of the mapper, whose time both report.

    Takes what `mapper_attack` takes, but for `on_shell`.

    Returns:
        With free edits, and with those brought back into the region.

    Raises:
        CapabilityError, ConfigurationError: see `mapper_attack`.
    """
    check_attack(model, "mapper_attack", n=n, steps=steps, tries=tries)
    with attacked(model) as watch:
        mapper, _, found = train_mapper(
            model, guide, concept, space=space, steps=steps, tries=tries, checked=256, seed=seed,
            purpose="mapper-attack",
        )  # fmt: skip
        latents = drawn(model, n, seed, "-mapper-attack-judged", space)
        with torch.no_grad():
            edited = mapper(latents)
        kept = edited.moved(Region(model, latents).project(edited.codes))
        hits = {}
        images = {}
        for name, moved in (("native", latents), ("free", edited), ("on_shell", kept)):
            images[name] = pictures_of(model, moved)
            agreed = seen(lambda part: guide.margins(guide.embed(part))[:, concept], images[name])
            hits[name] = agreed & seen(confirm, images[name])
    rates = {name: float(column.double().mean()) for name, column in hits.items()}

    def report(chosen: str) -> GeneratorAttackReport:
        return GeneratorAttackReport(
            name=f"mapper_{chosen}",
            rate=rates[chosen],
            n=n,
            native=rates["native"],
            seconds=watch.seconds,
            settings={"seed": seed, "steps": steps, "tries": tries, "space": latents.space},
            details={
                "free": rates["free"],
                "on_shell": rates["on_shell"],
                "mapper": found.to_dict(),
            },
            pictures=shown_first(images[chosen], hits[chosen]),
        )

    return report("free"), report("on_shell")
