"""The audit: every model, every split, every metric, from cached outputs to a verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmforget.audit.answers import measure_answers
from mmforget.audit.controls import random_init
from mmforget.audit.examples import pictures
from mmforget.audit.inside import measure_relearning, measure_representation
from mmforget.audit.outputs import collect
from mmforget.audit.privacy import measure_privacy, testable
from mmforget.audit.provenance import environment
from mmforget.audit.references import failed_rows, judged, missing_references, untouched
from mmforget.audit.results import Results
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import AuditedModel, AuditSettings, Scene
from mmforget.audit.verdict import conclude
from mmforget.data.base import ForgetDataModule, Stage
from mmforget.errors import ConfigurationError, ModelError
from mmforget.metrics.output import class_accuracy
from mmforget.models.base import HasFeatures, Model
from mmforget.request import ForgetRequest

__all__ = ["AuditSettings", "AuditedModel", "accuracies", "audit"]

logger = logging.getLogger(__name__)

NOT_CLAIMED = [
    "No certificate of deletion: the evidence is bounded by the attacks that were run.",
    "Passing a check means that no difference from retrained models was found, not that there is "
    "none.",
    "Population attacks understate what can be learnt about one single sample.",
]

NOT_RUN = [
    "U-LiRA (per-example membership attack): not run, it needs many originals and unlearnings",
    "Forgetting score (NeurIPS 2023 challenge): not run, it needs hundreds of retrained models",
    "KLOM: not run, it needs about a hundred retrained models",
    "Information difference index: not run",
]


def audit(
    models: Sequence[AuditedModel],
    data: ForgetDataModule,
    requests: Sequence[ForgetRequest],
    settings: AuditSettings | None = None,
    *,
    title: str = "",
    before: Model | None = None,
    sequence: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    command: str = "",
) -> Results:
    """Measure models against a request.

    No model is changed. A metric that fails is a row with its error. A randomly initialised model
    is added as lower anchor unless one is given.

    Args:
        models: exactly one ``original`` and at least one ``unlearned``; ``retrained`` models are
            the target, ``held_out`` ones test the audit itself, ``control`` ones must fail.
        data: its requests are set to `requests`.
        requests: in order; the models were asked to forget all of them.
        settings: see `AuditSettings`.
        title: for people; by default made from the requests.
        before: the model before the last request, for ``h_mean_previous``.
        sequence: accuracies after each request, put into the results as they are.
        curves: further curves for `Results.curves`, such as ``forgetting``.
        command: how the audit was started.

    Raises:
        ConfigurationError: models that lack a role or have equal names.
        RequestError, DataError: requests that do not fit the data, or data without labels.
        CapabilityError: a model without class scores.
    """
    settings = settings or AuditSettings()
    check_models(models)
    start = time.perf_counter()
    warnings: list[str] = []
    audited = list(models)
    if not any(one.entry.role == "random_init" for one in audited):
        try:
            audited.append(random_init(_original(audited).model, settings.seed))
        except ModelError as error:
            warnings.append(f"no randomly initialised anchor: {error}")
    scene = Scene(audited, data, requests, settings)
    scene.run()
    rows = Rows()
    measure_answers(scene, rows, before)
    measure_privacy(scene, rows)
    measure_representation(scene, rows)
    shown = measure_relearning(scene, rows)
    add_costs(audited, rows)
    rows.relate(scene.retrained, scene.original)
    checks, verdict, findings = conclude(scene, rows)
    entries = judged(audited, findings)
    shown |= {name: [dict(row) for row in found] for name, found in (curves or {}).items()}
    return Results(
        title=title or ", ".join(request.name for request in requests),
        goal=scene.goal,
        requests=[request.to_dict() for request in requests],
        data=_describe(scene),
        models=entries,
        metrics=list(rows.rows.values()),
        checks=checks,
        verdict=verdict,
        sequence=[dict(row) for row in sequence],
        curves=shown,
        class_accuracy=_class_accuracy(scene),
        confusion=_confusion(scene),
        examples=pictures(scene),
        not_measured=_not_measured(scene, rows),
        not_claimed=list(NOT_CLAIMED),
        provenance=_provenance(settings, time.perf_counter() - start, command, scene),
        tuning=settings.tuning,
        warnings=warnings + _warnings(scene, entries),
    )


def accuracies(
    model: Model, data: ForgetDataModule, stage: Stage = "test", batch_size: int = 256
) -> list[dict[str, Any]]:
    """Accuracy on the forget, retain and previously forgotten part of a stage.

    Args:
        model: offers `HasLogits`.
        data: with a request.
        stage: ``test`` or ``val``. A request that names samples has no forget part there; its
            training samples stand in for it.
        batch_size: of the forward passes.

    Returns:
        One row per part that has samples: ``{"split", "accuracy" in [0, 1], "n"}``.
    """
    outputs = collect(model, data.dataset(stage), batch_size)
    rows = []
    for role in ("forget", "retain", "previous"):
        part = data.subset(stage, role, whole=True)  # type: ignore[arg-type]
        if len(part.ids):
            found = outputs.of(part.ids)
        else:
            part = data.subset("train", role, whole=True)  # type: ignore[arg-type]
            if not len(part.ids):
                continue
            found = collect(model, part, batch_size)
        rows.append(
            {"split": role, "accuracy": float(found.correct.double().mean()), "n": len(found)}
        )
    return rows


def check_models(models: Sequence[AuditedModel]) -> None:
    """Refuse models that cannot be compared.

    Raises:
        ConfigurationError: equal names, not exactly one original, or nothing to judge.
    """
    names = [audited.entry.name for audited in models]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigurationError(
            f"`models` has the name '{doubled[0]}' more than once; names are column titles and "
            "must differ"
        )
    roles = [audited.entry.role for audited in models]
    if roles.count("original") != 1:
        raise ConfigurationError(
            f"`models` has {roles.count('original')} with the role 'original'; an audit compares "
            "with exactly one"
        )
    if "unlearned" not in roles:
        raise ConfigurationError(
            "`models` has none with the role 'unlearned'; give the model that shall be judged"
        )


def _original(models: Sequence[AuditedModel]) -> AuditedModel:
    return next(audited for audited in models if audited.entry.role == "original")


def add_costs(models: Sequence[AuditedModel], rows: Rows) -> None:
    """Add the cost of every model that knows it, and how much of it was changed."""
    original = dict(_original(models).model.named_parameters())
    spent = [
        float(audited.entry.cost["sample_passes"])
        for audited in models
        if audited.entry.role == "retrained" and audited.entry.cost.get("sample_passes")
    ]
    for audited in models:
        name, cost = audited.entry.name, audited.entry.cost
        for metric in ("seconds", "sample_passes", "peak_memory_bytes"):
            if metric in cost:
                rows.add(metric, name, "", lambda v=cost[metric]: Measured(float(v)))  # type: ignore[misc]
        if spent and "sample_passes" in cost and audited.entry.role != "retrained":
            share = float(cost["sample_passes"]) / (sum(spent) / len(spent))
            rows.add("share_of_retraining", name, "", lambda v=share: Measured(v))  # type: ignore[misc]
        if audited.entry.role in ("unlearned", "control"):
            rows.add(
                "changed_parameters",
                name,
                "",
                lambda m=audited.model: Measured(changed_share(m, original)),  # type: ignore[misc]
            )


def changed_share(model: Model, original: Mapping[str, torch.Tensor]) -> float:
    """Share of the parameters of a model that differ from those of the original.

    Raises:
        ValueError: the model has other parameters than the original.
    """
    own = dict(model.named_parameters())
    if {name: p.shape for name, p in own.items()} != {n: p.shape for n, p in original.items()}:
        raise ValueError("the model has other parameters than the original")
    changed = sum(int((own[n].detach() != original[n].detach()).sum()) for n in own)
    return changed / sum(p.numel() for p in own.values())


def _describe(scene: Scene) -> dict[str, Any]:
    split, names = scene.split, scene.class_names
    return {
        "name": scene.data.dataset("test").name,
        "hash": split.data_hash,
        "split_hash": split.hash,
        "sizes": split.sizes(),
        "evaluated": {name: len(ids) for name, ids in scene.ids.items()},
        "class_names": list(names),
        "forget_classes": [names[index] for index in split.forget_classes],
        "previous_classes": [names[index] for index in split.previous_classes],
        "missing_classes": [names[index] for index in split.missing_classes],
    }


def _class_accuracy(scene: Scene) -> dict[str, list[float | None]]:
    found = {}
    for name in scene.names:
        outputs = scene.outputs(name, "test")
        values = class_accuracy(outputs.logits, outputs.label).tolist()
        found[name] = [None if value != value else value for value in values]
    return found


def _confusion(scene: Scene) -> dict[str, list[float]]:
    """Where the forgotten images go: share of the predictions per class."""
    split = scene.seen("forgotten")
    found = {}
    for name in scene.names:
        logits = scene.outputs(name, split).logits
        counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double()
        found[name] = (counts / counts.sum()).tolist()
    return found


def _not_measured(scene: Scene, rows: Rows) -> list[str]:
    missing = [*NOT_RUN, *missing_references(scene)]
    if not scene.by_class:
        missing.append("Linear probe and k-NN: they need forgotten classes")
    if testable(rows, scene.original) is False:
        missing.append("Privacy: not testable, the original model hardly memorises its data")
    if not all(isinstance(audited.model, HasFeatures) for audited in scene.models):
        missing.append("Representation: some models do not show their features")
    return missing + failed_rows(rows)


def _warnings(scene: Scene, entries: Sequence[Any]) -> list[str]:
    found = untouched(entries)
    for split, size in scene.drawn.items():
        found.append(
            f"values on {split} come from {len(scene.ids[split])} of {size} samples, "
            "drawn at random"
        )
    if scene.goal == "concept_removal" and scene.retrained:
        found.append("the goal is concept removal: retrained models need not lack the concept")
    found.append(
        "one training seed: intervals are over samples only and understate the spread over seeds"
    )
    return found


def _provenance(
    settings: AuditSettings, seconds: float, command: str, scene: Scene
) -> dict[str, Any]:
    device = _original(scene.models).model.device
    return environment(device, seconds, command) | {
        "audit_seed": settings.seed,
        "relearning": {
            "shots": settings.relearning.shots,
            "steps": settings.relearning.steps,
            "learning_rates": list(settings.relearning.learning_rates),
            "seeds": settings.relearning.seeds,
        },
        "request_hashes": list(scene.split.request_hashes),
    }
