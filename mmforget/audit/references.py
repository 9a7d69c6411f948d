"""What every audit with retrained models and controls says about the models it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from mmforget.audit.results import ModelEntry, Role
from mmforget.audit.rows import Rows
from mmforget.audit.scene import AuditedModel
from mmforget.models.base import state_hash


class Compared(Protocol):
    """The models of an audit by their part in it."""

    @property
    def retrained(self) -> list[str]:
        """Names of the retrained models."""
        ...

    def by_role(self, role: Role) -> list[AuditedModel]:
        """The models that play a role."""
        ...


def judged(models: Sequence[AuditedModel], findings: Mapping[str, Any]) -> list[ModelEntry]:
    """The entries of the models with the hash of what was measured and the outcome.

    Args:
        models: in order.
        findings: by name, each with an ``outcome``.
    """
    return [
        replace(
            one.entry,
            hash=state_hash(one.model),
            details=one.entry.details | {"outcome": findings[one.entry.name].outcome},
        )
        for one in models
    ]


def missing_references(scene: Compared) -> list[str]:
    """Which models an audit lacks, and what it cannot say without them."""
    missing = []
    if not scene.retrained:
        missing.append("Comparison with retraining: no retrained model was given")
    elif len(scene.retrained) == 1:
        missing.append("Spread of retrained models: only one was given")
    if not scene.by_role("held_out"):
        missing.append("False-alarm rate of the audit: no held-out retrained model was given")
    if not scene.by_role("control"):
        missing.append("Sensitivity of the audit: no controls were given")
    return missing


def failed_rows(rows: Rows) -> list[str]:
    """How many measurements failed, if any."""
    failed = sum(bool(row.error) for row in rows.rows.values())
    return [f"{failed} measurements failed; each is a row with its error"] if failed else []


def untouched(entries: Sequence[ModelEntry]) -> list[str]:
    """A warning for each unlearned model that has the weights of the original."""
    first = next(entry for entry in entries if entry.role == "original")
    return [
        f"'{entry.name}' has exactly the weights of the original model"
        for entry in entries
        if entry.role == "unlearned" and entry.hash == first.hash
    ]
