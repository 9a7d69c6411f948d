"""The measurements of a detector's audit: average precision, fates of objects, relearning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mmforget.attacks.detector_relearning import (
    DetectorCurve,
    detector_curve_rows,
    draw_box_shots,
    relearn_detector,
    strongest,
)
from mmforget.audit.detector_boxes import NOTHING, boxes_of
from mmforget.audit.detector_intervals import (
    match,
    percentile_interval,
    precision_of_all,
    resampled_precision,
)
from mmforget.audit.detector_outputs import find
from mmforget.audit.detector_scene import DetectorScene, Part
from mmforget.audit.intervals import bootstrap_mean, wilson
from mmforget.audit.results import Direction, Family
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import draw
from mmforget.metrics.average_precision import SIZES
from mmforget.metrics.summary import h_mean
from mmforget.models.base import Model

logger = logging.getLogger(__name__)

ROLES = ("forget", "previous", "retain", "missing")
FEW_CLASSES = 20
"""Up to so many classes, each has rows of its own; of more, only the forgotten ones have."""


def measure_detections(scene: DetectorScene, rows: Rows, before: Model | None) -> None:
    """Add all rows that are functions of what was found.

    Args:
        scene: evaluated.
        rows: where to.
        before: the model before the last request, if there was an earlier one.
    """
    for name in scene.names:
        logger.info("average precision of '%s'", name)
        for role in ROLES:
            split = scene.seen(role)
            if scene.has(split):
                _precision(scene, rows, name, split)
        _joint(scene, rows, name)
        _drops(scene, rows, name)
        _fates(scene, rows, name)
    _summaries(scene, rows, before)


def _kind(scene: DetectorScene, split: str) -> tuple[Family, Direction]:
    if "retain" in split or "missing" in split:
        return "utility", "higher"
    return "forgetting", "closer_to_retrained" if scene.retrained else "lower"


def _replicates(scene: DetectorScene, name: str, split: str) -> np.ndarray:
    """(R,) average precisions of resampled images; the same images for every model."""
    settings, key = scene.settings, (scene.twin[name], split)
    if key not in scene.resampled:
        scene.resampled[key] = (
            resampled_precision(
                scene.matched(name, split), settings.replicates, settings.seed, f"precision/{split}"
            )
            if settings.replicates
            else np.zeros(0)
        )
    return scene.resampled[key]


def _precision(scene: DetectorScene, rows: Rows, name: str, split: str) -> None:
    family, direction = _kind(scene, split)
    part, stage = scene.parts[split], split.partition("_")[0]

    def add(metric: str, where: str, value: Callable[[], Measured]) -> None:
        rows.add(metric, name, where, value, family=family, direction=direction)

    def whole() -> Measured:
        found = scene.precision(name, split)
        return Measured(
            found.value,
            percentile_interval(_replicates(scene, name, split)),
            found.objects,
            details={"images": len(part.data)},
        )

    add("average_precision", split, whole)
    add(
        "average_precision_50",
        split,
        lambda: Measured(scene.precision(name, split).at_50, None, part.count),
    )
    if stage == "test" and not split.endswith("_missing"):
        for index in part.classes:
            if len(scene.class_names) <= FEW_CLASSES or index in scene.forgotten_classes:
                add(
                    "average_precision",
                    f"{stage}_class_{scene.class_names[index]}",
                    partial(_of_class, scene, name, split, index),
                )
    if split.endswith("_retain"):
        for size in SIZES:
            if size in scene.precision(scene.original, split).by_size:
                add(
                    "average_precision",
                    f"{split}_{size}",
                    partial(_of_size, scene, name, split, size),
                )


def _of_class(scene: DetectorScene, name: str, split: str, index: int) -> Measured:
    value = scene.precision(name, split).by_class.get(index)
    if value is None:
        return Measured(None, note="no objects")
    one = scene.parts[split]
    labels = [int(((o["labels"] == index) & (o["iscrowd"] == 0)).sum()) for o in one.objects]
    return Measured(value, None, sum(labels))


def _of_size(scene: DetectorScene, name: str, split: str, size: str) -> Measured:
    return Measured(scene.precision(name, split).by_size.get(size))


def _joint(scene: DetectorScene, rows: Rows, name: str) -> None:
    """Everything forgotten together, and retained objects beside and apart from it."""

    def measured(split: str) -> Measured:
        interval = percentile_interval(_replicates(scene, name, split))
        value = precision_of_all(scene.matched(name, split))
        return Measured(value, interval, scene.parts[split].count)

    if scene.has("test_previous") and scene.has("test_forgotten"):
        rows.add(
            "average_precision",
            name,
            "test_forgotten",
            lambda: measured("test_forgotten"),
            direction=_kind(scene, "forgotten")[1],
            family="forgetting",
        )
    for split in ("test_retain_beside", "test_retain_apart"):
        if scene.has(split):
            rows.add(
                "neighbour_average_precision",
                name,
                split,
                lambda s=split: measured(s),  # type: ignore[misc]
            )


def class_drops(scene: DetectorScene, name: str, reference: str) -> dict[int, float]:
    """Average precision of each retained class lost against another model."""
    own, first = (scene.precision(model, "test_retain").by_class for model in (name, reference))
    return {index: first[index] - own[index] for index in own if index in first}


def _drops(scene: DetectorScene, rows: Rows, name: str) -> None:
    if not scene.has("test_retain"):
        return

    def drop() -> Measured:
        values = [scene.precision(m, "test_retain").value for m in (scene.original, name)]
        assert values[0] is not None and values[1] is not None  # the split has objects
        pair = [_replicates(scene, m, "test_retain") for m in (scene.original, name)]
        interval = percentile_interval(pair[0] - pair[1])
        return Measured(values[0] - values[1], interval, scene.parts["test_retain"].count)

    def worst() -> Measured:
        lost = class_drops(scene, name, scene.original)
        index = max(lost, key=lambda i: lost[i])
        return Measured(
            lost[index],
            n=_of_class(scene, name, "test_retain", index).n,
            note=scene.class_names[index],
            details={"class": scene.class_names[index]},
        )

    rows.add("average_precision_drop", name, "test_retain", drop)
    rows.add("worst_class_precision_drop", name, "test_retain", worst)


def _fates(scene: DetectorScene, rows: Rows, name: str) -> None:
    score = scene.settings.score
    gone = scene.seen("forgotten")
    for split in (gone, "test_retain"):
        if scene.has(split):
            family, direction = _kind(scene, split)
            rows.add(
                "found_rate",
                name,
                split,
                lambda s=split: _share(scene.fates(name, s).found(score)),  # type: ignore[misc]
                family=family,
                direction=direction,
            )
    if scene.has(gone):
        rows.add("moved_rate", name, gone, lambda: _moved(scene, name, gone))
        rows.add(
            "vanished_rate", name, gone, lambda: _share(scene.fates(name, gone).vanished(score))
        )
    if scene.forgotten_classes:

        def false() -> Measured:
            found = boxes_of(scene.predictions(name), scene.forgotten_classes, score)
            interval = bootstrap_mean(found, scene.settings.seed, "false-boxes")
            return Measured(float(found.mean()), interval, len(found), found)

        rows.add("false_boxes", name, "test", false)


def _share(hits: np.ndarray) -> Measured:
    values = hits.astype(np.float64)
    interval = wilson(int(hits.sum()), len(hits))
    return Measured(float(values.mean()), interval, len(hits), values)


def _moved(scene: DetectorScene, name: str, split: str) -> Measured:
    fates, score = scene.fates(name, split), scene.settings.score
    moved = fates.moved(score)
    found = _share(moved)
    kinds, counts = np.unique(fates.other_class[moved], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    found.details["taken_for"] = {
        scene.class_names[int(kinds[i])]: int(counts[i]) for i in order.tolist()
    }
    return found


def confusion(scene: DetectorScene) -> dict[str, list[float]]:
    """What the forgotten objects are taken for: share per class; the rest have no box."""
    split, score = scene.seen("forgotten"), scene.settings.score
    if not scene.has(split):
        return {}
    found = {}
    for name in scene.names:
        named = scene.fates(name, split).named(score)
        counts = np.bincount(named[named != NOTHING], minlength=len(scene.class_names))
        found[name] = (counts / len(named)).tolist()
    return found


def class_precision(scene: DetectorScene) -> dict[str, list[float | None]]:
    """Average precision of every class, None for a class without objects."""
    found = {}
    for name in scene.names:
        values: list[float | None] = [None] * len(scene.class_names)
        for role in ("retain", "previous", "forget"):
            split = f"test_{role}"
            if scene.has(split):
                for index, value in scene.precision(name, split).by_class.items():
                    values[index] = value
        found[name] = values
    return found


def _summaries(scene: DetectorScene, rows: Rows, before: Model | None) -> None:
    forget = scene.seen("forget")
    if not (scene.has(forget) and scene.has("test_retain")):
        return

    def summary(name: str, start: float | None) -> Measured:
        own = scene.precision(name, forget)
        kept = scene.precision(name, "test_retain").value
        assert own.value is not None and kept is not None and start is not None
        return Measured(h_mean(kept, start, own.value), n=own.objects)

    previous = None if before is None else scene.precision_before(before, forget)
    for name in scene.names:
        if name == scene.original:
            continue
        first = scene.precision(scene.original, forget).value
        rows.add("h_mean", name, forget, lambda n=name, s=first: summary(n, s))  # type: ignore[misc]
        if previous is not None:
            rows.add(
                "h_mean_previous",
                name,
                forget,
                lambda n=name: summary(n, previous),  # type: ignore[misc]
            )


# ---- relearning ---------------------------------------------------------------------------------


def measure_box_relearning(scene: DetectorScene, rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Attack every model and add the rows.

    Returns:
        Curves for `Results.curves`.
    """
    settings, seed = scene.settings.relearning, scene.settings.seed
    gone = scene.forgotten_classes
    if not settings.steps or not gone or not scene.has("test_forgotten"):
        return {}
    train: Any = scene.data.dataset("train")
    train = train.subset(np.argsort(train.ids))
    drawn = draw_box_shots(train.classes, gone, settings.shots, seed)
    shots = (train if settings.boxes == "all" else train.showing(gone))[drawn.tolist()]
    judged = {
        split: _some(scene.parts[split], settings.evaluation_images, seed, split)
        for split in ("test_forgotten", "test_retain")
    }

    def precision(split: str, model: Model) -> float:
        part = judged[split]
        findings = find(model, part.data, scene.settings.batch_size)
        return precision_of_all(match(findings.of(part.data.ids), part.objects, part.classes))

    found: dict[str, list[DetectorCurve]] = {}
    problems: dict[str, Exception] = {}
    for one in scene.distinct:
        name = one.entry.name
        logger.info("relearning attack on '%s'", name)
        try:
            found[name] = relearn_detector(
                one.model,
                shots,
                lambda m: precision("test_forgotten", m),
                lambda m: precision("test_retain", m),
                settings,
                seed,
            )
        except Exception as problem:  # becomes the error of this model's row
            problems[name] = problem

    def outcome(name: str) -> Measured:
        own = scene.twin[name]
        if own in problems:
            raise problems[own]
        best = strongest(found[own])
        note = f"retained {100 * best.retained:.1f} %"  # short enough for a column
        if best.diverged:
            note += "; diverged"
        return Measured(
            best.precision[-1],
            n=judged["test_forgotten"].count,
            note=note,
            details={
                "steps": settings.steps,
                "shots": len(drawn),
                "learning_rate": best.learning_rate,
                "layers": best.layers,
                "start": best.precision[0],
                "retained": best.retained,
            },
        )

    for name in scene.names:
        rows.add(
            "relearn_average_precision",
            name,
            "test_forgotten",
            lambda n=name: outcome(n),  # type: ignore[misc]
        )
    return {
        key: [
            row
            for name in scene.names
            for row in detector_curve_rows(
                [one for one in found.get(scene.twin[name], []) if one.layers == layers], name
            )
        ]
        for key, layers in (("relearning", "all"), ("relearning_head", "head"))
    }


def _some(part: Part, count: int, seed: int, split: str) -> Part:
    """A random part of the images of a split, which takes less time."""
    chosen = draw(len(part.data), count, seed, f"relearning/{split}")
    data = part.data.subset(chosen)
    return Part(part.stage, data, part.classes, [part.objects[i] for i in chosen.tolist()])
