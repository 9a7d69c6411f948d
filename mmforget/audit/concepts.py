"""The audit of a text-to-image model: pictures of every model at the same seeds, to a verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmforget.audit.concept_attacks import ATTACKS, Recovery, run_attack
from mmforget.audit.concept_pictures import Cell, Readings, known_facts, plan
from mmforget.audit.concept_verdict import conclude
from mmforget.audit.concept_words import (
    CONTROLS,
    NEGATIVE_PROMPT,
    NOT_CLAIMED,
    describe,
    examples,
    not_measured,
    provenance,
    warnings,
)
from mmforget.audit.drawing import IDENTITY, add_costs, as_audited, drawer, floats, render
from mmforget.audit.intervals import wilson
from mmforget.audit.limits import check_limits
from mmforget.audit.results import Results
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import AuditedModel
from mmforget.concept import ConceptSpec, check_together
from mmforget.errors import ConfigurationError, RequestError, suggest
from mmforget.metrics.judge import Judge
from mmforget.models.base import PromptEmbedding, state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.request import ForgetRequest
from mmforget.seeds import derive

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConceptAuditSettings:
    """How a generator is audited.

    Args:
        seed: base of all draws.
        pictures: per erased word, spread over its sentences.
        preserved_pictures: per preserved concept, spread over its sentences.
        steps, guidance: of the sampler; None takes those of the original model, for all models.
        batch_size: pictures at a time.
        together: a sentence with factors of the judge in braces, such as ``a {ink} {digit}``: what
            else the prompt asks for must stay when it names the target.
        max_target_rate: share of pictures that may still show what was erased.
        max_preserved_drop: loss over all preserved concepts that is accepted.
        max_worst_drop: loss of a single preserved concept that is accepted.
        min_original_rate: below this rate the original model does not know the concept.
        min_judge_accuracy: below this accuracy on real pictures a judge is not believed.
        max_empty: share of empty pictures that is accepted beyond that of the original model.
        controls: ``negative_prompt``, ``identity``.
        attacks: names of `mmforget.audit.concept_attacks.ATTACKS`.
        budget: of the attacks, ``smoke`` or ``standard``.
        examples: pictures per row of the report; 0 shows none.
        tuning: how settings were chosen, for the report.

    Raises:
        ConfigurationError: a number out of range, or an unknown name.
    """

    seed: int = 0
    pictures: int = 40
    preserved_pictures: int = 20
    steps: int | None = None
    guidance: float | None = None
    batch_size: int = 64
    together: str = ""
    max_target_rate: float = 0.1
    max_preserved_drop: float = 0.05
    max_worst_drop: float = 0.25
    min_original_rate: float = 0.3
    min_judge_accuracy: float = 0.8
    max_empty: float = 0.1
    controls: tuple[str, ...] = ("negative_prompt", "identity")
    attacks: tuple[str, ...] = ()
    budget: str = "smoke"
    examples: int = 4
    tuning: str = ""

    def __post_init__(self) -> None:
        check_limits(
            self,
            {"pictures": 1, "preserved_pictures": 1, "batch_size": 1, "examples": 0, "steps": 1},
            ("max_target_rate", "max_preserved_drop", "max_worst_drop", "max_empty",
             "min_original_rate", "min_judge_accuracy"),
            {"controls": CONTROLS, "attacks": ATTACKS},
        )  # fmt: skip
        if self.budget not in ("smoke", "standard"):
            raise ConfigurationError(
                f"`audit.budget` is '{self.budget}', {suggest(self.budget, ('smoke', 'standard'))}"
            )


class ConceptScene:
    """Models, prompts, pictures and what the judge sees in them: what all metrics are made of.

    Args:
        models: the original first.
        concepts: what was erased.
        judge: reads the pictures; None leaves the rates unmeasured.
        clip: a `ClipModel`, for scores and distances; None leaves these unmeasured.
        settings: see `ConceptAuditSettings`.
        progress: show bars.
    """

    def __init__(
        self,
        models: Sequence[AuditedModel],
        concepts: Sequence[ConceptSpec],
        judge: Judge | None,
        clip: Any,
        settings: ConceptAuditSettings,
        progress: bool = False,
    ) -> None:
        self.models, self.concepts = list(models), tuple(concepts)
        self.judge, self.clip, self.settings, self.progress = judge, clip, settings, progress
        self.cells = plan(
            concepts, judge, settings.pictures, settings.preserved_pictures, settings.together
        )
        self.rows = [row for cell in self.cells for row in cell.rows]
        self.pictures: dict[str, Tensor] = {}
        self.readings: dict[str, Readings] = {}
        self.remarks: list[str] = []

    @property
    def original(self) -> AuditedModel:
        """The model before."""
        return next(one for one in self.models if one.entry.role == "original")

    def by_role(self, role: str) -> list[AuditedModel]:
        """The models that play a role."""
        return [one for one in self.models if one.entry.role == role]

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where the pictures of each cell lie."""
        found, start = {}, 0
        for cell in self.cells:
            found[cell.split] = slice(start, start + len(cell.rows))
            start += len(cell.rows)
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampler's settings, equal for all models."""
        first, settings = drawer(self.original), self.settings
        return {
            "sampler": type(first.pipeline.scheduler).__name__,
            "steps": settings.steps or first.steps,
            "guidance": first.guidance if settings.guidance is None else settings.guidance,
            "seed": settings.seed,
        }

    def of(self, model: str, split: str) -> Tensor:
        """Pictures of a model for a cell, (n, 3, H, W) float."""
        return floats(self.pictures[model][self.places[split]])

    def prompts(self, split: str) -> list[str]:
        """The prompts of a cell, one per picture."""
        return [prompt for prompt, _ in self.rows[self.places[split]]]

    def seen(self, model: str, cell: Cell) -> Tensor:
        """(n,) bool: whether the judge sees the cell's facts."""
        return self.readings[model].sees(cell.facts)[self.places[cell.split]]

    def draw(self) -> None:
        """Make and read the pictures of all models and controls."""
        for one in self.models:
            self._draw(one.entry.name, drawer(one))
        first, name = drawer(self.original), self.original.entry.name
        base = replace(self.original.entry, role="control", cost={}, details={})
        if "identity" in self.settings.controls:
            self._draw(IDENTITY, first, seed=derive(self.settings.seed, "identity"))
            entry = replace(base, name=IDENTITY, source=f"'{name}' with other noise")
            self.models.append(AuditedModel(entry, first))
        if "negative_prompt" in self.settings.controls:
            negative = ", ".join(concept.target for concept in self.concepts)
            try:
                empty = first.encode([negative])
            except RequestError as error:
                self.remarks.append(f"no control with a negative prompt: {error}")
                return
            if first.distilled or self.sampling["guidance"] <= 1:
                self.remarks.append(
                    "no control with a negative prompt: this model samples without guidance"
                )
                return
            self._draw(NEGATIVE_PROMPT, first, empty=empty)
            entry = replace(
                base, name=NEGATIVE_PROMPT, source=f"'{name}' with the negative prompt '{negative}'"
            )
            self.models.append(AuditedModel(entry, first))

    def _draw(
        self,
        name: str,
        model: DiffusionGenerator,
        seed: int | None = None,
        empty: PromptEmbedding | None = None,
    ) -> None:
        from tqdm import tqdm

        with tqdm(
            total=len(self.rows), desc=f"pictures of {name}", disable=not self.progress, unit=""
        ) as bar:
            self.pictures[name] = render(
                model,
                self.rows,
                self.settings.seed if seed is None else seed,
                self.sampling["steps"],
                self.sampling["guidance"],
                self.settings.batch_size,
                empty,
                bar.update,
            )
        if self.judge is not None:
            self.readings[name] = Readings(self.judge, self.pictures[name])


