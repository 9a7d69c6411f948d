"""`report.html`: one self-contained page, readable without scripts, in print, in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmforget.audit.results import Results
from mmforget.report import content, pictures, words
from mmforget.report.comparison import Comparison

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def render_html(results: Results) -> str:
    """The report of one audit as HTML."""
    return _render("report.html.j2", r=results)


def render_comparison_html(runs: Sequence[Results]) -> str:
    """The comparison of several audits as HTML.

    Raises:
        DataError: the runs were measured on different data or splits.
    """
    return _render("comparison.html.j2", c=Comparison.of(runs))


def environment_for(escape: bool) -> Environment:
    """The template engine; a name that a template gets wrong is an error.

    Args:
        escape: escape values for HTML.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _render(template: str, **values: object) -> str:
    return (
        environment_for(escape=True)
        .get_template(template)
        .render(content=content, pictures=pictures, words=words, **values)
    )
