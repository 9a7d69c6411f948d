"""The audit of generators of GANs: what they draw by themselves, when edited, and under attack."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from mmforget.audit.concept_pictures import Facts, known_facts
from mmforget.audit.drawing import add_costs, as_bytes, floats
from mmforget.audit.generator_attacks import ATTACKS, Recovery, attack_all, check_attacks
from mmforget.audit.generator_pictures import measure
from mmforget.audit.generator_verdict import conclude
from mmforget.audit.generator_words import (
    NOT_CLAIMED,
    describe,
    examples,
    not_measured,
    provenance,
    warnings,
)
from mmforget.audit.limits import check_limits
from mmforget.audit.results import ModelEntry, Results
from mmforget.audit.rows import METRICS, Rows
from mmforget.audit.scene import AuditedModel
from mmforget.concept import ConceptSpec, check_together
from mmforget.errors import ConfigurationError, DataError, ModelError
from mmforget.metrics.judge import ClipJudge, Judge
from mmforget.mitigation.rejection_filter import RejectionFilter
from mmforget.models.base import Latents, Model, frozen, state_hash
from mmforget.models.clip import ClipModel
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN
from mmforget.request import ForgetRequest
from mmforget.seeds import derive

OTHER_LATENTS = "original, other latents"
"""Name of the control that shows how much chance alone changes."""

PURPOSE = "-audit"
"""Keeps the latents of audits apart from those that methods train on."""


@dataclass(frozen=True)
class GANAuditSettings:
    """How a generator of a GAN is audited.

    Args:
        seed: base of all draws.
        pictures: that every model draws, at the same latents.
        batch_size: pictures at a time.
        edits: latents that are edited towards each concept, at most; 0 leaves this out.
        mapper_steps: training of the mapper that edits, on the original.
        max_rate: share of pictures that may still show a concept; if a retrained generator draws it
            more often, its rate.
        min_kept_ratio: rate of every other value over that of the original, both without the
            concept.
        min_kept_share: share of pictures without the concept that must stay what they were.
        max_distance_ratio: Fréchet distance of what must stay over that of other latents.
        min_diversity: spread of the pictures at latents that showed a concept, over the original's.
        max_unclear: rise of the share of pictures that the judge is unsure of.
        min_original_rate: below this the original hardly draws the concept.
        min_judge_accuracy: below this the judge is not believed.
        min_agreement: area under the curve of the guide's against the judge's opinion.
        attacks: names of `mmforget.audit.generator_attacks.ATTACKS`.
        attack_trials: latents or pictures per attack.
        proxy: a value of the judge's that the original does not draw; the attacks look for it
            there, as a control where there is no retrained model.
        unsure: highest probability below which the judge is unsure.
        examples: pictures per row of the report; 0 shows none.
        allow_same_judge: let the CLIP model that guided the method judge; the report says so.
        tuning: how settings were chosen, for the report.

    Raises:
        ConfigurationError: a number out of range, or an unknown attack.
    """

    seed: int = 0
    pictures: int = 2000
    batch_size: int = 256
    edits: int = 512
    mapper_steps: int = 200
    max_rate: float = 0.03
    min_kept_ratio: float = 0.8
    min_kept_share: float = 0.8
    max_distance_ratio: float = 20.0
    min_diversity: float = 0.5
    max_unclear: float = 0.1
    min_original_rate: float = 0.005
    min_judge_accuracy: float = 0.9
    min_agreement: float = 0.75
    attacks: tuple[str, ...] = ()
    attack_trials: int = 100
    proxy: str = ""
    unsure: float = 0.6
    examples: int = 6
    allow_same_judge: bool = False
    tuning: str = ""

    def __post_init__(self) -> None:
        check_limits(
            self,
            {"pictures": 2, "batch_size": 1, "edits": 0, "mapper_steps": 1, "attack_trials": 1,
             "examples": 0},
            ("max_rate", "min_kept_ratio", "min_kept_share", "min_diversity", "max_unclear",
             "min_original_rate", "min_judge_accuracy", "min_agreement", "unsure"),
            {"attacks": ATTACKS},
        )  # fmt: skip
        if not self.max_distance_ratio >= 1:
            raise ConfigurationError(
                f"`audit.max_distance_ratio` is {self.max_distance_ratio}, it must be at least 1"
            )


class Seen:
    """What a judge says of pictures.

    Args:
        judge: reads them.
        pictures: (N, 3, H, W) uint8.
        batch_size: pictures at a time.
    """

    def __init__(self, judge: Judge, pictures: Tensor, batch_size: int = 256) -> None:
        parts = [judge(floats(part)) for part in pictures.split(batch_size)]
        self.values = judge.factors
        self.shares = {
            factor: torch.cat([part[factor].cpu() for part in parts]) for factor in judge.factors
        }

    def of(self, factor: str) -> Tensor:
        """(N,) index of the value that is seen."""
        return self.shares[factor].argmax(1)

    def shows(self, facts: Facts) -> Tensor:
        """(N,) bool: all of the facts are seen."""
        return torch.stack(
            [self.of(factor) == self.values[factor].index(value)
             for factor, value in facts.items()]
        ).all(0)  # fmt: skip

    def score(self, facts: Facts) -> Tensor:
        """(N,) probability that all of the facts are there."""
        columns = [
            self.shares[factor][:, self.values[factor].index(value)]
            for factor, value in facts.items()
        ]
        return torch.stack(columns).prod(0)

    def unsure(self, limit: float) -> Tensor:
        """(N,) bool: no value of some factor has a probability of at least `limit`."""
        return torch.stack([one.amax(1) < limit for one in self.shares.values()]).any(0)


class GANScene:
    """Models, latents, pictures, and what the judge sees: what all measures are made of.

    Args:
        models: the original first, then unlearned, retrained and filtered models.
        concepts: what was erased.
        judge: reads pictures.
        guide: the CLIP model that methods followed, or None.
        settings: see `GANAuditSettings`.
        alternatives: of the guide, see `ConceptGuide`.
        real: (M, 3, H, W) real pictures, or None.
        progress: show bars.

    Raises:
        RequestError: a concept that the judge cannot see.
        ModelError: a model that draws from other latents than the original.
    """

    def __init__(
        self,
        models: Sequence[AuditedModel],
        concepts: Sequence[ConceptSpec],
        judge: Judge,
        guide: ClipModel | None,
        settings: GANAuditSettings,
        alternatives: Mapping[str, Sequence[str]] | None = None,
        real: Tensor | None = None,
        progress: bool = False,
    ) -> None:
        self.models, self.concepts, self.judge = list(models), tuple(concepts), judge
        self.settings, self.real, self.progress = settings, real, progress
        self.facts = {c.target: known_facts(judge, "concept", c.words) for c in self.concepts}
        if settings.proxy:
            known_facts(judge, "audit.proxy", [settings.proxy])
        self.kept = self._kept()
        self.guide = (
            None
            if guide is None
            else ConceptGuide(guide, self.concepts, self._others(alternatives))
        )
        self.guide_is_judge = guide is not None and _same(judge, guide)
        self.remarks: list[str] = []
        self.pictures: dict[str, Tensor] = {}
        self.seen: dict[str, Seen] = {}
        self.edited: dict[tuple[str, str], Tensor] = {}
        """(model, concept): pictures at the latents of `edited_rows`, moved by the mapper."""
        self.edited_rows: dict[str, Tensor] = {}
        self.mappers: dict[str, dict[str, Any]] = {}
        self.acceptance: dict[str, dict[str, Any]] = {}
        for one in self.models:
            if generator_of(one).latent_size != generator_of(self.original).latent_size:
                raise ModelError(
                    f"'{one.entry.name}' draws from {generator_of(one).latent_size} numbers, the "
                    f"original from {generator_of(self.original).latent_size}; audit generators "
                    "of one kind together"
                )

    def _kept(self) -> list[tuple[str, str]]:
        """Factor and value of everything that must stay: what is no concept by itself."""
        alone = {next(iter(facts.items())) for facts in self.facts.values() if len(facts) == 1}
        for concept in self.concepts:
            for word in concept.preserve:
                known_facts(self.judge, "preserve", [word])  # refuses what nobody would measure
        return [
            (factor, value)
            for factor, values in self.judge.factors.items()
            for value in values
            if (factor, value) not in alone
        ]

    def _others(self, given: Mapping[str, Sequence[str]] | None) -> Mapping[str, Sequence[str]]:
        """Alternatives of the guide: the other values of the concept's factor, unless named.

        What a zero-shot judge chooses from was made of the concepts themselves, and says no more.
        """
        found = dict(given or {})
        for concept in () if isinstance(self.judge, ClipJudge) else self.concepts:
            found.setdefault(concept.target, other_values(self.judge, self.facts[concept.target]))
        return {name: others for name, others in found.items() if others}

    # ---- models and latents ---------------------------------------------------------------------

    @property
    def original(self) -> AuditedModel:
        """The model before."""
        return next(one for one in self.models if one.entry.role == "original")

    def by_role(self, role: str) -> list[AuditedModel]:
        """The models that play a role."""
        return [one for one in self.models if one.entry.role == role]

    @property
    def tuned(self) -> list[AuditedModel]:
        """The unlearned models whose weights were changed: filters are left out."""
        return [one for one in self.by_role("unlearned") if not is_filter(one)]

    @cached_property
    def latents(self) -> Latents:
        """What every model draws from."""
        return generator_of(self.original).draw(
            self.settings.pictures, self.settings.seed, purpose=PURPOSE
        )

    @property
    def first(self) -> Seen:
        """What the judge sees in the original's pictures."""
        return self.seen[self.original.entry.name]

    @cached_property
    def bearing(self) -> dict[str, Tensor]:
        """Per concept (N,) bool: the original shows it at this latent."""
        return {target: self.first.shows(facts) for target, facts in self.facts.items()}

    @cached_property
    def clear(self) -> Tensor:
        """(N,) bool: the original shows none of the concepts at this latent."""
        return ~torch.stack(list(self.bearing.values())).any(0)

    def free(self, model: str) -> Tensor:
        """(N,) bool: pictures of a model that show none of the concepts."""
        seen = self.seen[model]
        return ~torch.stack([seen.shows(facts) for facts in self.facts.values()]).any(0)

    @cached_property
    def agreement(self) -> dict[str, float]:
        """Area under the curve of the guide's probability against what the judge sees."""
        from torchmetrics.functional.classification import binary_auroc

        assert self.guide is not None
        guide, device = self.guide.to(self.device), self.device
        with torch.no_grad():
            parts = [
                guide.probabilities(floats(part).to(device)).cpu()
                for part in self.pictures[self.original.entry.name].split(self.settings.batch_size)
            ]
        columns = torch.cat(parts).T
        return {
            target: float(binary_auroc(column, mask.long()))
            for (target, mask), column in zip(self.bearing.items(), columns, strict=True)
            if mask.any() and not mask.all()
        }

    @property
    def device(self) -> torch.device:
        """Where the original lies."""
        return cast(torch.device, next(generator_of(self.original).network.parameters()).device)

    # ---- pictures -------------------------------------------------------------------------------

    def draw(self) -> None:
        """Make the pictures of all models, at the same latents but for `OTHER_LATENTS`."""
        for one in self.models:
            if is_filter(one):
                self._filtered(one)
            else:
                self._keep(one.entry.name, self.render(one, self.latents))
        first = generator_of(self.original)
        others = first.draw(
            self.settings.pictures, derive(self.settings.seed, "other latents"), purpose=PURPOSE
        )
        self._keep(OTHER_LATENTS, self.render(self.original, others))
        entry = replace(
            self.original.entry, name=OTHER_LATENTS, role="control", cost={}, details={},
            source=f"'{self.original.entry.name}' at other latents",
        )  # fmt: skip
        self.models.append(AuditedModel(entry, first))

    def _keep(self, name: str, pictures: Tensor) -> None:
        self.pictures[name] = pictures
        self.seen[name] = Seen(self.judge, pictures, self.settings.batch_size)

    def _filtered(self, one: AuditedModel) -> None:
        """Pictures that a filter lets pass; they belong to no latent of ours."""
        wrapper: Any = one.model
        before = wrapper.report
        images = wrapper.generate(
            [""], self.settings.pictures, derive(self.settings.seed, "filter audit")
        )
        after = wrapper.report
        self.acceptance[one.entry.name] = {
            "acceptance": (after.pictures - before.pictures) / (after.drawn - before.drawn),
            "most_tries": after.most_tries,
        }
        self._keep(one.entry.name, as_bytes(images.cpu()))

    def render(self, one: AuditedModel, latents: Latents) -> Tensor:
        """Pictures (n, 3, H, W) uint8 of a model; nothing of it changes."""
        return render(generator_of(one), latents, self.settings.batch_size)

    def of(self, model: str, rows: Tensor | None = None) -> Tensor:
        """Pictures of a model as floats: all, or some by a mask."""
        own = self.pictures[model]
        return floats(own if rows is None else own[rows])

    # ---- edits ----------------------------------------------------------------------------------

    def edit(self) -> None:
        """Train a mapper per concept on the original, and move clear latents by it in all models.

        The guide is what the mapper follows; the judge says whether it worked.
        """
        if self.guide is None or not self.settings.edits:
            return
        from mmforget.models.latent_mapper import train_mapper

        model = generator_of(self.original)
        guide = self.guide.to(self.device)
        rows = self.clear.nonzero()[: self.settings.edits, 0]
        for number, concept in enumerate(self.concepts):
            mapper, _, report = train_mapper(
                model, guide, number, steps=self.settings.mapper_steps, seed=self.settings.seed,
                checked=self.settings.edits, purpose=f"audit-mapper-{number}", space="z",
            )  # fmt: skip
            self.mappers[concept.target] = report.to_dict()
            self.edited_rows[concept.target] = rows
            own = self.latents[rows]
            with torch.no_grad():
                on = Latents(own.codes.to(self.device), own.labels, own.space)
                moved = mapper(on)
            for one in self.models:
                if not is_filter(one) and one.entry.name != OTHER_LATENTS:
                    key = one.entry.name, concept.target
                    self.edited[key] = self.render(one, moved)


