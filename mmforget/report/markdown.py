"""`report.md`: the facts of the page as Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmforget.audit.results import Results
from mmforget.report import content, pictures, words
from mmforget.report.comparison import Comparison
from mmforget.report.html import environment_for


def escape(text: object) -> str:
    """Text as it is, whatever it contains: no markup, no HTML, no end of a table cell."""
    plain = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*\[\]~#])", r"\\\1", plain).replace("\n", " ").replace("\r", " ")


class Markdown(str):
    """Text that is Markdown already, in distinction to values, which are escaped."""


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markdown:
    """A Markdown table; all cells are escaped."""
    lines = ["| " + " | ".join(escape(cell) for cell in line) + " |" for line in (head, *rows)]
    lines.insert(1, "|" + " --- |" * len(head))
    return Markdown("\n".join(lines))


def metric_table(columns: Sequence[content.Column], group: content.Group) -> Markdown:
    """The metrics of one family over all models."""
    head = ["metric", "split", "good is", "n", *map(_column_title, columns)]
    rows = [
        [
            row.title,
            row.split,
            row.direction,
            row.n.removeprefix("n = "),
            *map(cell_text, row.cells),
        ]
        for row in group.rows
    ]
    return table(head, rows)


def _column_title(column: content.Column) -> str:
    return column.title + (f" ({column.subtitle})" if column.subtitle else "")


def cell_text(cell: content.Cell) -> str:
    """A cell in one line."""
    if cell.error:
        return f"failed: {cell.error}"
    extra = [text for text in (cell.interval, cell.relation, cell.n, cell.note) if text]
    return cell.value + (f" ({'; '.join(extra)})" if extra else "")


def track_table(tracks: Sequence[pictures.Track]) -> Markdown:
    """The values that a chart shows, one mark after the other."""
    return table(
        ["", "values"],
        [
            [t.label + (" (forgotten)" if t.marked else ""), "; ".join(m.text for m in t.marks)]
            for t in tracks
        ],
    )


def relearning_table(results: Results, key: str) -> Markdown:
    """What is back at the last step of the relearning attack, per model, rate and seed."""
    last: dict[tuple[str, float, int], tuple[int, float]] = {}
    for row in results.curves[key]:
        run = (row["model"], row["learning_rate"], row["seed"])
        last[run] = max(last.get(run, (-1, 0.0)), (row["step"], row["accuracy"]))
    return table(
        ["model", "learning rate", "seed", "steps", words.measure(results)],
        [[*run, step, content.percent(value)] for run, (step, value) in last.items()],
    )


def forgetting_table(results: Results) -> Markdown:
    """Accuracy or average precision per split over the epochs of every request."""
    rows = results.curves.get("forgetting", [])
    return table(
        ["request", "epoch", "split", words.measure(results)],
        [[r["step"], r["epoch"], r["split"], content.percent(r["accuracy"])] for r in rows],
    )


def search_table(results: Results) -> Markdown:
    """Share and likeness of what an embedding search brings back, per model, pictures and start."""
    rows = [
        [
            row["model"],
            " ".join(filter(None, (pictures.ATTACK_GROUPS[row["group"]][0], row["kind"]))),
            row["init"],
            row["budget"],
            row["n"],
            content.MISSING if row["rate"] is None else content.percent(row["rate"]),
            content.MISSING
            if row["mean_similarity"] is None
            else content.number(row["mean_similarity"]),
        ]
        for row in results.curves["embedding_attack"]
    ]
    head = ["model", "pictures", "start", "steps", "n", "brought back", "mean likeness"]
    return table(head, rows)


def render_markdown(results: Results) -> str:
    """The report of one audit as Markdown."""
    return _render("report.md.j2", r=results)


def render_comparison_markdown(runs: Sequence[Results]) -> str:
    """The comparison of several audits as Markdown.

    Raises:
        DataError: the runs were measured on different data or splits.
    """
    return _render("comparison.md.j2", c=Comparison.of(runs))


def _render(template: str, **values: object) -> str:
    environment = environment_for(escape=False)
    environment.finalize = lambda value: value if isinstance(value, Markdown) else escape(value)
    functions = (
        table, metric_table, track_table, relearning_table, forgetting_table, search_table
    )  # fmt: skip
    text = environment.get_template(template).render(
        content=content,
        pictures=pictures,
        words=words,
        **{function.__name__: function for function in functions},
        **values,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
