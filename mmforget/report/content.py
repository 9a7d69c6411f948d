"""What a report says, as plain text and numbers: shared by HTML, Markdown and the model card.

Nothing here measures anything. The only arithmetic is the mean over retrained models and the share
of their cost, which are stated as such.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmforget.audit.results import Family, MetricResult, ModelEntry, Results
from mmforget.report.words import (
    DIRECTIONS,
    FAMILIES,
    GROUPS,
    MEMORIES,
    MEMORY_KINDS,
    METRICS,
    PARTS,
    PROMPT_KINDS,
    PROMPTS,
    ROLES,
    SPLIT_ROLES,
    STAGES,
    UNITS,
    is_detection,
    is_gan,
    is_generator,
    is_memorization,
    is_multimodal,
)

MISSING = "–"
SHORT_NOTE = 16  # characters that fit into a column
SEQUENCE_SPLITS = ("forget", "retain", "previous")


# ---- numbers ------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A number with about three digits, thousands separated by a thin space."""
    size = abs(value)
    if value == round(value) and size < 1000:
        return f"{value:.0f}"
    if size >= 1000:
        return f"{value:,.0f}".replace(",", "\u2009")
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 0.01:
        return f"{value:.3f}"
    return f"{value:.2g}"


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return f"{100 * share:.1f}\u2009%"


def with_unit(row: MetricResult, value: float) -> str:
    """A value of a metric in its unit."""
    if row.unit == "fraction":
        return percent(value)
    if row.unit == "bytes":
        return f"{number(value / 2**20)}\u2009MiB"
    unit = UNITS.get(row.unit, row.unit)
    return f"{_bare(row, value)}\u2009{unit}" if unit else _bare(row, value)


def _bare(row: MetricResult, value: float) -> str:
    # values without unit are ratios and similarities, of which 1 is not an integer
    if not row.unit and abs(value) <= 1:
        return f"{round(value, 3) + 0.0:.3f}"  # never -0.000
    return number(value)


def interval(row: MetricResult) -> str:
    """The 95 % interval, or nothing."""
    if row.ci_low is None or row.ci_high is None:
        return ""
    if row.unit == "fraction":
        return f"{100 * row.ci_low:.1f} to {100 * row.ci_high:.1f}"
    return f"{_bare(row, row.ci_low)} to {_bare(row, row.ci_high)}"


def short_hash(text: str) -> str:
    """The first twelve characters of a hash; the whole one is in `results.json`."""
    return text[:12] if text else MISSING


# ---- words --------------------------------------------------------------------------------------


def title_of(metric: str) -> str:
    """A metric's name for people."""
    if metric in METRICS:
        return METRICS[metric][0]
    plain = metric.replace("_", " ")
    return plain[:1].upper() + plain[1:]


def meaning_of(row: MetricResult) -> str:
    """What a metric means: our words, else those that the audit wrote beside the value."""
    if row.metric in METRICS:
        return METRICS[row.metric][1]
    return str(row.details.get("meaning", "see the documentation of the metric"))


def split_text(split: str) -> str:
    """``test_forget`` or ``test/forget`` as ``forget · test``; ``target/seven`` in words."""
    prompts, slash, word = split.partition("/")
    if slash and prompts in PROMPTS:
        return f"{PROMPTS[prompts]} “{word}”"
    if prompts in MEMORIES and word in MEMORY_KINDS:
        return f"{MEMORY_KINDS[word]}, {MEMORIES[prompts]}"
    if split in GROUPS:
        return GROUPS[split]
    stage, _, role = split.replace("/", "_").partition("_")
    if stage in STAGES and role in SPLIT_ROLES:
        return f"{SPLIT_ROLES[role]} · {STAGES[stage]}"
    if stage in STAGES:
        for prefix, words in PARTS.items():
            if role.startswith(prefix):
                return f"{words}{role.removeprefix(prefix)} · {STAGES[stage]}"
    return split.replace("_", " ")


def direction_text(row: MetricResult) -> str:
    """What a good value does, with its target."""
    text = DIRECTIONS[row.direction]
    if row.target is None:
        return text
    target = with_unit(row, row.target)
    return f"{text} {target}" if row.direction == "closer_to_value" else f"{text}, target {target}"


def class_name(results: Results, key: Any) -> str:
    """Name of a class given by index or name."""
    names = results.data.get("class_names") or []
    if isinstance(key, int) and 0 <= key < len(names):
        return str(names[key])
    return str(key)


