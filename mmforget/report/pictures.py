"""Geometry of the charts. The templates draw them as inline SVG and HTML, coloured by CSS.

Lines are drawn in a box of 100 x 100 units that the page stretches to any width, while all text is
HTML beside it: so letters keep their size on a phone and in print, and colours follow dark mode.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmforget.audit.results import MetricResult, Results, Role
from mmforget.report.content import (
    class_name,
    forgotten_classes,
    number,
    percent,
    split_text,
    title_of,
    with_unit,
)
from mmforget.report.words import SPLIT_ROLES, is_detection, measure

MAX_CLASSES = 24
MAX_CONFUSED = 12
DRAWN = ("random_init", "control", "original", "held_out", "retrained", "unlearned")
COMPARED: tuple[Role, ...] = ("original", "retrained", "unlearned")
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

    @property
    def drawn(self) -> list[Series]:
        """The lines in the order of drawing: the unlearned model covers the rest."""
        return sorted(self.series, key=lambda line: _layer(line.style))


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


def _layer(style: str) -> int:
    role = style.removeprefix("role-")
    return DRAWN.index(role) if role in DRAWN else 0


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
        f"{measure(results).capitalize()} while forgetting",
        "",
        series,
        ticks,
        tuple(width * number for number in range(1, len(steps))),
    )


def relearning_chart(results: Results, key: str) -> LineChart | None:
    """Accuracy on the forgotten data while each model is taught again.

    The attacker chooses the learning rate: of every seed the curve with the largest mean counts.
    Lines are means over seeds.

    Args:
        results: with curves.
        key: ``relearning`` (all layers) or ``relearning_head`` (the last layer).
    """
    runs: dict[str, dict[tuple[int, float], list[tuple[int, float]]]] = {}
    for row in results.curves.get(key, []):
        run = runs.setdefault(row["model"], {}).setdefault((row["seed"], row["learning_rate"]), [])
        run.append((row["step"], row["accuracy"]))
    last = max(
        (step for found in runs.values() for run in found.values() for step, _ in run), default=0
    )
    if not last:
        return None
    series = []
    styles: dict[str, int] = defaultdict(int)
    for entry in results.models:
        if entry.name not in runs:
            continue
        best: dict[int, list[tuple[int, float]]] = {}
        for (seed, _), run in runs[entry.name].items():
            if seed not in best or _mean(run) > _mean(best[seed]):
                best[seed] = run
        values: dict[int, list[float]] = defaultdict(list)
        for run in best.values():
            for step, accuracy in run:
                values[step].append(accuracy)
        points = [(100 * step / last, statistics.fmean(found)) for step, found in values.items()]
        dash = DASHES[styles[entry.role] % len(DASHES)]
        styles[entry.role] += 1
        series.append(Series(entry.name, f"role-{entry.role}", dash, _path(sorted(points)), ""))
    ticks = tuple((100 * part / 2, number(round(last * part / 2))) for part in range(3))
    layers = "all layers" if key == "relearning" else "last layer only"
    title = f"Relearning the forgotten data, {layers}"
    if is_detection(results):
        title = "Average precision while relearning the forgotten classes"
    return LineChart(title, "steps of the attack", tuple(series), ticks)


ATTACK_GROUPS = {
    "memorized": ("memorized pictures", "unlearned"),
    "held_out": ("held-out memories", "held_out"),
    "original": ("memorized pictures, original model", "original"),
    "control": ("pictures that nobody was trained on", "control"),
    "ordinary": ("other ordinary pictures", ""),
}
"""Group of pictures under attack: its name, and the role whose colour its line has, if it has one.
"""


def attack_charts(results: Results) -> list[LineChart]:
    """What an embedding search brings back after how many steps, per model and kind of memory.

    The lines of the original model stand beside those of each unlearned one. Steps are drawn at
    equal distances, since the first ones matter most.
    """
    rows = [row for row in results.curves.get("embedding_attack", []) if row["rate"] is not None]
    budgets = sorted({row["budget"] for row in rows})
    if len(budgets) < 2:
        return []
    place = {budget: 100 * i / (len(budgets) - 1) for i, budget in enumerate(budgets)}
    inits = list(dict.fromkeys(row["init"] for row in rows))
    first = results.by_role("original")[0].name
    charts = []
    for entry in results.by_role("unlearned"):
        own = [row for row in rows if row["model"] == entry.name]
        # the original's own curve, under the name that it has beside another model
        before = [
            row | {"group": "original"}
            for row in rows
            if row["model"] == first and row["group"] == "memorized"
        ]
        for kind in dict.fromkeys(row["kind"] for row in own if row["group"] == "memorized"):
            series = []
            for group, (title, role) in ATTACK_GROUPS.items():
                for init in inits if role else ():
                    points = sorted(
                        (place[row["budget"]], row["rate"])
                        for row in (*own, *before)
                        if (row["group"], row["init"]) == (group, init)
                        and row["kind"] in (kind, "")
                    )
                    if points:
                        series.append(
                            Series(
                                f"{title}, {init} start",
                                f"role-{role}",
                                DASHES[inits.index(init) % len(DASHES)],
                                _path(points),
                                _dots(points),
                            )
                        )
            ticks = tuple((place[budget], number(budget)) for budget in budgets)
            name = f"{kind} memories" if kind in ("verbatim", "template") else "memories"
            charts.append(
                LineChart(
                    f"{entry.name}: {name} that an embedding search brings back",
                    "steps of the search",
                    tuple(series),
                    ticks,
                )
            )
    return charts


def _mean(run: Sequence[tuple[int, float]]) -> float:
    return statistics.fmean(accuracy for _, accuracy in run)


def _pooled(results: Results, table: dict[str, list[Any]], index: int) -> list[Mark]:
    """Marks of original, unlearned and the mean of the retrained models for one class."""
    marks = []
    for role in COMPARED:
        names = [entry.name for entry in results.by_role(role) if entry.name in table]
        if role == "retrained":
            known = [table[name][index] for name in names if table[name][index] is not None]
            name = f"retrained, mean of {len(known)}" if len(known) > 1 else "retrained"
            found = [(name, statistics.fmean(known))] if known else []
        else:
            found = [(n, table[n][index]) for n in names if table[n][index] is not None]
        marks += [
            Mark(f"role-{role}", 100 * value, f"{name}: {percent(value)}") for name, value in found
        ]
    return marks


def class_tracks(results: Results) -> tuple[list[Track], str]:
    """Accuracy per class before, after and of retrained models, and a remark on what is left out.

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
    change = {
        t.label: max(m.position for m in t.marks) - min(m.position for m in t.marks) for t in tracks
    }
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
    tracks.sort(key=_unlearned_first)
    rest = len(tracks) - MAX_CONFUSED
    remark = f"{rest} rarer classes are in results.json." if rest > 0 else ""
    return tracks[:MAX_CONFUSED], remark


