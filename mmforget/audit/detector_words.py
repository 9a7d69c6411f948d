"""What a detector's audit says beside its numbers: data, gaps, warnings, origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mmforget.audit.detector_scene import DetectorScene
from mmforget.audit.provenance import environment
from mmforget.audit.references import failed_rows, missing_references, untouched
from mmforget.audit.results import ModelEntry
from mmforget.audit.rows import Rows
from mmforget.data.split import holding

NOT_CLAIMED = [
    "No certificate of deletion: the evidence is bounded by the images and the attack that were "
    "run.",
    "Average precision ranks boxes and ignores how confident they are: a class with an average "
    "precision of 0 may still have boxes with low scores, and one with a high average precision "
    "may have no box above the score that a user works with.",
    "A box that says nothing is no proof that the network does not see the object: what is left "
    "inside is looked at only by relearning.",
    "Whoever has the original weights has what was forgotten.",
]


def describe(scene: DetectorScene) -> dict[str, Any]:
    """The section `data` of the results."""
    split, names = scene.split, scene.class_names
    return {
        "name": scene.data.dataset("test").name,
        "kind": "detection",
        "hash": split.data_hash,
        "split_hash": split.hash,
        "sizes": split.sizes(),
        "evaluated": {
            name: f"{len(part.data)} images, {part.count} objects"
            for name, part in scene.parts.items()
        },
        "class_names": list(names),
        "forget_classes": [names[index] for index in split.forget_classes],
        "previous_classes": [names[index] for index in split.previous_classes],
        "missing_classes": [names[index] for index in split.missing_classes],
        "score": scene.settings.score,
        "middle_side_of_objects_in_pixels": scene.middle,
    }


def not_measured(scene: DetectorScene, rows: Rows) -> list[str]:
    """What was left out, each with its reason."""
    missing = [
        "Membership: not run, an attack on detectors needs many retrained models",
        "Features: not compared, since two detectors match other queries to an object",
    ]
    missing += missing_references(scene)
    if not scene.forgotten_classes:
        missing.append("Relearning: it needs forgotten classes, the request names images")
    elif not scene.settings.relearning.steps:
        missing.append("Relearning: not run, so nothing inside was looked at")
    if not scene.settings.replicates:
        missing.append("Intervals of average precision: no replicates were asked for")
    return missing + failed_rows(rows)


def warnings(scene: DetectorScene, entries: Sequence[ModelEntry]) -> list[str]:
    """What a reader must know before the numbers."""
    found = untouched(entries)
    train: Any = scene.data.dataset("train")
    gone = scene.forgotten_classes
    if gone:
        mixed = holding(train.classes, gone) & holding(train.classes, scene.split.retain_classes)
        shared = int(mixed.sum())
        if getattr(scene.data, "mixed_images", "filter") == "filter" and shared:
            found.append(
                f"{shared} of {len(train)} training images hold forgotten and retained objects: in "
                "retained pictures the forgotten ones have no box, count as background, and help "
                "to forget; a method that reads retained data has seen them there"
            )
    few = [
        f"'{scene.class_names[index]}'"
        for index in gone
        if "test_forgotten" in scene.parts and 0 < _objects(scene, "test_forgotten", index) < 20
    ]
    if few:
        found.append(f"fewer than 20 test objects of {', '.join(few)}: their values are rough")
    found.append(
        "one training seed: intervals are over test images only and understate the spread over "
        "seeds"
    )
    return found


def _objects(scene: DetectorScene, split: str, index: int) -> int:
    return sum(
        int(((one["labels"] == index) & (one["iscrowd"] == 0)).sum())
        for one in scene.parts[split].objects
    )


def provenance(scene: DetectorScene, seconds: float, command: str) -> dict[str, Any]:
    """Versions, hardware, duration, and all settings of the audit."""
    settings = asdict(scene.settings)
    settings.pop("tuning")
    device = scene.by_role("original")[0].model.device
    return environment(device, seconds, command) | {
        "audit_settings": settings,
        "request_hashes": list(scene.split.request_hashes),
    }