def forgotten_classes(results: Results) -> list[str]:
    """Names of all classes that the requests name."""
    found = [class_name(results, key) for row in results.requests for key in row.get("classes", [])]
    return list(dict.fromkeys(found))


def ids_text(ids: Sequence[int]) -> str:
    """Sample ids as count and hash, so that a report does not disclose whom it is about."""
    digest = hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()
    return f"{len(ids)} samples, ids SHA-256 {short_hash(digest)}"


def request_text(request: Mapping[str, Any], results: Results | None = None) -> str:
    """What one request asked, never its reason; sample ids as count and hash."""
    memorized = [one for one in request.get("concepts", []) if one["kind"] == "memorized"]
    if memorized and len(memorized) == len(request["concepts"]):
        return memorized_text(memorized)
    if request.get("concepts"):
        return "; ".join(concept_text(concept) for concept in request["concepts"])
    if request.get("samples"):
        return ids_text(request["samples"])
    names = [class_name(results, key) if results else str(key) for key in request["classes"]]
    return f"{'class' if len(names) == 1 else 'classes'} {', '.join(names)}"


def memorized_text(concepts: Sequence[Mapping[str, Any]]) -> str:
    """Memorized prompts as count and hash: captions name people, and there may be hundreds."""
    body = json.dumps(sorted(concept["target"] for concept in concepts))
    digest = short_hash(hashlib.sha256(body.encode()).hexdigest())
    count = len(concepts)
    return f"{count} memorized prompt{'s' if count > 1 else ''}, SHA-256 {digest}"


def concept_text(concept: Mapping[str, Any]) -> str:
    """One erased concept with its synonyms, what it becomes, and what must stay."""
    text = f"{concept['kind']} “{concept['target']}”"
    for key, word in (("synonyms", "also"), ("preserve", "keep")):
        if concept.get(key):
            text += f", {word} " + ", ".join(f"“{value}”" for value in concept[key])
    if concept.get("anchor"):
        text += f", to become “{concept['anchor']}”"
    return text


# ---- the table of metrics -----------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One column: a model, or the mean of several, possibly of different runs."""

    title: str
    subtitle: str
    role: str
    sources: tuple[tuple[Results, str], ...]


@dataclass(frozen=True)
class Cell:
    """One value as text; either `value` or `error` is empty."""

    value: str = MISSING
    interval: str = ""
    n: str = ""
    note: str = ""
    error: str = ""
    relation: str = ""


@dataclass(frozen=True)
class Row:
    """One metric on one split, over all columns. `n` is set if it is the same in every cell."""

    metric: str
    title: str
    split: str
    direction: str
    n: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """The rows of one family, with its question and the meaning of its metrics."""

    family: Family
    title: str
    rows: tuple[Row, ...]
    meanings: tuple[tuple[str, str], ...]


def columns_of(results: Results) -> list[Column]:
    """Original, unlearned, mean of the retrained, each retrained, held-out, controls, random."""
    columns = []
    for role, text in ROLES.items():
        entries = results.by_role(role)
        if role == "retrained" and len(entries) > 1:
            sources = tuple((results, entry.name) for entry in entries)
            columns.append(Column("retrained", f"mean of {len(entries)}", role, sources))
        for entry in entries:
            subtitle = "" if entry.name.startswith(text) else text
            columns.append(Column(entry.name, subtitle, role, ((results, entry.name),)))
    return columns


def cost_columns(columns: Sequence[Column]) -> list[Column]:
    """The columns of which some cost is known."""
    return [
        column
        for column in columns
        if any(
            row.family == "cost" and row.model == model
            for results, model in column.sources
            for row in results.metrics
        )
    ]


def groups_of(columns: Sequence[Column], families: Iterable[Family]) -> list[Group]:
    """All metrics of the given families as table rows, in order of first appearance."""
    index: dict[tuple[int, str, str, str], MetricResult] = {}
    keys: dict[Family, dict[tuple[str, str], MetricResult]] = {family: {} for family in families}
    for results in {id(r): r for column in columns for r, _ in column.sources}.values():
        for row in results.metrics:
            index[id(results), row.metric, row.split, row.model] = row
            if row.family in keys:
                keys[row.family].setdefault((row.metric, row.split), row)
    groups = []
    for family, found in keys.items():
        rows = []
        for (metric, split), first in found.items():
            values = [
                [index.get((id(r), metric, split, model)) for r, model in column.sources]
                for column in columns
            ]
            counts = {row.n for cell in values for row in cell if row is not None and row.n}
            same = len(counts) == 1
            rows.append(
                Row(
                    metric,
                    title_of(metric),
                    split_text(split),
                    direction_text(first),
                    f"n = {next(iter(counts))}" if same else "",
                    tuple(_cell(cell, show_n=not same) for cell in values),
                )
            )
        if rows:
            meanings = {title_of(row.metric): meaning_of(row) for row in found.values()}
            groups.append(Group(family, FAMILIES[family], tuple(rows), tuple(meanings.items())))
    return groups


