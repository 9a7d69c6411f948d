"""`--require`: conditions on results, so that a command can stand in a build pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmforget.errors import ConfigurationError, suggest

if TYPE_CHECKING:
    from argparse import Namespace

    from mmforget.audit.results import Results

REQUIRABLE: Mapping[str, tuple[str, str]] = {
    "target": ("target_rate", "target/"),
    "synonyms": ("target_rate", "synonym/"),
    "together": ("target_rate", "together/"),
    "other_facts": ("other_facts_rate", "together/"),
    "preserved": ("preserved_rate", "preserved"),
    "preserved_worst": ("preserved_worst", "preserved"),
    "preserved_drop": ("preserved_drop", "preserved"),
    "preserved_worst_drop": ("preserved_worst_drop", "preserved"),
    "clip_score": ("clip_score", "preserved"),
    "kid": ("kid_to_original", "preserved"),
    "attacks": ("attack_", "target/"),
}
"""Name: beginning of the metric, split or its beginning; of several values the worst counts."""

OF_MEMORIES: Mapping[str, tuple[str, str]] = {
    "copies": ("replication_rate", "located/"),
    "held_out_copies": ("replication_rate", "held_out/"),
    "likeness": ("copy_similarity", "located/"),
    "specificity": ("specificity", "located/"),
    "loss_rise": ("denoising_loss_rise", "ordinary"),
    "kid": ("kid_to_real", "ordinary"),
    "attack": ("attack_embedding", "located/"),
}
"""The same for `mmforget memorization`."""

OF_GANS: Mapping[str, tuple[str, str]] = {
    "target": ("native_rate", "native/"),
    "elicited": ("elicited_rate", "edited/"),
    "kept_worst": ("kept_worst", "kept"),
    "same": ("same_latent_keep", "clear/"),
    "drift": ("drift", "clear"),
    "fid": ("fid_to_original", "clear"),
    "kid": ("kid_to_original", "clear"),
    "attacks": ("attack_", "native/"),
}
"""The same for generators of GANs."""

CONTROLS: Mapping[str, str] = {"attack_embedding": "attack_embedding_controls"}
"""Metrics that prove nothing unless another one was measured on the same model."""

CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Requirement:
    """A condition that the unlearned model must meet.

    Attributes:
        name: a key of `known`.
        sign, limit: the condition.
        known: where the values of a name are found.
    """

    name: str
    sign: str
    limit: float
    known: Mapping[str, tuple[str, str]] = field(default_factory=lambda: REQUIRABLE, repr=False)

    @classmethod
    def parse(cls, text: str, known: Mapping[str, tuple[str, str]] = REQUIRABLE) -> Requirement:
        """Read ``name<=value``.

        Args:
            text: the condition.
            known: the names that there are.

        Raises:
            ConfigurationError: no condition, or an unknown name.
        """
        found = CONDITION.fullmatch(text)
        if found is None:
            raise ConfigurationError(
                f"`--require` is '{text}'; write a name, a sign and a number, such as "
                f"'{next(iter(known))}<=0.1'"
            )
        name, sign, number, percent = found.groups()
        if name not in known:
            raise ConfigurationError(f"`--require` names '{name}'; {suggest(name, known)}")
        try:
            limit = float(number) / (100 if percent else 1)
        except ValueError as error:
            raise ConfigurationError(f"`--require` is '{text}'; '{number}' is no number") from error
        return cls(name, sign, limit, known)

    def measured(self, results: Results) -> float | None:
        """The worst value of the unlearned models; None if there is none."""
        metric, split = self.known[self.name]
        models = {entry.name for entry in results.by_role("unlearned")}
        values = [
            row.value
            for row in results.metrics
            if row.model in models
            and (row.metric == metric or (metric.endswith("_") and row.metric.startswith(metric)))
            and (row.split == split or (split.endswith("/") and row.split.startswith(split)))
        ]
        control = CONTROLS.get(metric)
        if control is not None:
            done = {row.model for row in results.metrics if row.metric == control and not row.error}
            if not models <= done:
                return None
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None  # a value that could not be measured is no proof of anything
        return max(known) if self.sign.startswith("<") else min(known)

    def holds(self, value: float | None) -> bool:
        """Whether a value meets the condition."""
        if value is None:
            return False
        return {
            "<=": value <= self.limit,
            ">=": value >= self.limit,
            "<": value < self.limit,
            ">": value > self.limit,
        }[self.sign]

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.name}{self.sign}{self.limit:g}"


def requirements_of(
    given: Namespace, known: Mapping[str, tuple[str, str]] = REQUIRABLE
) -> list[Requirement]:
    """The conditions of the command line of `mmforget erase`.

    Args:
        given: with `require`, `audit` and `attack`.
        known: the names that there are.

    Raises:
        ConfigurationError: a condition that nothing will be measured for.
    """
    found = [Requirement.parse(text, known) for text in given.require]
    if found and not given.audit:
        raise ConfigurationError("`--require` needs the audit; leave out `--no-audit`")
    if any(one.name == "attacks" for one in found) and not given.attack:
        raise ConfigurationError("`--require attacks` needs an attack; add `--attack NAME`")
    return found


def check(results: Results, requirements: Sequence[Requirement]) -> list[str]:
    """Add the requirements to the checks.

    Returns:
        One sentence per condition that is not met.
    """
    from mmforget.audit.results import Check

    missed = []
    for one in requirements:
        value = one.measured(results)
        shown = "not measured" if value is None else f"{value:.4g}"
        held = one.holds(value)
        results.checks.append(
            Check(f"required: {one}", held, f"measured {one.name} = {shown}, asked {one}")
        )
        if not held:
            missed.append(f"`--require {one}` is not met: {one.name} is {shown}")
    return missed