def _unlearned_first(track: Track) -> list[float]:
    positions = {mark.style: mark.position for mark in track.marks}
    return [-positions.get(f"role-{role}", 0.0) for role in ("unlearned", "retrained", "original")]


def _summary(marks: Sequence[Mark]) -> str:
    values = {mark.style: mark.text.rsplit(": ", 1)[1] for mark in marks}
    parts = [values[s] for s in ("role-original", "role-unlearned") if s in values]
    return " → ".join(parts)


def attack_tracks(results: Results) -> list[Track]:
    """Where every model lies on the scale of each privacy, representation and relearning metric.

    Censored values lie at the right end, beyond all others.
    """
    groups: dict[tuple[str, str], list[MetricResult]] = defaultdict(list)
    for row in results.metrics:
        if row.family in ("privacy", "representation", "relearning"):
            groups[row.metric, row.split].append(row)
    tracks = []
    for (metric, split), rows in groups.items():
        values = [row.value for row in rows if row.value is not None]
        if not values:
            continue
        first = rows[0]
        low = first.low if first.low is not None else min(0.0, *values)
        high = first.high if first.high is not None else max(values)
        if high <= low:
            continue
        beyond = [row for row in rows if row.censored]
        width = (90.0 if beyond else 100.0) / (high - low)
        end = (beyond[0].note or "censored") if beyond else with_unit(first, high)
        marks = []
        for row in rows:
            style = f"role-{_role(results, row.model)}"
            if row.value is not None:
                place = min(100.0, max(0.0, width * (row.value - low)))
                marks.append(Mark(style, place, f"{row.model}: {with_unit(row, row.value)}"))
            elif row.censored:
                marks.append(Mark(style, 100.0, f"{row.model}: {end}"))
        marks.sort(key=lambda mark: _layer(mark.style))
        label = title_of(metric) + (f" ({split_text(split)})" if split else "")
        tracks.append(Track(label, tuple(marks), "", with_unit(first, low), end))
    return tracks