def render(model: ImageGAN, latents: Latents, batch_size: int = 256) -> Tensor:
    """Draw pictures as a file would hold them.

    Args:
        model: the generator; nothing of it changes.
        latents: n of them, in any space.
        batch_size: pictures at a time.

    Returns:
        (n, 3, H, W) uint8 on the CPU.
    """
    with torch.no_grad(), frozen(model):
        parts = [
            as_bytes(model.synthesise(latents[start : start + batch_size]).float().cpu())
            for start in range(0, len(latents), batch_size)
        ]
    return torch.cat(parts)


def is_filter(one: AuditedModel) -> bool:
    """Whether a model only holds back pictures, with weights as they were."""
    return isinstance(one.model, RejectionFilter)


def generator_of(one: AuditedModel) -> ImageGAN:
    """The generator of an entry; that behind a filter too."""
    model: Any = one.model
    return cast(ImageGAN, model.model if is_filter(one) else model)


def other_values(judge: Judge, facts: Facts) -> tuple[str, ...]:
    """The other values of the factor that a concept belongs to; none if it mixes several."""
    if len(facts) != 1:
        return ()
    factor, value = next(iter(facts.items()))
    return tuple(one for one in judge.factors[factor] if one != value)


def _same(judge: Judge, guide: ClipModel) -> bool:
    return isinstance(judge, ClipJudge) and state_hash(judge.model) == state_hash(guide)


