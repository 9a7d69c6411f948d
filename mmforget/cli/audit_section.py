"""The `audit` section of a forget run: the audit's own settings and what to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from mmforget.audit.protocol import AuditSettings


@dataclass(frozen=True)
class AuditSection(AuditSettings):
    """What the audit after forgetting measures, and against which references.

    Args:
        retrained: models trained from scratch without the forget set.
        held_out: such models that serve as reference for the retrained ones.
        controls: edits that must fail the audit.
        enabled: False skips the audit; the report then says that nothing was measured.
    """

    retrained: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=lambda: ["identity", "logit_mask", "head_only"])
    enabled: bool = True

    def settings(self) -> AuditSettings:
        """The part that the audit itself reads."""
        return AuditSettings(**{f.name: getattr(self, f.name) for f in fields(AuditSettings)})
