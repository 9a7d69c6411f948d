"""The audit of detectors: average precision by role, what became of objects, relearning."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmforget.attacks.detector_relearning import DetectorRelearningSettings
from mmforget.audit.detector_pictures import pictures
from mmforget.audit.detector_rows import (
    class_precision,
    confusion,
    measure_box_relearning,
    measure_detections,
)
from mmforget.audit.detector_scene import DetectorScene
from mmforget.audit.detector_verdict import conclude
from mmforget.audit.detector_words import (
    NOT_CLAIMED,
    describe,
    not_measured,
    provenance,
    warnings,
)
from mmforget.audit.limits import check_limits
from mmforget.audit.protocol import add_costs, check_models
from mmforget.audit.references import judged
from mmforget.audit.results import Results
from mmforget.audit.rows import Rows
from mmforget.audit.scene import AuditedModel
from mmforget.data.base import ForgetDataModule
from mmforget.data.detection import DetectionDataModule
from mmforget.errors import ConfigurationError, DataError
from mmforget.models.base import Model
from mmforget.request import ForgetRequest


@dataclass(frozen=True)
class DetectorAuditSettings:
    """How a detector is audited.

    Args:
        seed: base seed of all draws.
        batch_size: of forward passes.
        score: boxes below it are not counted as found, moved or false, and are not drawn; average
            precision looks at all boxes.
        replicates: of the bootstrap over images for average precision; 0 leaves intervals out.
        max_average_precision: on forgotten classes; that of retrained models if it is more.
        max_found_rate: share of forgotten objects that may still be found; likewise.
        max_retain_drop: average precision on retained classes that may be lost.
        max_class_drop: average precision that a single retained class may lose.
        min_original: average precision on the forgotten classes below which the original hardly
            finds them, so that nothing can be judged.
        examples: pictures of each kind in the report; 0 shows none, which a report on people needs.
        relearning: budget of the relearning attack; 0 steps leave it out.
        tuning: how hyper-parameters were chosen and how many settings were tried, for the report.

    Raises:
        ConfigurationError: a number out of range.
    """

    seed: int = 0
    batch_size: int = 32
    score: float = 0.3
    replicates: int = 100
    max_average_precision: float = 0.02
    max_found_rate: float = 0.02
    max_retain_drop: float = 0.02
    max_class_drop: float = 0.1
    min_original: float = 0.1
    examples: int = 4
    relearning: DetectorRelearningSettings = field(default_factory=DetectorRelearningSettings)
    tuning: str = ""

    def __post_init__(self) -> None:
        check_limits(
            self,
            {"batch_size": 1, "replicates": 0, "examples": 0},
            ("score", "max_average_precision", "max_found_rate", "max_retain_drop",
             "max_class_drop", "min_original"),
            {},
        )  # fmt: skip
        if 0 < self.replicates < 50:
            raise ConfigurationError(
                f"`audit.replicates` is {self.replicates}; a 95 % interval needs at least 50, or 0 "
                "for no interval"
            )


def audit_detector(
    models: Sequence[AuditedModel],
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    settings: DetectorAuditSettings | None = None,
    *,
    title: str = "",
    before: Model | None = None,
    sequence: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    command: str = "",
) -> Results:
    """Measure detectors against a request.

    No model is changed. A metric that fails is a row with its error.

    Args:
        models: exactly one ``original`` and at least one ``unlearned``; ``retrained`` models are
            the target, ``held_out`` ones test the audit itself, ``control`` ones must fail.
        data: a `DetectionDataModule`; its requests are set to `requests`.
        requests: in order; the models were asked to forget all of them.
        settings: see `DetectorAuditSettings`.
        title: for people; by default made from the requests.
        before: the model before the last request, for ``h_mean_previous``.
        sequence: average precisions after each request (under ``accuracy``), put into the results
            as they are.
        curves: further curves for `Results.curves`, such as ``forgetting``.
        command: how the audit was started.

    Raises:
        ConfigurationError: models that lack a role or have equal names.
        RequestError, DataError: requests that do not fit the data, or data without boxes.
        CapabilityError: a model is no detector.
    """
    settings = settings or DetectorAuditSettings()
    check_models(models)
    if not isinstance(data, DetectionDataModule):
        raise DataError(
            f"an audit of detectors needs images with boxes, but {type(data).__name__} has none; "
            "use a DetectionDataModule"
        )
    start = time.perf_counter()
    scene = DetectorScene(models, data, requests, settings)
    scene.run()
    rows = Rows()
    measure_detections(scene, rows, before)
    shown: dict[str, list[dict[str, Any]]] = measure_box_relearning(scene, rows)
    add_costs(scene.models, rows)
    rows.relate(scene.retrained, scene.original)
    checks, verdict, findings = conclude(scene, rows)
    entries = judged(scene.models, findings)
    shown |= {name: [dict(row) for row in found] for name, found in (curves or {}).items()}
    return Results(
        title=title or ", ".join(request.name for request in requests),
        goal=scene.goal,
        requests=[request.to_dict() for request in requests],
        data=describe(scene),
        models=entries,
        metrics=list(rows.rows.values()),
        checks=checks,
        verdict=verdict,
        sequence=[dict(row) for row in sequence],
        curves=shown,
        class_accuracy=class_precision(scene),
        confusion=confusion(scene),
        examples=pictures(scene),
        not_measured=not_measured(scene, rows),
        not_claimed=list(NOT_CLAIMED),
        provenance=provenance(scene, time.perf_counter() - start, command),
        tuning=settings.tuning,
        warnings=warnings(scene, entries),
    )
