"""The `audit` section of a forget run: the audit's own settings and what to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

# The names of inherited fields' types are looked up here; without them a dotted option such as
# `--audit.relearning.steps 5` would be taken for anything.
from mmforget.attacks.answer_relearning import AnswerRelearningSettings, Part  # noqa: F401
from mmforget.attacks.detector_relearning import DetectorRelearningSettings  # noqa: F401
from mmforget.attacks.relearning import RelearningSettings  # noqa: F401
from mmforget.audit.detectors import DetectorAuditSettings
from mmforget.audit.families import settings_for
from mmforget.audit.multimodal import MultimodalAuditSettings
from mmforget.audit.scene import AuditSettings
from mmforget.cli.building import model_folder, settings_source
from mmforget.cli.parsing import find_class, import_known_classes
from mmforget.data.base import ForgetDataModule
from mmforget.run import AuditOptions


@dataclass(frozen=True)
class ComparedModels:
    """What an audit after forgetting compares with, whatever the family.

    Args:
        retrained: models trained from scratch without the forget set.
        held_out: such models that are measured as if they were methods.
        controls: edits that must fail the audit; null for all that fit the model.
        control_epochs: epochs of the controls that train.
        enabled: False skips the audit; the run then claims nothing.
    """

    retrained: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    controls: list[str] | None = None
    control_epochs: int = AuditOptions.control_epochs
    enabled: bool = True

    def options(self) -> AuditOptions:
        """The same for `mmforget.run.forget`."""
        kind = next(one for one in SETTINGS if isinstance(self, one))
        own = {f.name: getattr(self, f.name) for f in fields(kind)}
        return AuditOptions(
            settings=kind(**own),
            retrained=[*map(model_folder, self.retrained)],
            held_out=[*map(model_folder, self.held_out)],
            controls=self.controls,
            control_epochs=self.control_epochs,
            enabled=self.enabled,
        )


SETTINGS: tuple[type[Any], ...] = (
    DetectorAuditSettings,
    MultimodalAuditSettings,
    AuditSettings,
)
"""The settings of the audits, one of which every section extends."""


@dataclass(frozen=True)
class AuditSection(ComparedModels, AuditSettings):
    """What the audit of a classifier measures, and against which references."""


@dataclass(frozen=True)
class DetectorAuditSection(ComparedModels, DetectorAuditSettings):
    """What the audit of a detector measures, and against which references."""


@dataclass(frozen=True)
class MultimodalAuditSection(ComparedModels, MultimodalAuditSettings):
    """What the audit of a multimodal language model measures, and against which references."""


SECTIONS: dict[type[Any], type[ComparedModels]] = {
    DetectorAuditSettings: DetectorAuditSection,
    MultimodalAuditSettings: MultimodalAuditSection,
    AuditSettings: AuditSection,
}


def section_for(settings: Mapping[str, Any]) -> type[ComparedModels]:
    """The section of a run, by its data."""
    return SECTIONS[audit_settings_for(settings)]


def audit_settings_for(settings: Mapping[str, Any]) -> type[Any]:
    """The class of the audit's settings, by the data that the user named."""
    import_known_classes()
    found = find_class(settings_source(settings, "data"), ForgetDataModule)
    # what is unknown, or made by a function, is for the parser to complain about
    return settings_for(found) if isinstance(found, type) else AuditSettings
