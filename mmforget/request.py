"""What somebody asks a model to forget."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mmforget.concept import ConceptSpec, check_together
from mmforget.errors import RequestError, suggest

Goal = Literal["untraining", "concept_removal"]


@dataclass(frozen=True)
class ForgetRequest:
    """One erasure request: classes, single samples, or concepts that a model shall forget.

    Args:
        classes: class names or class indices. Class ids are never renumbered and the output layer
            keeps all its outputs; a forgotten class is one that the model no longer predicts.
        samples: stable ids of training samples (see `mmforget.data.ImageDataset.ids`).
        goal: ``untraining`` removes the influence of the data, its reference is the retrained
            model; ``concept_removal`` removes the ability itself, and is the goal of every request
            that names concepts.
        name: a label for reports and file names; derived from the content if empty.
        reason: why it was asked, kept in the ledger as it is written here.
        concepts: what a text-conditioned model shall no longer draw.

    Raises:
        RequestError: nothing is named, several of classes, samples and concepts are named, one is
            named twice, or concepts contradict each other.

    Example:
        >>> ForgetRequest(classes=("3", 8)).name
        'forget-3-8'
    """

    classes: tuple[str | int, ...] = ()
    samples: tuple[int, ...] = ()
    goal: Goal = "untraining"
    name: str = ""
    reason: str = ""
    concepts: tuple[ConceptSpec, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "samples", tuple(self.samples))
        object.__setattr__(self, "concepts", tuple(map(_concept, self.concepts)))
        named = [key for key in ("classes", "samples", "concepts") if getattr(self, key)]
        if len(named) != 1:
            listed = " and ".join(f"`{key}`" for key in named)
            got = f"got both {listed}" if named else "got neither"
            raise RequestError(
                f"`request` needs either `classes` or `samples` or `concepts`, {got}; "
                "name what shall be forgotten"
            )
        if self.concepts:
            check_together(self.concepts)
            object.__setattr__(self, "goal", "concept_removal")
        for field, values in (("classes", self.classes), ("samples", self.samples)):
            doubled = sorted({str(v) for v in values if values.count(v) > 1})  # type: ignore[arg-type]
            if doubled:
                raise RequestError(f"`request.{field}` names {', '.join(doubled)} more than once")
        if self.goal not in ("untraining", "concept_removal"):
            raise RequestError(
                f"`request.goal` is '{self.goal}', "
                + suggest(self.goal, ("untraining", "concept_removal"))
            )
        if not self.name:
            object.__setattr__(self, "name", self._default_name())

    def _default_name(self) -> str:
        if self.concepts:
            text = "-".join(slug(concept.target) for concept in self.concepts)
            return f"erase-{text}" if len(text) <= 40 else f"erase-{len(self.concepts)}-concepts"
        if self.classes:
            text = "-".join(str(value) for value in self.classes)
            return f"forget-{text}" if len(text) <= 40 else f"forget-{len(self.classes)}-classes"
        return f"forget-{len(self.samples)}-samples"

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of the request."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML; `concepts` only where there are any."""
        data = asdict(self) | {"classes": list(self.classes), "samples": list(self.samples)}
        del data["concepts"]  # so that the hash of other requests stays what it was
        if self.concepts:
            data["concepts"] = [concept.to_dict() for concept in self.concepts]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ForgetRequest:
        """Inverse of `to_dict`.

        Raises:
            RequestError: an unknown field.
        """
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise RequestError(f"`request` has no field '{key}'; {suggest(key, known)}")
        return cls(**data)


def slug(text: str) -> str:
    """A text as a part of a file name: ASCII letters, digits and dashes, never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40]
    return name or f"concept-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _concept(given: ConceptSpec | Mapping[str, Any]) -> ConceptSpec:
    return given if isinstance(given, ConceptSpec) else ConceptSpec.from_dict(given)