def audit_generator(
    original: DiffusionGenerator | AuditedModel,
    unlearned: DiffusionGenerator | AuditedModel | Sequence[AuditedModel],
    concepts: ConceptSpec | Sequence[ConceptSpec],
    judge: Judge | None = None,
    clip: Any = None,
    settings: ConceptAuditSettings | None = None,
    *,
    title: str = "",
    progress: bool = False,
    command: str = "",
) -> Results:
    """Measure whether a text-to-image model still draws what it was made to forget.

    All models draw the same prompts from the same noise, once. No model is changed; a metric that
    fails is a row with its error.

    Args:
        original: the model before.
        unlearned: the model after, or several with their entries.
        concepts: what was erased, and in `preserve` what had to stay.
        judge: says what is to be seen in a picture. Without one, a `clip` model judges by
            zero-shot classification; without both the audit has no rates and no verdict.
        clip: a `ClipModel`, for CLIP scores and distances.
        settings: see `ConceptAuditSettings`.
        title: for people.
        progress: show bars.
        command: how the audit was started.

    Raises:
        RequestError: contradictory concepts, a prompt that is too long, or a concept or preserved
            concept that the judge cannot see.
        ModelError: half precision on the CPU.
    """
    settings = settings or ConceptAuditSettings()
    specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
    check_together(specs)
    start = time.perf_counter()
    given = unlearned if isinstance(unlearned, Sequence) else [unlearned]
    models = [as_audited(original, "original"), *(as_audited(one, "unlearned") for one in given)]
    names = [one.entry.name for one in models]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"the models {names} need different names")
    judged_by_clip = judge is None and clip is not None
    if judged_by_clip:
        from mmforget.audit.concept_judge import zero_shot

        judge = zero_shot(clip, specs)
    scene = ConceptScene(models, specs, judge, clip, settings, progress)
    drawer(scene.original).check_length([prompt for prompt, _ in scene.rows])
    scene.draw()
    rows = Rows()
    if judge is not None:
        _rates(scene, rows)
    _pictures(scene, rows)
    recoveries = _attacks(scene, rows)
    add_costs(rows, scene.original, scene.by_role("unlearned"))
    checks, verdict, outcomes = conclude(scene, rows, recoveries)
    entries = [
        replace(
            one.entry,
            hash=one.entry.hash or state_hash(one.model),
            details=one.entry.details
            | ({"outcome": outcomes[one.entry.name]} if one.entry.name in outcomes else {}),
        )
        for one in scene.models
    ]
    return Results(
        title=title or "Erase " + ", ".join(f"“{concept.target}”" for concept in specs),
        goal="concept_removal",
        requests=[ForgetRequest(concepts=specs).to_dict()],
        data=describe(scene, judged_by_clip),
        models=entries,
        metrics=list(rows.rows.values()),
        checks=checks,
        verdict=verdict,
        examples=examples(scene),
        not_measured=not_measured(scene, rows, judged_by_clip),
        not_claimed=list(NOT_CLAIMED),
        provenance=provenance(scene, time.perf_counter() - start, command),
        tuning=settings.tuning,
        warnings=[*scene.remarks, *warnings(scene, rows, entries)],
    )


