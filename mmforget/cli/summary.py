"""The few numbers of an audit that fit on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mmforget.audit.results import MetricResult, Results

COLUMNS = (
    ("to forget", "accuracy", "test_forget"),
    ("forgotten before", "accuracy", "test_previous"),
    ("retained", "accuracy", "test_retain"),
    ("probe recall", "probe_recall", "test_forgotten"),
    ("relearned in", "relearn_steps_full", "test_forgotten"),
)

DETECTION_COLUMNS = (
    ("AP to forget", "average_precision", "test_forget"),
    ("AP forgotten before", "average_precision", "test_previous"),
    ("AP retained", "average_precision", "test_retain"),
    ("still found", "found_rate", "test_forgotten"),
    ("AP relearned", "relearn_average_precision", "test_forgotten"),
)


MULTIMODAL_COLUMNS = (
    ("reveals it", "attack_success", "test_forget"),
    ("reveals earlier", "attack_success", "test_previous"),
    ("refuses safe", "sarr", "test_retain"),
    ("right about others", "exact_answers", "test_retain"),
    ("harmless right", "exact_answers", "test_harmless_forgotten"),
    ("relearned", "relearn_success", "test_forgotten"),
)

FAMILY_COLUMNS = {"detection": DETECTION_COLUMNS, "multimodal": MULTIMODAL_COLUMNS}
"""By the kind of the data; all others have `COLUMNS`."""


def table(results: Results, columns: Sequence[tuple[str, str, str]] | None = None) -> str:
    """By default accuracy on test images, probe recall and relearning steps, one line per model.

    Args:
        results: of an audit.
        columns: title, metric and split of each; those that were not measured are left out. None
            takes the usual ones: of a detector its average precisions (AP), of a multimodal
            language model what it answers.

    Returns:
        Lines of text, the original first, anchors left out.
    """
    if columns is None:
        columns = FAMILY_COLUMNS.get(str(results.data.get("kind")), COLUMNS)
    measured = {(row.metric, row.split) for row in results.metrics}
    columns = [column for column in columns if column[1:] in measured]
    rows = [["", *(title for title, _, _ in columns)]]
    for model in results.models:
        if model.role == "random_init":
            continue
        cells = [_cell(_find(results, metric, model.name, split)) for _, metric, split in columns]
        rows.append([model.name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


def _find(results: Results, metric: str, model: str, split: str) -> MetricResult | None:
    try:
        return results.get(metric, model, split)
    except KeyError:
        return None


def _cell(row: MetricResult | None) -> str:
    if row is None:
        return "-"
    if row.error:
        return "failed"
    if row.value is None:
        return row.note if row.censored else "-"
    return f"{100 * row.value:.1f} %" if row.unit == "fraction" else f"{row.value:g} {row.unit}"
