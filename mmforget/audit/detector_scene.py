"""The images of a detector's audit by role, and what every model finds in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mmforget.audit.detector_boxes import Fates, fates_of
from mmforget.audit.detector_intervals import Matched, match, precision_of_all, summarised
from mmforget.audit.detector_outputs import (
    Findings,
    find,
    middle_size,
    objects_of,
    role_classes,
)
from mmforget.audit.results import Role
from mmforget.audit.scene import AuditedModel
from mmforget.data.detection import DetectionDataModule, DetectionDataset
from mmforget.data.split import Stage, holding
from mmforget.metrics.average_precision import Precision
from mmforget.models.base import Model, state_hash
from mmforget.request import ForgetRequest

if TYPE_CHECKING:
    from mmforget.audit.detectors import DetectorAuditSettings

logger = logging.getLogger(__name__)

Predictions = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """The images that hold an object of some classes, with the boxes of these classes only.

    Attributes:
        stage: ``test``, or ``train`` where a request names images and leaves no test data.
        data: the images.
        classes: class indices.
        objects: per image what `mmforget.audit.detector_outputs.objects_of` gives.
    """

    stage: Stage
    data: DetectionDataset
    classes: tuple[int, ...]
    objects: list[dict[str, Tensor]]

    @property
    def count(self) -> int:
        """Number of objects, crowds left out."""
        return sum(int((one["iscrowd"] == 0).sum()) for one in self.objects)


class DetectorScene:
    """Everything that the metrics of one audit are functions of.

    Splits by name: ``test_forget``, ``test_retain``, ``test_previous``, ``test_missing``;
    ``test_forgotten`` is all that the models were asked to forget, by this and by earlier requests;
    ``test_retain_beside`` has the retained objects of images that also hold a forgotten one,
    ``test_retain_apart`` those of all other images. A request that names images has
    ``train_forget`` instead. Splits without an object are left out.

    Attributes:
        parts: by split.
        twin: by model the first one with the same weights, which is evaluated in its place.
        resampled: by model and split the average precisions of resampled images.

    Args:
        models: unique names, exactly one original.
        data: whose requests are set here.
        requests: in order.
        settings: see there.
    """

    def __init__(
        self,
        models: Sequence[AuditedModel],
        data: DetectionDataModule,
        requests: Sequence[ForgetRequest],
        settings: DetectorAuditSettings,
    ) -> None:
        self.models, self.data, self.settings = list(models), data, settings
        self.requests = list(requests)
        self.split = data.request(*requests)
        self.goal = requests[-1].goal
        self.class_names = self.split.class_names
        self.forgotten_classes = tuple(
            sorted((*self.split.previous_classes, *self.split.forget_classes))
        )
        self.test = self._dataset("test")
        self.middle = middle_size(self.test)
        self.parts = {name: part for name, part in self._parts().items() if part.count}
        first: dict[tuple[type, str], str] = {}
        self.twin = {
            one.entry.name: first.setdefault(
                (type(one.model), state_hash(one.model)), one.entry.name
            )
            for one in self.models
        }
        self._findings: dict[tuple[str, Stage], Findings] = {}
        self._precision: dict[tuple[str, str], Precision] = {}
        self._matched: dict[tuple[str, str], list[Matched]] = {}
        self._fates: dict[tuple[str, str], Fates] = {}
        self.resampled: dict[tuple[str, str], np.ndarray] = {}

    # ---- images -----------------------------------------------------------------------------

    def _dataset(self, stage: Stage) -> DetectionDataset:
        data = self.data.dataset(stage)
        assert isinstance(data, DetectionDataset)  # what a `DetectionDataModule` builds
        return data.subset(np.argsort(data.ids))  # no result depends on the order

    def _parts(self) -> dict[str, Part]:
        found: dict[str, Part] = {}
        for role in ("forget", "retain", "previous", "missing"):
            for stage in ("test", "train"):
                if stage == "train" and (role != "forget" or len(found["test_forget"].data)):
                    continue
                data = self.data.subset(stage, role, whole=True)  # type: ignore[arg-type]
                classes = (
                    self.split.missing_classes
                    if role == "missing"
                    else role_classes(self.data, role)
                )
                found[f"{stage}_{role}"] = self._part(stage, data, classes)  # type: ignore[arg-type]
        gone, kept = self.forgotten_classes, self.split.retain_classes
        if gone:
            found["test_forgotten"] = self._holding(gone, gone)
            beside = holding(self._held, gone)
            for name, chosen in (("beside", beside), ("apart", ~beside)):
                data = self.test.subset(np.flatnonzero(chosen & holding(self._held, kept)))
                part = self._part("test", data.showing(kept), tuple(kept))
                found[f"test_retain_{name}"] = part
        else:
            found["train_forgotten"] = found["train_forget"]
        return found

    @property
    def _held(self) -> np.ndarray:
        held = self.test.classes
        assert held is not None  # `DetectionDataset.classes` is None without labels only
        return held

    def _holding(self, wanted: Sequence[int], shown: Sequence[int]) -> Part:
        data = self.test.subset(np.flatnonzero(holding(self._held, wanted)))
        return self._part("test", data.showing(shown), tuple(shown))

    def _part(self, stage: Stage, data: DetectionDataset, classes: Sequence[int]) -> Part:
        data = data.subset(np.argsort(data.ids))
        return Part(stage, data, tuple(classes), objects_of(data))

    def has(self, split: str) -> bool:
        """Whether a split has objects."""
        return split in self.parts

    def seen(self, name: str) -> str:
        """``test_<name>``, or ``train_<name>`` where the request leaves no test data of it."""
        return f"test_{name}" if self.has(f"test_{name}") else f"train_{name}"

    # ---- models -----------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all models, in order."""
        return [one.entry.name for one in self.models]

    @property
    def distinct(self) -> list[AuditedModel]:
        """The models without those that have the weights of an earlier one (see `twin`)."""
        return [one for one in self.models if self.twin[one.entry.name] == one.entry.name]

    def by_role(self, role: Role) -> list[AuditedModel]:
        """The models that play a role, in order."""
        return [one for one in self.models if one.entry.role == role]

    @cached_property
    def original(self) -> str:
        """Name of the original model."""
        return self.by_role("original")[0].entry.name

    @cached_property
    def retrained(self) -> list[str]:
        """Names of the retrained models, without those that were held out."""
        return [one.entry.name for one in self.by_role("retrained")]

    def references(self, model: str) -> list[str]:
        """The retrained models that a model is compared with: all but itself."""
        return [name for name in self.retrained if name != model]

    # ---- what they find -----------------------------------------------------------------------

    def run(self) -> None:
        """Run every model once over the test images, and over named training images."""
        named = [part.data for part in self.parts.values() if part.stage == "train"]
        for one in self.distinct:
            name = one.entry.name
            logger.info("evaluating '%s' on %d test images", name, len(self.test))
            self._findings[name, "test"] = find(one.model, self.test, self.settings.batch_size)
            if named:
                self._findings[name, "train"] = find(one.model, named[0], self.settings.batch_size)

    def predictions(self, model: str, split: str = "test") -> Predictions:
        """What a model finds in the images of a split, or in all test images."""
        own = self.twin[model]
        if split == "test":
            return self._findings[own, "test"].of(self.test.ids)
        part = self.parts[split]
        return self._findings[own, part.stage].of(part.data.ids)

    def precision(self, model: str, split: str) -> Precision:
        """Average precision of a model on a split; by size only on retained objects."""
        key = (self.twin[model], split)
        if key not in self._precision:
            part = self.parts[split]
            self._precision[key] = summarised(
                self.predictions(model, split),
                part.objects,
                part.classes,
                self.matched(model, split),
                self.middle if split.endswith("_retain") else None,
            )
        return self._precision[key]

    def matched(self, model: str, split: str) -> list[Matched]:
        """The matched boxes of a model on a split, per class."""
        key = (self.twin[model], split)
        if key not in self._matched:
            part = self.parts[split]
            found = self.predictions(model, split)
            self._matched[key] = match(found, part.objects, part.classes)
        return self._matched[key]

    def fates(self, model: str, split: str) -> Fates:
        """What a model makes of the objects of a split."""
        key = (self.twin[model], split)
        if key not in self._fates:
            found = self.predictions(model, split)
            self._fates[key] = fates_of(found, self.parts[split].objects)
        return self._fates[key]

    def precision_before(self, model: Model, split: str) -> float | None:
        """Average precision of a model that is no column of this audit."""
        part = self.parts[split]
        findings = find(model, part.data, self.settings.batch_size)
        value = precision_of_all(match(findings.of(part.data.ids), part.objects, part.classes))
        return None if np.isnan(value) else value
