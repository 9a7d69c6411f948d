"""Geometry of the charts. The templates draw them as inline SVG and HTML, coloured by CSS.

Lines are drawn in a box of 100 x 100 units that the page stretches to any width, while all text is
HTML beside it: so letters keep their size on a phone and in print, and colours follow the dark mode.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmforget.audit.results import MetricResult, Results
from mmforget.report.content import (
    class_name,
    forgotten_classes,
    percent,
    split_text,
    title_of,
    with_unit,
)
from mmforget.report.words import SPLIT_ROLES

MAX_CLASSES = 24
MAX_CONFUSED = 12
DASHES = ("", "5 3", "1.5 3", "8 3 1.5 3")


@dataclass(frozen=True)
class Series:
    """One line: its `style` names the CSS colour, `dash` tells lines of one colour apart."""

    name: str
    style: str
    dash: str
    path: str
    dots: str


@dataclass(frozen=True)
class LineChart:
    """Lines of accuracy from 0 to 100 %. Ticks are (position in percent, text)."""

    caption: str
    x_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    borders: tuple[float, ...] = ()


@dataclass(frozen=True)
class Mark:
    """One value on a track: CSS `style`, position in percent, and what it is."""

    style: str
    position: float
    text: str


@dataclass(frozen=True)
class Track:
    """One labelled horizontal scale with marks; `marked` tells forgotten classes."""

    label: str
    marks: tuple[Mark, ...]
    summary: str
    low: str = ""
    high: str = ""
    marked: bool = False


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f},{100 - 100 * y:.2f}" for x, y in points)


def _dots(points: Sequence[tuple[float, float]]) -> str:
    # a line of no length with round ends is a dot that does not become an ellipse when stretched
    return "".join(f"M{x:.2f},{100 - 100 * y:.2f}h0" for x, y in points)


def forgetting_chart(results: Results) -> LineChart | None:
    """Accuracy per split over the epochs of each request, one panel section per request."""
    rows = results.curves.get("forgetting", [])
    if not rows:
        return None
    steps = sorted({row["step"] for row in rows})
    width = 100 / len(steps)
    epochs = {step: [row["epoch"] for row in rows if row["step"] == step] for step in steps}
    lines: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["step"], row["epoch"])):
        found = epochs[row["step"]]
        span = max(found) - min(found)
        share = (row["epoch"] - min(found)) / span if span else 0.5
        x = width * (steps.index(row["step"]) + 0.03 + 0.94 * share)
        lines[row["split"]][row["step"]].append((x, row["accuracy"]))
    order = [split for split in SPLIT_ROLES if split in lines]
    order += [split for split in lines if split not in order]
    series = tuple(
        Series(
            split_text(split) if split not in SPLIT_ROLES else SPLIT_ROLES[split],
            f"split-{split}",
            DASHES[order.index(split) % len(DASHES)],
            "".join(_path(points) for points in lines[split].values()),
            "".join(_dots(points) for points in lines[split].values()),
        )
        for split in order
    )
    names = {row["step"]: str(row["request"]) for row in results.sequence}
    ticks = tuple(
        (
            width * (steps.index(step) + 0.5),
            f"{names.get(step, f'request {step}')}, epochs {min(found)} to {max(found)}",
        )
        for step, found in epochs.items()
    )
    return LineChart(
        "Accuracy while forgetting",
        "",
        series,
        ticks,
        tuple(width * number for number in range(1, len(steps))),
    )


def relearning_chart(results: Results) -> LineChart | None:
    """Accuracy on the forgotten data while each model is taught again, at its worst learning rate.

    The worst rate is the one with the highest mean over seeds and steps: the attacker chooses.
    """
    runs: dict[str, dict[float, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in results.curves.get("relearning", []):
        runs[row["model"]][row["learning_rate"]][row["step"]].append(row["accuracy"])
    last = max((step for rates in runs.values() for r in rates.values() for step in r), default=0)
    if not last:
        return None
    series = []
    styles: dict[str, int] = defaultdict(int)
    for entry in results.models:
        if entry.name not in runs:
            continue
        means = {
            rate: {step: statistics.fmean(values) for step, values in sorted(steps.items())}
            for rate, steps in runs[entry.name].items()
        }
        rate = max(means, key=lambda rate: statistics.fmean(means[rate].values()))
        points = [(100 * step / last, value) for step, value in means[rate].items()]
        dash = DASHES[styles[entry.role] % len(DASHES)]
        styles[entry.role] += 1
        name = f"{entry.name} (rate {rate:g})"
        series.append(Series(name, f"role-{entry.role}", dash, _path(points), ""))
    ticks = tuple((100 * part / 4, f"{round(last * part / 4)}") for part in range(5))
    return LineChart(
        "Relearning: accuracy on forgotten data while the model is taught again",
        "steps of training on forgotten images",
        tuple(series),
        ticks,
    )


def _pooled(results: Results, table: dict[str, list[Any]], index: int) -> list[Mark]:
    """Marks of original, unlearned and the mean of the retrained models for one class."""
    marks = []
    for role in ("original", "retrained", "unlearned"):
        names = [entry.name for entry in results.by_role(role) if entry.name in table]
        if role == "retrained":
            known = [table[name][index] for name in names if table[name][index] is not None]
            found = [(f"retrained, mean of {len(known)}", statistics.fmean(known))] if known else []
        else:
            found = [(n, table[n][index]) for n in names if table[n][index] is not None]
        marks += [
            Mark(f"role-{role}", 100 * value, f"{name}: {percent(value)}") for name, value in found
        ]
    return marks


def class_tracks(results: Results) -> tuple[list[Track], str]:
    """Accuracy per class before, after and of the retrained models, and a remark on what is left out.

    With many classes only the forgotten and the most changed ones are shown.
    """
    table = results.class_accuracy
    if not table:
        return [], ""
    forgotten = forgotten_classes(results)
    tracks = []
    for index in range(len(next(iter(table.values())))):
        name = class_name(results, index)
        marks = tuple(_pooled(results, table, index))
        if marks:
            tracks.append(Track(name, marks, _summary(marks), marked=name in forgotten))
    if len(tracks) <= MAX_CLASSES:
        return tracks, ""
    change = {t.label: max(m.position for m in t.marks) - min(m.position for m in t.marks)
              for t in tracks}
    ranked = sorted(tracks, key=lambda t: (not t.marked, -change[t.label]))
    chosen = {track.label for track in ranked[:MAX_CLASSES]}
    remark = f"{len(tracks) - MAX_CLASSES} classes with smaller differences are in results.json."
    return [track for track in tracks if track.label in chosen], remark


def confusion_tracks(results: Results) -> tuple[list[Track], str]:
    """What the forgotten test images are taken for, most frequent first."""
    table = results.confusion
    if not table:
        return [], ""
    forgotten = forgotten_classes(results)
    tracks = []
    for index in range(len(next(iter(table.values())))):
        name = class_name(results, index)
        marks = tuple(_pooled(results, table, index))
        if any(mark.position >= 0.05 for mark in marks):
            tracks.append(Track(name, marks, _summary(marks), marked=name in forgotten))
    tracks.sort(key=lambda track: -max(m.position for m in track.marks if m.style != "role-original")
                if any(m.style != "role-original" for m in track.marks) else 0)
    rest = len(tracks) - MAX_CONFUSED
    remark = f"{rest} rarer classes are in results.json." if rest > 0 else ""
    return tracks[:MAX_CONFUSED], remark


def _summary(marks: Sequence[Mark]) -> str:
    values = {mark.style: mark.text.rsplit(": ", 1)[1] for mark in marks}
    parts = [values[s] for s in ("role-original", "role-unlearned") if s in values]
    return " → ".join(parts)


def attack_tracks(results: Results) -> list[Track]:
    """Where every model lies on the scale of each privacy, representation and relearning metric."""
    groups: dict[tuple[str, str], list[MetricResult]] = defaultdict(list)
    for row in results.metrics:
        if row.family in ("privacy", "representation", "relearning") and row.value is not None:
            groups[row.metric, row.split].append(row)
    roles = {entry.name: entry.role for entry in results.models}
    # later marks cover earlier ones: the unlearned model comes last
    order = ("random_init", "control", "original", "held_out", "retrained", "unlearned")
    tracks = []
    for (metric, split), rows in groups.items():
        values = [row.value for row in rows if row.value is not None]
        low = rows[0].low if rows[0].low is not None else min(0.0, *values)
        high = rows[0].high if rows[0].high is not None else max(values)
        if high <= low:
            continue
        marks = sorted(
            (
                Mark(
                    f"role-{roles[row.model]}",
                    min(100.0, max(0.0, 100 * (row.value - low) / (high - low))),
                    f"{row.model}: {'> ' if row.censored else ''}{with_unit(row, row.value)}",
                )
                for row in rows
                if row.value is not None and row.model in roles
            ),
            key=lambda mark: order.index(mark.style.removeprefix("role-")),  # type: ignore[arg-type]
        )
        label = title_of(metric) + (f" ({split_text(split)})" if split else "")
        tracks.append(
            Track(label, tuple(marks), "", with_unit(rows[0], low), with_unit(rows[0], high))
        )
    return tracks


@dataclass(frozen=True)
class Picture:
    """One image with what each model takes it for: (model, role, class, probability, changed)."""

    image: str
    label: str
    predictions: tuple[tuple[str, str, str, str, bool], ...]


def pictures(results: Results, kind: str) -> list[Picture]:
    """The example images of one kind, in the order of the results, without their sample ids."""
    roles = {entry.name: entry.role for entry in results.models}
    first = results.models[0].name if results.models else ""
    found = []
    for example in results.examples:
        if example["kind"] != kind:
            continue
        predictions = example["predictions"]
        before = predictions.get(first, [None])[0]
        found.append(
            Picture(
                example["image"],
                class_name(results, example["label"]),
                tuple(
                    (
                        model,
                        roles.get(model, ""),
                        class_name(results, predicted),
                        f"{100 * probability:.0f}\u2009%",
                        predicted != before,
                    )
                    for model, (predicted, probability) in predictions.items()
                ),
            )
        )
    return found


def prediction_rows(found: Sequence[Picture]) -> list[list[str]]:
    """The predictions of a gallery as a table: the class shown, then one cell per model."""
    return [
        [picture.label, *(f"{name} ({share})" for _, _, name, share, _ in picture.predictions)]
        for picture in found
    ]