def _cell(rows: Sequence[MetricResult | None], show_n: bool) -> Cell:
    if len(rows) > 1:
        return _mean_cell([row for row in rows if row is not None], len(rows))
    row = rows[0]
    if row is None:
        return Cell()
    n = f"n = {row.n}" if show_n and row.n else ""
    if row.error:
        return Cell(value="", error=row.error, n=n)
    if row.value is None:
        short = bool(row.note) and len(row.note) <= SHORT_NOTE
        word = "censored" if row.censored else "not defined"
        return Cell(row.note if short else word, interval(row), n, "" if short else row.note)
    value = ("> " if row.censored else "") + with_unit(row, row.value)
    return Cell(value, interval(row), n, row.note, relation=_relation(row))


def _relation(row: MetricResult) -> str:
    """Distance to the retrained models, where the audit has found one."""
    parts = []
    if row.details.get("retrained_z") is not None:
        parts.append(f"z {row.details['retrained_z']:+.1f}")
    if row.details.get("progress") is not None:
        parts.append(f"{round(100 * row.details['progress'])}\u2009% there")
    return ", ".join(parts)


def _mean_cell(rows: Sequence[MetricResult], wanted: int) -> Cell:
    known = [row for row in rows if row.value is not None]
    values = [row.value for row in known if row.value is not None]
    if not values:
        return Cell()
    spread = f"SD {with_unit(known[0], statistics.stdev(values))}" if len(values) > 1 else ""
    note = "" if len(values) == wanted else f"{len(values)} of {wanted} models"
    return Cell(value=with_unit(known[0], statistics.fmean(values)), interval=spread, note=note)


def failures_of(results: Results) -> list[str]:
    """Every metric that failed, in words."""
    return [
        f"{title_of(row.metric)}"
        + (f", {split_text(row.split)}" if row.split else "")
        + f", {row.model}: {row.error}"
        for row in results.metrics
        if row.error
    ]


def notes_of(results: Results) -> list[str]:
    """Notes of the metrics, equal ones joined."""
    notes: dict[str, list[str]] = {}
    drawn = is_generator(results)
    for row in results.metrics:
        if row.note and row.value is not None and not (drawn and len(row.note) <= SHORT_NOTE):
            name = f"{title_of(row.metric)}" + (f" ({split_text(row.split)})" if row.split else "")
            models = notes.setdefault(f"{name}: {row.note}", [])
            models.append(row.model)
    return [f"{text} [{', '.join(models)}]" for text, models in notes.items()]


def reading(results: Results) -> str:
    """How to read the table of measurements."""
    methods = sorted({row.ci_method for row in results.metrics if row.ci_method})
    intervals = f"95 % intervals ({'; '.join(methods)})" if methods else "95 % intervals"
    if is_memorization(results):
        return (
            f"Small numbers are {intervals}. All models draw the same prompts from the same noise, "
            "except the control with other seeds. Controls that change weights are masks of the "
            "same density that locate nothing: what they achieve, locating has not achieved. "
            "Verbatim and template memories are different things and have rows of their own."
        )
    if is_gan(results):
        return (
            f"Small numbers are {intervals}. All models draw the same latents; “other latents” is "
            "the original at other ones, which shows how much chance alone changes. A retrained "
            "model never saw what was erased: what an attack finds there, it finds without any "
            "memory."
        )
    if is_generator(results):
        return (
            f"Small numbers are {intervals}. All models draw the same prompts from the same noise, "
            "except the control with other seeds, which shows how much chance alone changes. The "
            "negative prompt is the original model told to avoid what was to be erased: what "
            "anybody can have without any method."
        )
    if is_detection(results):
        return (
            f"Small numbers are {intervals}. Average precision is that of COCO over the named "
            "classes only, on images that hold one of their objects. z is the distance to the "
            "retrained models in their standard deviations, or in the smallest difference that "
            "counts if that is more; “there” is the way covered from the original (0\u2009%) to "
            "the retrained models (100\u2009%)."
        )
    if is_multimodal(results):
        return (
            f"Small numbers are {intervals}. Answers are greedy. Test questions show unseen "
            "pictures in held-out words. z is the distance to the retrained models in their "
            "standard deviations, or in the smallest difference that counts if that is more; "
            "“there” is the way covered from the original (0\u2009%) to the retrained models "
            "(100\u2009%)."
        )
    return (
        f"Small numbers are {intervals}. z is the distance to the retrained models in their "
        "standard deviations, or in the smallest difference that counts if that is more; “there” "
        "is the way covered from the original (0 %) to the retrained models (100 %)."
    )


