"""Attacks of an audit of generators: the same on all models, so that their success can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmforget.attacks.generator_inversion import generator_inversion
from mmforget.attacks.generator_relearning import generator_relearning
from mmforget.attacks.generator_report import (
    AttackComparison,
    GeneratorAttackReport,
    ScoreFn,
    compared,
    guide_logits,
    guide_sees,
    judge_logits,
)
from mmforget.attacks.latent_search import latent_search
from mmforget.attacks.mapper_attack import mapper_attacks
from mmforget.attacks.prompt_boundary import prompt_boundary
from mmforget.attacks.report import JudgeFn
from mmforget.audit.concept_attacks import sees_all
from mmforget.audit.concept_pictures import Facts, known_facts
from mmforget.audit.drawing import as_bytes
from mmforget.audit.rows import Measured, Rows
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.judge import ClassifierJudge
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.gan import ImageGAN

if TYPE_CHECKING:
    from mmforget.audit.generators import GANScene

NEED_PICTURES = ("inversion", "relearning")
MAX_PICTURES = 50
"""Real pictures of a concept that an attack takes, at most."""


@dataclass(frozen=True)
class Case:
    """What attacks look for.

    Attributes:
        word: the concept.
        guide: knows the concept as its only one.
        judged: (B,) bool of the judge.
        followed: differentiable score of the model that a search follows: the judge, or the guide
            if the judge gives no gradients.
        confirm: (B,) bool of the other one, which is not followed.
        images: real pictures of it, (n, 3, H, W) in [0, 1]; maybe none.
        rate: how often the original draws it.
        mapped: what the mapper attacks found in a model, free and on the shell: their rows share
            one training.
    """

    word: str
    guide: ConceptGuide
    judged: JudgeFn
    followed: ScoreFn
    confirm: JudgeFn
    images: Tensor | None
    rate: float
    mapped: dict[ImageGAN, tuple[GeneratorAttackReport, GeneratorAttackReport]] = field(
        default_factory=dict, repr=False, compare=False
    )


@dataclass(frozen=True)
class Recovery:
    """What one attack found in one model; `proxy` for a concept that the original never drew."""

    attack: str
    model: str
    concept: str
    report: GeneratorAttackReport
    proxy: bool = False

    def measured(self) -> Measured:
        """As a row."""
        report = self.report
        details = dict(report.details) | {
            "without_attack": report.native,
            "settings": report.settings,
            "attack_seconds": report.seconds,
        }
        note = "; ".join(report.notes)
        if report.rate is None:
            return Measured(None, n=report.n, note=note or "undefined", details=details)
        return Measured(report.rate, report.interval, report.n, note=note, details=details)


def _search(scene: GANScene, model: ImageGAN, case: Case) -> GeneratorAttackReport:
    return latent_search(
        model, case.followed, case.confirm, n=scene.settings.attack_trials,
        seed=scene.settings.seed,
    )  # fmt: skip


def _mapper(
    scene: GANScene, model: ImageGAN, case: Case, on_shell: bool = False
) -> GeneratorAttackReport:
    if model not in case.mapped:
        case.mapped[model] = mapper_attacks(
            model, case.guide, case.judged, n=scene.settings.attack_trials,
            seed=scene.settings.seed,
        )  # fmt: skip
    free, kept = case.mapped[model]
    return kept if on_shell else free


def _boundary(scene: GANScene, model: ImageGAN, case: Case) -> GeneratorAttackReport:
    return prompt_boundary(
        model, case.guide, case.judged, n=scene.settings.attack_trials, seed=scene.settings.seed
    )


def _inversion(scene: GANScene, model: ImageGAN, case: Case) -> GeneratorAttackReport:
    return generator_inversion(model, _given(case), case.judged, seed=scene.settings.seed)


def _relearning(scene: GANScene, model: ImageGAN, case: Case) -> GeneratorAttackReport:
    return generator_relearning(
        model, _given(case), case.judged, max(case.rate, scene.settings.min_original_rate),
        seed=scene.settings.seed,
    )  # fmt: skip


def _given(case: Case) -> Tensor:
    if case.images is None or not len(case.images):
        raise DataError(
            f"there are no real pictures of “{case.word}”; give some as `real` to run this attack"
        )
    return case.images


ATTACKS: Mapping[str, Callable[[Any, ImageGAN, Case], GeneratorAttackReport]] = {
    "latent_search": _search,
    "mapper": _mapper,
    "mapper_on_shell": partial(_mapper, on_shell=True),
    "prompt_boundary": _boundary,
    "inversion": _inversion,
    "relearning": _relearning,
}
"""Attacks by name; they are called with a scene, a generator and what to look for."""


def check_attacks(attacks: Sequence[str], guide: Any, real: Tensor | None) -> None:
    """Refuse attacks that lack what they need.

    Raises:
        ConfigurationError: names the attack and what is missing.
    """
    for attack in attacks:
        if guide is None:
            raise ConfigurationError(
                f"`audit.attacks` has '{attack}', which needs a `guide`: what it finds counts only "
                "if a second model agrees with the judge"
            )
        if attack in NEED_PICTURES and real is None:
            raise ConfigurationError(
                f"`audit.attacks` has '{attack}', which needs real pictures of the concept; give "
                "them as `real`, or leave it out"
            )


def attack_all(scene: GANScene, rows: Rows) -> list[Recovery]:
    """Run the attacks on the original, on what was unlearned, and on the controls."""
    from mmforget.audit.generators import generator_of

    found: list[Recovery] = []
    if not scene.settings.attacks:
        return found
    cases = [case_of(scene, concept) for concept in scene.concepts]
    proxy = None
    if scene.settings.proxy and not scene.by_role("retrained"):
        proxy = case_of(scene, ConceptSpec(scene.settings.proxy))
    for attack in scene.settings.attacks:
        for case in cases:
            for one in [scene.original, *scene.tuned, *scene.by_role("retrained")]:
                name = one.entry.name
                _run(scene, rows, found, attack, name, generator_of(one), case)
        if proxy is not None:
            name, model = scene.original.entry.name, generator_of(scene.original)
            _run(scene, rows, found, attack, name, model, proxy, proxy=True)
    return found


def _run(
    scene: GANScene,
    rows: Rows,
    found: list[Recovery],
    attack: str,
    name: str,
    model: ImageGAN,
    case: Case,
    proxy: bool = False,
) -> None:
    def measure() -> Measured:
        recovery = Recovery(attack, name, case.word, ATTACKS[attack](scene, model, case), proxy)
        found.append(recovery)
        return recovery.measured()

    split = f"{'proxy' if proxy else 'native'}/{case.word}"
    rows.add(f"attack_{attack}", name, split, measure)


def comparison(
    scene: GANScene, recoveries: list[Recovery], attack: str, model: str, concept: str
) -> AttackComparison | None:
    """One attack on an unlearned model beside the original and the controls; None if it failed."""

    def of(name: str) -> list[GeneratorAttackReport]:
        return [
            one.report
            for one in recoveries
            if (one.attack, one.model, one.concept, one.proxy) == (attack, name, concept, False)
        ]

    own, before = of(model), of(scene.original.entry.name)
    if not own or not before:
        return None
    retrained = [report for one in scene.by_role("retrained") for report in of(one.entry.name)]
    if retrained:
        return compared(before[0], own[0], retrained, "retrained")
    proxies = [one.report for one in recoveries if one.proxy and one.attack == attack]
    return compared(before[0], own[0], proxies, "proxy" if proxies else "none")


def case_of(scene: GANScene, concept: ConceptSpec) -> Case:
    """What attacks on a concept look for.

    Raises:
        RequestError: the judge cannot see it, or the guide cannot tell it from its alternatives.
    """
    from mmforget.audit.generators import Seen, other_values

    assert scene.guide is not None
    facts = known_facts(scene.judge, "concept", concept.words)
    others = scene.guide.alternatives.get(concept.target) or other_values(scene.judge, facts)
    guide = ConceptGuide(
        scene.guide.clips, [concept], {concept.target: others} if others else None
    ).to(scene.device)
    judged, second = sees_all(scene.judge, facts), guide_sees(guide)
    follow_judge = isinstance(scene.judge, ClassifierJudge)
    images = None
    if scene.real is not None:
        shown = Seen(scene.judge, as_bytes(scene.real)).shows(facts)
        images = scene.real[shown][:MAX_PICTURES].to(scene.device)
    return Case(
        concept.target,
        guide,
        judged,
        _score(scene.judge, facts) if follow_judge else guide_logits(guide),
        second if follow_judge else judged,
        images,
        float(scene.first.shows(facts).double().mean()),
    )


def _score(judge: Any, facts: Facts) -> ScoreFn:
    """The judge's logit of the fact that it is least sure of."""
    parts = [judge_logits(judge, factor, value) for factor, value in facts.items()]

    def followed(images: Tensor) -> Tensor:
        return torch.stack([part(images) for part in parts]).amin(0)

    return followed