def audit_gan(
    original: ImageGAN | AuditedModel,
    unlearned: ImageGAN | AuditedModel | Sequence[AuditedModel],
    concepts: ConceptSpec | Sequence[ConceptSpec],
    judge: Judge,
    guide: ClipModel | None = None,
    settings: GANAuditSettings | None = None,
    retrained: Sequence[ImageGAN | AuditedModel] = (),
    *,
    alternatives: Mapping[str, Sequence[str]] | None = None,
    real: Tensor | None = None,
    title: str = "",
    progress: bool = False,
    command: str = "",
) -> Results:
    """Measure whether a generator still draws what it was made to forget, and what it cost.

    All models draw the same latents, once. They are left bit-identical; a metric that fails is a
    row with its error. A `RejectionFilter` may stand among the unlearned models: it is reported as
    a filter and never as forgetting.

    Args:
        original: the model before.
        unlearned: the model after, or several with their entries.
        concepts: what was erased.
        judge: says what is to be seen in a picture; not the model that guided the method.
        guide: the CLIP model that the methods followed: edits towards a concept follow it too, and
            attacks count a picture only if it agrees with the judge.
        settings: see `GANAuditSettings`.
        retrained: generators that were trained without the concept; what attacks find in them is
            what attacks find without any memory.
        alternatives: of the guide, per target; by default the other values of the judge's factor.
        real: (M, 3, H, W) real pictures in [0, 1], for their distance.
        title: for people.
        progress: show bars.
        command: how the audit was started.

    Raises:
        ConfigurationError: judge and guide are the same model, models of the same name, or attacks
            that lack what they need.
        RequestError: contradictory concepts, or one that the judge cannot see.
        ModelError: generators that draw from different latents.

    Reference:
        Prompting forgetting: unlearning in GANs via textual guidance, 2025, arXiv 2504.01218.
    """
    settings = settings or GANAuditSettings()
    specs = (concepts,) if isinstance(concepts, ConceptSpec) else tuple(concepts)
    check_together(specs)
    start = time.perf_counter()
    given = list(unlearned) if isinstance(unlearned, Sequence) else [unlearned]
    models = [
        _audited(original, "original", "original"),
        *(_audited(one, "unlearned", "unlearned") for one in given),
        *(
            _audited(one, "retrained", f"retrained {number}" if len(retrained) > 1 else "retrained")
            for number, one in enumerate(retrained, 1)
        ),
    ]
    names = [one.entry.name for one in models]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"the models {names} need different names")
    if guide is not None and _same(judge, guide) and not settings.allow_same_judge:
        raise ConfigurationError(
            "`judge` is the CLIP model that guided the method, which sees whatever it was made to "
            "see; give another judge, or set `allow_same_judge`, which the report then says"
        )
    if real is not None and (real.ndim != 4 or real.shape[1] != 3 or len(real) < 2):
        raise DataError(
            f"`real` has the shape {tuple(real.shape)}; give at least two pictures (M, 3, H, W)"
        )
    check_attacks(settings.attacks, guide, real)
    scene = GANScene(models, specs, judge, guide, settings, alternatives, real, progress)
    scene.draw()
    scene.edit()
    rows = Rows()
    measure(scene, rows)
    recoveries: list[Recovery] = attack_all(scene, rows)
    add_costs(rows, scene.original, scene.tuned)
    checks, verdict, outcomes = conclude(scene, rows, recoveries)
    order = list(METRICS)
    entries = [
        replace(
            one.entry,
            hash=one.entry.hash or state_hash(generator_of(one)),
            details=one.entry.details | outcomes.get(one.entry.name, {}),
        )
        for one in scene.models
    ]
    return Results(
        title=title or "Erase " + ", ".join(f"“{concept.target}”" for concept in specs),
        goal="concept_removal",
        requests=[ForgetRequest(concepts=specs).to_dict()],
        data=describe(scene),
        models=entries,
        metrics=sorted(rows.rows.values(), key=lambda row: order.index(row.metric)),
        checks=checks,
        verdict=verdict,
        examples=examples(scene, recoveries),
        not_measured=not_measured(scene, rows, recoveries),
        not_claimed=list(NOT_CLAIMED),
        provenance=provenance(scene, time.perf_counter() - start, command),
        tuning=settings.tuning,
        warnings=[*scene.remarks, *warnings(scene, rows, entries)],
    )


def _audited(given: Model | AuditedModel, role: str, name: str) -> AuditedModel:
    if isinstance(given, AuditedModel):
        return given
    return AuditedModel(ModelEntry(name, role), given)  # type: ignore[arg-type]
