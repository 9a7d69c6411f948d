"""Write a report: the one entry point for commands and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmforget.artifacts.run_folder import atomic_write, writing
from mmforget.audit.results import Results
from mmforget.errors import DataError
from mmforget.report.html import render_comparison_html, render_html
from mmforget.report.markdown import render_comparison_markdown, render_markdown


def write_report(results: Sequence[Results], folder: Path | str) -> Path:
    """Write ``report.html`` and ``report.md`` from results alone.

    The same results give the same bytes. Sample ids are shown as count and hash.

    Args:
        results: one audit, or several of the same data and split for a comparison.
        folder: where the files go; it is created if it does not exist.

    Returns:
        Path of ``report.html``.

    Raises:
        DataError: no results, or runs that cannot be compared.
        StorageError: the files could not be written.
    """
    if not results:
        raise DataError("a report needs results; give at least one run folder")
    if len(results) == 1:
        html, markdown = render_html(results[0]), render_markdown(results[0])
    else:
        html, markdown = render_comparison_html(results), render_comparison_markdown(results)
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "report.md", markdown)
    atomic_write(folder / "report.html", html)
    return folder / "report.html"
