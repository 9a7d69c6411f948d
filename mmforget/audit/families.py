"""What differs by family: how good a model is on its roles, and which audit it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmforget.audit.protocol import accuracies, audit
from mmforget.audit.results import Results
from mmforget.audit.scene import AuditedModel, AuditSettings
from mmforget.data.base import ForgetDataModule, Stage
from mmforget.data.detection import DetectionDataModule
from mmforget.errors import DataError
from mmforget.models.base import Model
from mmforget.models.detector import Detector
from mmforget.request import ForgetRequest


def check_fits(model: Model, data: ForgetDataModule) -> None:
    """Refuse a detector with data that has no boxes, and a classifier with data that has.

    Raises:
        DataError: names both, and data that would fit.
    """
    scenes, detector = isinstance(data, DetectionDataModule), isinstance(model, Detector)
    if scenes == detector:
        return
    name, given = type(model).__name__, type(data).__name__
    if detector:
        raise DataError(
            f"`model` is a {name}, but `data` {given} has no boxes; take DigitScenes, CocoFolder "
            "or HuggingFaceDetection"
        )
    raise DataError(
        f"`data` {given} holds scenes with boxes, but `model` is a {name}; take a Detector, or "
        "data with one label per image"
    )


def quality_by_role(
    model: Model, data: ForgetDataModule, stage: Stage = "test"
) -> list[dict[str, Any]]:
    """Accuracy of a classifier, average precision of a detector, per role of a stage.

    Args:
        model: either.
        data: with a request.
        stage: ``test`` or ``val``.

    Returns:
        One row per role that has samples: ``{"split", "accuracy" in [0, 1], "n"}``, where the
        accuracy of a detector is its average precision and n counts objects.
    """
    if not isinstance(model, Detector):
        return accuracies(model, data, stage)
    from mmforget.audit.detector_outputs import role_precision

    return [
        {"split": row["split"], "accuracy": row["average_precision"], "n": row["n"]}
        for row in role_precision(model, data, stage)
    ]


def settings_for(data: type[ForgetDataModule]) -> type[Any]:
    """The class of the settings with which models of some data are audited."""
    if issubclass(data, DetectionDataModule):
        from mmforget.audit.detectors import DetectorAuditSettings

        return DetectorAuditSettings
    return AuditSettings


def audit_by_family(
    models: Sequence[AuditedModel],
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    settings: Any = None,
    **options: Any,
) -> Results:
    """The audit that fits the data: `mmforget.audit.protocol.audit` or `audit_detector`.

    Args:
        models: see there.
        data: see there.
        requests: see there.
        settings: of the class that `settings_for` names.
        options: what else these take.

    Raises:
        DataError: see `check_fits`.
    """
    for one in models:
        check_fits(one.model, data)
    if isinstance(data, DetectionDataModule):
        from mmforget.audit.detectors import audit_detector

        return audit_detector(models, data, requests, settings, **options)
    return audit(models, data, requests, settings, **options)