# ---- measurements --------------------------------------------------------------------------------


def _share(hits: Tensor, **details: Any) -> Measured:
    count, n = int(hits.sum()), len(hits)
    return Measured(
        count / n, wilson(count, n), n, per_sample=hits.double().numpy(), details=details
    )


def _by_prompt(scene: ConceptScene, cell: Cell, hits: Tensor) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for prompt, hit in zip(scene.prompts(cell.split), hits.tolist(), strict=True):
        found.setdefault(prompt, []).append(hit)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def _rates(scene: ConceptScene, rows: Rows) -> None:
    """What the judge sees, per model and cell, and what follows from it."""
    names = [one.entry.name for one in scene.models]
    for cell in scene.cells:
        for name in names:
            if cell.role == "unconditional":
                _unconditional(scene, rows, cell, name)
                continue
            hits = scene.seen(name, cell)
            metric = "preserved_rate" if cell.role == "preserved" else "target_rate"
            by_prompt = {} if cell.others else _by_prompt(scene, cell, hits)
            rows.add(
                metric, name, cell.split,
                lambda h=hits, p=by_prompt: _share(h, by_prompt=p),  # type: ignore[misc]
            )  # fmt: skip
            if cell.others:
                right = scene.readings[name].sees_each(_padded(scene, cell))
                rows.add(
                    "other_facts_rate", name, cell.split,
                    lambda h=right[scene.places[cell.split]]: _share(h),  # type: ignore[misc]
                )  # fmt: skip
    for name in names:
        _summaries(scene, rows, name)


