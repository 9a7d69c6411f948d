"""The schema of `results.json`: what was measured, on what, how surely, against what."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mmforget.errors import DataError, MissingFileError

SCHEMA_VERSION = 1

Direction = Literal["higher", "lower", "closer_to_retrained", "closer_to_value", "none"]
Role = Literal["original", "unlearned", "retrained", "held_out", "control", "random_init"]
Outcome = Literal[
    "forgotten",
    "not_forgotten",
    "damaged",
    "not_discriminative",
    "removed",
    "hidden",
    "present",
    "unattacked",
]
Family = Literal[
    "utility", "forgetting", "generation", "privacy", "representation", "relearning", "cost"
]


@dataclass(frozen=True)
class MetricResult:
    """One measured value with everything needed to read it.

    Args:
        metric: identifier, such as ``accuracy`` or ``membership_auc``.
        model: `ModelEntry.name` of the measured model.
        family: which question it answers.
        split: the data, such as ``test_forget``; empty where there is none.
        value: the value, in the units of `unit`; None exactly if `error` is set or the value is
            `censored` or undefined (then `note` says why).
        direction: what a good value does; `target` holds the value for ``closer_to_value``.
        low, high: the range that the metric can take (None: unbounded).
        n: number of samples behind the value.
        ci_low, ci_high, ci_method: 95 % interval and how it was made.
        error: why the metric failed; a failed metric is a row, never a gap.
    """

    metric: str
    model: str
    family: Family
    value: float | None
    direction: Direction
    split: str = ""
    unit: str = ""
    target: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    ci_method: str = ""
    censored: bool = False
    note: str = ""
    error: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """One model of an audit.

    Args:
        name: unique name, also the column title.
        role: its part in the comparison.
        hash: `state_hash` of the weights that were measured.
        source: folder, file, or how it was made.
        method: class name of the method that made it, empty for others.
        access: what the method read (`DataAccess.to_dict`).
        cost: ``seconds``, ``sample_passes`` (a forward counts 1, with backward 3),
            ``peak_memory_bytes``, ``retain_samples``; for unlearned and retrained models.
        details: method statistics, such as zero groups and the share of changed parameters.
    """

    name: str
    role: Role
    hash: str = ""
    source: str = ""
    method: str = ""
    access: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One statement that the verdict rests on, with what was compared and whether it held."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """The conclusion.

    Args:
        outcome: ``forgotten`` (all checks hold), ``not_forgotten``, ``damaged`` (forgotten, but the
            retained data suffered), ``not_discriminative`` (the audit cannot tell). Of memorized
            pictures: ``removed`` (none comes back, also not under an attack whose controls hold),
            ``hidden`` (the attack brings them back), ``present``, ``unattacked`` (none comes back,
            but the attack or its controls are missing), ``damaged``, ``not_discriminative``.
        sentence: one sentence with its evidence.
    """

    outcome: Outcome
    sentence: str


@dataclass
class Results:
    """Everything that one audit found. Serialises to `results.json`.

    Args:
        title: for people.
        goal: ``untraining`` or ``concept_removal``.
        requests: the requests in order, each `ForgetRequest.to_dict` (reports show sample ids as
            hash and count).
        data: name, hashes of the data and of the split, sizes per split, class names; of
            generators with ``kind: generator`` also prompts, sampler and judge; of memorized
            pictures with ``kind: memorization`` also sampler, similarity and thresholds.
        models: the measured models, the original first.
        metrics: one row per metric, model and split.
        checks: the self-checks of the audit and the checks behind the verdict.
        verdict: the conclusion.
        sequence: after each request one row per split:
            ``{"step": 1, "request": name, "split": "forget"|"retain"|"previous", "accuracy": float,
            "n": int}``; step 0 is the original model.
        curves: ``{"forgetting": [{"step", "epoch", "split", "accuracy"}], "relearning": [{"model",
            "learning_rate", "seed", "step", "accuracy"}], "embedding_attack": [{"model", "group",
            "kind", "init", "budget", "rate", "mean_similarity", "n"}]}``.
        class_accuracy: ``{model name: [accuracy per class]}`` on the test split.
        confusion: ``{model name: [share of predictions per class]}`` on the forgotten test images.
        examples: pictures, each ``{"kind": "forgotten"|"most_changed_retained", "id", "label",
            "image" (base64 PNG), "predictions": {model name: [class, probability]}}``; of
            generators ``{"kind": "target"|"preserved"|"unconditional", "prompt", "count",
            "images": {model name: base64 PNG of `count` pictures side by side}}``, where the same
            place in two strips is the same seed; of memorized pictures the kind is a split, and
            ``training`` (base64 PNG) and ``attacked`` ({model name: base64 PNG}) come besides; of
            multimodal language models ``{"kind": see `mmforget.audit.multimodal_examples.KINDS`,
            "id", "question", "right", "images" (base64 PNG), "answers": {model name: [text, whether
            it is right]}}``.
        not_measured: what was left out, each with its reason.
        not_claimed: what the report does not claim.
        provenance: versions, seeds, hashes, hardware, command.
        tuning: how hyper-parameters were chosen and how many settings were tried.
    """

    title: str
    goal: str
    requests: list[dict[str, Any]]
    data: dict[str, Any]
    models: list[ModelEntry]
    metrics: list[MetricResult]
    checks: list[Check]
    verdict: Verdict
    sequence: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    class_accuracy: dict[str, list[float | None]] = field(default_factory=dict)
    confusion: dict[str, list[float]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    not_claimed: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    tuning: str = ""
    warnings: list[str] = field(default_factory=list)

    def get(self, metric: str, model: str, split: str = "") -> MetricResult:
        """Find one row.

        Raises:
            KeyError: there is none.
        """
        for row in self.metrics:
            if (row.metric, row.model, row.split) == (metric, model, split):
                return row
        raise KeyError(f"no metric '{metric}' of model '{model}' on split '{split}'")

    def by_role(self, role: Role) -> list[ModelEntry]:
        """The models that play `role`, in order."""
        return [entry for entry in self.models if entry.role == role]

    def to_json(self) -> str:
        """Serialise; values that JSON does not know (NaN, infinities) are refused.

        Raises:
            ValueError: a value is not finite.
        """
        body = {"schema_version": SCHEMA_VERSION} | asdict(self)
        return json.dumps(body, indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Inverse of `to_json`.

        Raises:
            DataError: no results file, or one of a newer schema.
        """
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"the results are not valid JSON ({error}); run the audit again"
            ) from error
        version = body.pop("schema_version", None) if isinstance(body, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"the results have schema version {version}, this mmforget reads {SCHEMA_VERSION}; "
                "use the version that wrote them or run the audit again"
            )
        body["models"] = [_build(ModelEntry, row) for row in body["models"]]
        body["metrics"] = [_build(MetricResult, row) for row in body["metrics"]]
        body["checks"] = [_build(Check, row) for row in body["checks"]]
        body["verdict"] = _build(Verdict, body["verdict"])
        return _build(cls, body)

    @classmethod
    def load(cls, path: Path | str) -> Results:
        """Read a `results.json`, or the one in a run folder.

        Raises:
            MissingFileError: there is none.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingFileError(f"no results at '{path}'; give a run folder or a results.json")
        return cls.from_json(path.read_text(encoding="utf-8"))


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: an undefined value is written as null."""
    return float(value) if math.isfinite(value) else None


def _build(kind: type[Any], row: Mapping[str, Any]) -> Any:
    names = {entry.name for entry in fields(kind)}
    unknown = sorted(set(row) - names)
    if unknown:
        raise DataError(f"the results have unknown fields {unknown} in {kind.__name__}")
    return kind(**row)