def meanings_of(groups: Iterable[Group]) -> dict[str, str]:
    """The meaning of every metric in the groups, once."""
    return {name: text for group in groups for name, text in group.meanings}


# ---- key figures, sequence, cost, facts ---------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One number to read first, with the same number of the references."""

    title: str
    value: str
    references: str


def key_figures(results: Results) -> list[Figure]:
    """How good it is on what was to go, to stay, and went before; of the one unlearned model."""
    unlearned = results.by_role("unlearned")
    if len(unlearned) != 1:
        return []
    figures = []
    for metric, split, title in _read_first(results):
        rows = {
            row.model: row
            for row in results.metrics
            if (row.metric, row.split) == (metric, split) and row.value is not None
        }
        own = rows.get(unlearned[0].name)
        if own is None or own.value is None:
            continue
        texts = []
        for role in ("original", "retrained"):
            values = [rows[e.name].value for e in results.by_role(role) if e.name in rows]
            known = [value for value in values if value is not None]
            if known:
                texts.append(f"{role} {percent(statistics.fmean(known))}")
        figures.append(Figure(title, percent(own.value), " · ".join(texts)))
    return figures


def _read_first(results: Results) -> list[tuple[str, str, str]]:
    """Metric, split and title of the key figures."""
    if is_detection(results):
        return [
            ("average_precision", "test_forget", "Average precision, forgotten"),
            ("average_precision", "test_retain", "Average precision, retained"),
            ("average_precision", "test_previous", "Average precision, forgotten earlier"),
            ("found_rate", "test_forgotten", "Forgotten objects still found"),
        ]
    if is_multimodal(results):
        return [
            ("attack_success", "test_forget", "Answers that reveal it"),
            ("attack_success", "test_previous", "Answers that reveal what went earlier"),
            ("sarr", "test_retain", "Safe answers refused (SARR)"),
            ("exact_answers", "test_retain", "Right answers about others"),
            ("exact_answers", "test_harmless_forgotten", "Harmless questions, same pictures"),
        ]
    if not is_generator(results):
        return [
            ("accuracy", "test_forget", "Accuracy on forgotten data"),
            ("accuracy", "test_retain", "Accuracy on retained data"),
            ("accuracy", "test_previous", "Accuracy on earlier forgotten data"),
        ]
    if is_memorization(results):
        splits = list(results.data.get("prompts", {}))
        located = [split for split in splits if split.startswith("located/")]
        attacked = any(row.metric == "attack_embedding" for row in results.metrics)
        copied = located if attacked else splits
        return [
            *(("replication_rate", split, f"Copies: {split_text(split)}") for split in copied),
            *(
                ("attack_embedding", split, f"Under attack: {split_text(split)}")
                for split in located
            ),
        ]
    words = [c["target"] for request in results.requests for c in request.get("concepts", [])]
    if is_gan(results):
        return [
            *(
                ("native_rate", f"native/{word}", f"Pictures that show “{word}”")
                for word in words[:3]
            ),
            ("kept_worst", "kept", "Worst rate of the others, over before"),
            *(("elicited_rate", f"edited/{w}", f"Edited towards “{w}”") for w in words[:1]),
        ]
    return [
        *(("target_rate", f"target/{word}", f"Pictures that show “{word}”") for word in words[:3]),
        ("preserved_rate", "preserved", "Preserved concepts drawn right"),
        ("preserved_worst", "preserved", "Worst preserved concept"),
    ]


