"""What differs by family: how good a model is on its roles, and which audit it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmforget.audit.protocol import accuracies, audit
from mmforget.audit.results import Results
from mmforget.audit.scene import AuditedModel, AuditSettings
from mmforget.data.base import ForgetDataModule, Stage
from mmforget.data.detection import DetectionDataModule
from mmforget.data.questions import QuestionDataModule
from mmforget.errors import DataError
from mmforget.models.base import Model
from mmforget.models.detector import Detector
from mmforget.models.multimodal import MultimodalLM
from mmforget.request import ForgetRequest


def check_fits(model: Model, data: ForgetDataModule) -> None:
    """Refuse a model with data of another family: boxes, questions, or one label per image.

    Raises:
        DataError: names both, and what would fit.
    """
    name, given = type(model).__name__, type(data).__name__
    scenes, detector = isinstance(data, DetectionDataModule), isinstance(model, Detector)
    questions, answers = isinstance(data, QuestionDataModule), isinstance(model, MultimodalLM)
    if scenes == detector and questions == answers:
        return
    if detector:
        raise DataError(
            f"`model` is a {name}, but `data` {given} has no boxes; take DigitScenes, CocoFolder "
            "or HuggingFaceDetection"
        )
    if answers:
        raise DataError(
            f"`model` is a {name}, but `data` {given} has no questions; take DigitQuestions or "
            "another QuestionDataModule"
        )
    if scenes:
        raise DataError(
            f"`data` {given} holds scenes with boxes, but `model` is a {name}; take a Detector, or "
            "data with one label per image"
        )
    raise DataError(
        f"`data` {given} holds questions about pictures, but `model` is a {name}; take a "
        "MultimodalLM, or data with one label per image"
    )


def quality_by_role(
    model: Model, data: ForgetDataModule, stage: Stage = "test"
) -> list[dict[str, Any]]:
    """Accuracy of a classifier or of answers, average precision of a detector, per role of a stage.

    Args:
        model: of any family.
        data: with a request.
        stage: ``test`` or ``val``.

    Returns:
        One row per role that has samples: ``{"split", "accuracy" in [0, 1], "n"}``, where the
        accuracy of a detector is its average precision and n counts objects; of a multimodal
        language model see `mmforget.audit.multimodal_answers.role_answers`.
    """
    if isinstance(model, MultimodalLM):
        from mmforget.audit.multimodal_answers import role_answers

        return role_answers(model, data, stage)
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
    if issubclass(data, QuestionDataModule):
        from mmforget.audit.multimodal import MultimodalAuditSettings

        return MultimodalAuditSettings
    return AuditSettings


def audit_by_family(
    models: Sequence[AuditedModel],
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    settings: Any = None,
    **options: Any,
) -> Results:
    """The audit that fits the data: `audit`, `audit_detector` or `audit_multimodal`.

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
    if isinstance(data, QuestionDataModule):
        from mmforget.audit.multimodal import audit_multimodal

        return audit_multimodal(models, data, requests, settings, **options)
    return audit(models, data, requests, settings, **options)
