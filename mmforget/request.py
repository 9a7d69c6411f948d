"""What somebody asks a model to forget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mmforget.errors import RequestError, suggest

Goal = Literal["untraining", "concept_removal"]


@dataclass(frozen=True)
class ForgetRequest:
    """One erasure request: classes, or single samples, that a model shall forget.

    Args:
        classes: class names or class indices. Class ids are never renumbered and the output layer
            keeps all its outputs; a forgotten class is one that the model no longer predicts.
        samples: stable ids of training samples (see `mmforget.data.ImageDataset.ids`).
        goal: ``untraining`` removes the influence of the data, its reference is the retrained
            model; ``concept_removal`` removes the ability itself.
        name: a label for reports and file names; derived from the content if empty.
        reason: why it was asked, kept in the ledger as it is written here.

    Raises:
        RequestError: nothing is named, both classes and samples are named, or one is named twice.

    Example:
        >>> ForgetRequest(classes=("3", 8)).name
        'forget-3-8'
    """

    classes: tuple[str | int, ...] = ()
    samples: tuple[int, ...] = ()
    goal: Goal = "untraining"
    name: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "samples", tuple(self.samples))
        if bool(self.classes) == bool(self.samples):
            raise RequestError(
                "`request` needs either `classes` or `samples`, "
                f"got {'both' if self.classes else 'neither'}; name what shall be forgotten"
            )
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
        if self.classes:
            text = "-".join(str(value) for value in self.classes)
            return f"forget-{text}" if len(text) <= 40 else f"forget-{len(self.classes)}-classes"
        return f"forget-{len(self.samples)}-samples"

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of the request."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        data = asdict(self)
        return data | {"classes": list(self.classes), "samples": list(self.samples)}

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