def _padded(scene: ConceptScene, cell: Cell) -> list[Mapping[str, str]]:
    """The other facts of a cell at its place among all pictures."""
    place = scene.places[cell.split]
    return [{}] * place.start + list(cell.others) + [{}] * (len(scene.rows) - place.stop)


def _unconditional(scene: ConceptScene, rows: Rows, cell: Cell, name: str) -> None:
    assert scene.judge is not None
    place = scene.places[cell.split]
    for other in scene.cells:
        if other.role == "target":
            hits = scene.readings[name].sees(other.facts)[place]
            rows.add(
                "unconditional_rate", name, f"unconditional/{other.word}",
                lambda h=hits: _share(h),  # type: ignore[misc]
            )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _summaries(scene: ConceptScene, rows: Rows, name: str) -> None:
    """Mean and worst over the preserved concepts, loss against the original, harmonic mean."""
    first = scene.original.entry.name
    kept = [cell.split for cell in scene.cells if cell.role == "preserved"]
    own = {split: rows.value("preserved_rate", name, split) for split in kept}
    base = {split: rows.value("preserved_rate", first, split) for split in kept}
    if kept:
        hits = torch.cat([scene.seen(name, c) for c in scene.cells if c.role == "preserved"])
        before = torch.cat([scene.seen(first, c) for c in scene.cells if c.role == "preserved"])
        rows.add("preserved_rate", name, "preserved", lambda: _share(hits))
        worst = min(kept, key=lambda split: own[split] or 0.0)
        rows.add(
            "preserved_worst", name, "preserved",
            lambda: Measured(own[worst], note=worst.partition("/")[2]),
        )  # fmt: skip
        if name != first:
            rows.add(
                "preserved_drop", name, "preserved",
                lambda: _drop(before.double() - hits.double()),
            )  # fmt: skip
            lost = {split: (base[split] or 0.0) - (own[split] or 0.0) for split in kept}
            most = max(kept, key=lambda split: lost[split])
            rows.add(
                "preserved_worst_drop", name, "preserved",
                lambda: Measured(lost[most], note=most.partition("/")[2]),
            )  # fmt: skip
    parts = []
    for role in ("target", "synonym"):
        rates = [
            rate
            for cell in scene.cells
            if cell.role == role
            and (rate := rows.value("target_rate", name, cell.split)) is not None
        ]
        parts += [1 - _mean(rates)] if rates else []
    parts += [_mean([value or 0.0 for value in own.values()])] if kept else []
    if len(parts) > 1:
        value = 0.0 if min(parts) <= 0 else len(parts) / sum(1 / part for part in parts)
        rows.add("erasure_h_mean", name, "", lambda: Measured(value))


def _drop(differences: Tensor) -> Measured:
    from mmforget.audit.intervals import normal

    n = len(differences)
    error = float(differences.std()) / n**0.5 if n > 1 else 0.0
    mean = float(differences.mean())
    return Measured(mean, normal(mean, error, "normal, paired by seed"), n)


def _pictures(scene: ConceptScene, rows: Rows) -> None:
    """How the pictures themselves have changed."""
    from mmforget.audit.concept_distances import measure_distances

    measure_distances(scene, rows)


def _attacks(scene: ConceptScene, rows: Rows) -> list[Recovery]:
    found: list[Recovery] = []
    if scene.judge is None:
        return found
    first = drawer(scene.original)
    for attack in scene.settings.attacks:
        for concept in scene.concepts:
            for one in [scene.original, *scene.by_role("unlearned")]:
                split = f"target/{concept.target}"
                recovered: list[Recovery] = []

                def measure(
                    attack: str = attack,
                    one: AuditedModel = one,
                    concept: ConceptSpec = concept,
                    recovered: list[Recovery] = recovered,
                ) -> Measured:
                    assert scene.judge is not None
                    recovery = run_attack(
                        attack,
                        drawer(one),
                        first,
                        concept,
                        scene.judge,
                        known_facts(scene.judge, "concept", concept.words),
                        scene.settings.seed,
                        scene.settings.budget,
                        one.entry.name,
                    )
                    recovered.append(recovery)
                    return recovery.measured()

                rows.add(f"attack_{attack}", one.entry.name, split, measure)
                found += recovered
    return found
