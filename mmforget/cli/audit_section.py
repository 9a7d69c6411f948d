"""The `audit` section of a forget run: the audit's own settings and what to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from mmforget.audit.scene import AuditSettings
from mmforget.cli.building import model_folder
from mmforget.run import AuditOptions


@dataclass(frozen=True)
class AuditSection(AuditSettings):
    """What the audit after forgetting measures, and against which references.

    Args:
        retrained: models trained from scratch without the forget set.
        held_out: such models that are measured as if they were methods.
        controls: edits that must fail the audit.
        control_epochs: epochs of the controls that train.
        enabled: False skips the audit; the run then claims nothing.
    """

    retrained: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=lambda: AuditOptions().controls)
    control_epochs: int = AuditOptions.control_epochs
    enabled: bool = True

    def options(self) -> AuditOptions:
        """The same for `mmforget.run.forget`."""
        own = {f.name: getattr(self, f.name) for f in fields(AuditSettings)}
        return AuditOptions(
            settings=AuditSettings(**own),
            retrained=[*map(model_folder, self.retrained)],
            held_out=[*map(model_folder, self.held_out)],
            controls=self.controls,
            control_epochs=self.control_epochs,
            enabled=self.enabled,
        )