def modality_table(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Right answers by what is asked with: picture, text alone, both; head and rows by model."""
    rows = {
        (row.model, row.split): (row.value, row.n)
        for row in results.metrics
        if row.metric == "exact_answers" and row.value is not None and row.n
    }
    there = {split for _, split in rows}
    columns = {
        f"{role}, {prompt}": [split for split in splits[role] if split in there]
        for role in ("forget", "retain")
        for prompt, splits in PROMPT_KINDS.items()
    }
    columns = {title: splits for title, splits in columns.items() if splits}
    if not any("text" in title or "name" in title for title in columns):
        return [], []
    lines = []
    for entry in results.models:
        found = [
            [rows[entry.name, split] for split in splits if (entry.name, split) in rows]
            for splits in columns.values()
        ]
        lines.append((entry.name, [_pooled_share(cell) for cell in found]))
    return ["model", *columns], lines


def _pooled_share(parts: Sequence[tuple[float, int]]) -> str:
    """Several shares as one, each with its number of answers."""
    count = sum(n for _, n in parts)
    if not count:
        return MISSING
    return f"{percent(sum(value * n for value, n in parts) / count)} (n = {count})"


def sequence_rows(results: Results) -> list[tuple[str, list[str]]]:
    """After every request: accuracy or average precision on forget, retain and earlier data."""
    steps: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in results.sequence:
        steps.setdefault(row["step"], {})[row["split"]] = row
    lines = []
    for step, found in sorted(steps.items()):
        name = "nothing (original model)" if step == 0 else f"{step}. {_any(found)['request']}"
        cells = [
            f"{percent(found[split]['accuracy'])} (n = {found[split]['n']})"
            if split in found
            else MISSING
            for split in SEQUENCE_SPLITS
        ]
        lines.append((name, cells))
    return lines


def _any(found: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(iter(found.values()))


def model_rows(results: Results) -> list[tuple[str, list[str]]]:
    """Every model: name; role, hash of its weights, source."""
    return [
        (entry.name, [ROLES[entry.role], entry.hash or MISSING, entry.source or MISSING])
        for entry in results.models
    ]


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as pairs of name and text."""
    pairs: list[tuple[str, str]] = []
    for key, value in data.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{name}: ")
        elif isinstance(value, bool):
            pairs.append((name, "yes" if value else "no"))
        elif isinstance(value, float):
            pairs.append((name, number(value)))
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(str(item) for item in value) or MISSING))
        else:
            pairs.append((name, MISSING if value is None else str(value)))
    return pairs


def method_facts(results: Results, entry: ModelEntry) -> list[tuple[str, str]]:
    """What a method read, and its own statistics; costs only where the table has no row of them."""
    shown = {row.metric for row in results.metrics if row.family == "cost"}
    cost = {key: value for key, value in entry.cost.items() if key not in shown}
    return [("read", access_text(entry)), *flatten(cost), *flatten(entry.details)]


def access_text(entry: ModelEntry) -> str:
    """What a method read, in words."""
    access = entry.access
    if not access:
        return "not declared"
    parts = ["forget images" if access.get("forget_inputs") else "no forget images"]
    parts.append("forget labels" if access.get("forget_labels") else "no forget labels")
    retain = access.get("retain", "none")
    parts.append("no retain data" if retain == "none" else f"retain data ({retain})")
    if retain != "none":
        parts.append("retain labels" if access.get("retain_labels") else "no retain labels")
    if access.get("training_hooks"):
        parts.append("hooks in the original training")
    return ", ".join(parts)


def data_facts(results: Results) -> list[tuple[str, str]]:
    """Name, sizes and hashes of the data; class names are left to the charts."""
    return flatten({k: v for k, v in results.data.items() if k != "class_names"})


def request_facts(results: Results) -> list[tuple[str, str]]:
    """Each request by name, what it asked, and its goal; the data and the sizes of its splits."""
    facts = [
        (str(row["name"]), f"{request_text(row, results)} ({row['goal'].replace('_', ' ')})")
        for row in results.requests
    ]
    sizes = results.data.get("sizes", {})
    if is_memorization(results):
        drawn = "; ".join(f"{split_text(split)}: {number(n)}" for split, n in sizes.items())
        return [*facts, ("pictures of each model", drawn)]
    if is_generator(results):
        drawn = ", ".join(
            f"{split_text(split)}{'' if '/' in split else ':'} {number(size)}"
            for split, size in sizes.items()
        )
        return [*facts, ("pictures of each model", drawn)]
    samples = ", ".join(
        f"{split_text(split)} {number(size)}" for split, size in sizes.items() if size
    )
    return [*facts, ("data", f"{results.data['name']}: {samples}")]


def check_rows(results: Results) -> list[tuple[str, str, str]]:
    """Every check: name, state, text."""
    states = {None: "not testable", True: "passed", False: "failed"}
    return [(check.name, states[check.passed], check.text) for check in results.checks]


def flat(rows: Iterable[tuple[str, Sequence[str]]]) -> list[list[str]]:
    """Rows with a heading as plain lists of cells."""
    return [[name, *cells] for name, cells in rows]