def _role(results: Results, model: str) -> str:
    return next(entry.role for entry in results.models if entry.name == model)


@dataclass(frozen=True)
class Picture:
    """One image with what each model takes it for: (model, role, class, probability, changed)."""

    image: str
    label: str
    predictions: tuple[tuple[str, str, str, str, bool], ...]


def pictures(results: Results, kind: str) -> list[Picture]:
    """The example images of one kind, in the order of the results, without their sample ids.

    Only the predictions of original, unlearned and retrained models: controls would crowd them out.
    """
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
                        roles[model],
                        class_name(results, predicted),
                        f"{100 * probability:.0f}\u2009%",
                        predicted != before,
                    )
                    for model, (predicted, probability) in predictions.items()
                    if roles.get(model) in COMPARED
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


@dataclass(frozen=True)
class Strip:
    """Pictures of one prompt by several models: (title, role, base64 PNG), equal seeds in columns.

    Of detectors one image with the boxes of several models. The role of the training picture and of
    labelled boxes is ``training``, that of pictures after an attack the model's.

    Attributes:
        prompt: what was asked for.
        count: pictures per strip.
        images: one strip per model.
        attacked: whether there are pictures after an attack, whose seeds are their own.
    """

    prompt: str
    count: int
    images: tuple[tuple[str, str, str], ...]
    attacked: bool = False


def strips(results: Results, kind: str) -> list[Strip]:
    """Rows of pictures of one kind: original first, then unlearned models, then controls.

    Of memorized pictures the training picture comes first, and after each model what an attack has
    brought back in it; of detectors the labelled boxes come first.
    """
    examples = [e for e in results.examples if e["kind"] == kind and "images" in e]
    attacked = {name for example in examples for name in example.get("attacked", {})}
    found = []
    for example in examples:
        images: list[tuple[str, str, str]] = []
        for key, title in (("training", "training picture"), ("labelled", "labelled boxes")):
            if key in example:
                images.append((title, "training", example[key]))
        for entry in results.models:
            if entry.name in example["images"]:
                images.append((entry.name, entry.role, example["images"][entry.name]))
            if entry.name in attacked:
                image = example.get("attacked", {}).get(entry.name, "")
                images.append((f"{entry.name}, after attack", entry.role, image))
        prompt = example["prompt"] or "(no prompt)"
        found.append(Strip(prompt, example["count"], tuple(images), bool(attacked)))
    return found


@dataclass(frozen=True)
class Question:
    """One question with what every model answers: (model, role, text, right).

    Attributes:
        images: base64 PNG, none for a question without picture.
        question, right: what was asked, and the true answer.
        answers: one per model, in order.
    """

    images: tuple[str, ...]
    question: str
    right: str
    answers: tuple[tuple[str, str, str, bool], ...]


def questions(results: Results, kind: str) -> list[Question]:
    """The example questions of one kind, in the order of the results, without their ids."""
    roles = {entry.name: entry.role for entry in results.models}
    return [
        Question(
            tuple(example["images"]),
            example["question"],
            example["right"],
            tuple(
                (model, roles[model], text or "(nothing)", right)
                for model, (text, right) in example["answers"].items()
            ),
        )
        for example in results.examples
        if example["kind"] == kind
    ]


def question_rows(found: Sequence[Question]) -> list[list[str]]:
    """The examples as a table: question, true answer, then one cell per model."""
    return [[one.question, one.right, *(text for _, _, text, _ in one.answers)] for one in found]
