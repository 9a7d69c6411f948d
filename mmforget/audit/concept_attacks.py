"""Attacks of a generator audit: one name each, one common result."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmforget.audit.intervals import wilson
from mmforget.audit.rows import Measured
from mmforget.concept import ConceptSpec

if TYPE_CHECKING:
    from mmforget.attacks.report import AttackReport
    from mmforget.metrics.judge import Judge
    from mmforget.models.diffusion import DiffusionGenerator

ATTACKS: Mapping[str, str] = {
    "concept_inversion": "mmforget.attacks.concept_inversion:inversion_attack",
    "prompts": "mmforget.attacks.prompts:prompt_attack",
    "adversarial_prompt": "mmforget.attacks.adversarial_prompt:adversarial_prompt_attack",
    "sdedit": "mmforget.attacks.image_side:sdedit_attack",
    "latent_inversion": "mmforget.attacks.image_side:latent_inversion_attack",
}
"""Name: ``module:function``."""

INFORMATIVE = ("sdedit", "latent_inversion")
"""Attacks that bring the concept along in a picture: some success says nothing about the model."""


@dataclass(frozen=True)
class Recovery:
    """What one attack found on one model."""

    attack: str
    model: str
    report: AttackReport

    def measured(self) -> Measured:
        """As a row: the share of pictures that show the concept with or without the attack."""
        report = self.report
        details = {
            "without_attack": report.pre_rate,
            "under_attack": report.attack_rate,
            "floor": report.floor,
            "prompts": list(report.prompts),
            "settings": report.settings,
            "queries": report.queries,
            "attack_seconds": report.seconds,
        }
        if report.post_rate is None:
            note = "; ".join(report.notes) or "nothing could be attacked"
            return Measured(None, note=note, details=details)
        hits = round(report.post_rate * report.n)
        return Measured(
            report.post_rate, wilson(hits, report.n), report.n, note="; ".join(report.notes),
            details=details,
        )  # fmt: skip


def run_attack(
    attack: str,
    model: DiffusionGenerator,
    original: DiffusionGenerator,
    concept: ConceptSpec,
    judge: Judge,
    facts: Mapping[str, str],
    seed: int,
    budget: str,
    name: str,
) -> Recovery:
    """Run one attack.

    Args:
        attack: a key of `ATTACKS`.
        model: what is attacked.
        original: the model before.
        concept: what was erased.
        judge: reads pictures.
        facts: what it sees in a picture of the concept.
        seed: of the attack.
        budget: ``smoke`` or ``standard``.
        name: of the model.
    """
    module, _, function = ATTACKS[attack].partition(":")
    run: Any = getattr(importlib.import_module(module), function)
    report = run(model, original, concept, sees_all(judge, facts), seed=seed, budget=budget)
    return Recovery(attack, name, report)


def sees_all(judge: Judge, facts: Mapping[str, str]) -> Any:
    """From images to (B,) bool: the judge sees every one of the facts."""
    from mmforget.attacks.report import sees

    parts = [sees(judge, factor, value) for factor, value in facts.items()]

    def judge_fn(images: Tensor) -> Tensor:
        return torch.stack([part(images) for part in parts]).all(0)

    return judge_fn
