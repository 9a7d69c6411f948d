"""The report says everything that the results hold, in one file, and discloses no one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmforget.audit.results import Check, MetricResult, Results
from mmforget.errors import DataError, StorageError
from mmforget.report.content import MISSING, columns_of, groups_of, number, title_of
from mmforget.report.html import render_html
from mmforget.report.markdown import render_markdown
from mmforget.report.pictures import (
    attack_tracks,
    class_tracks,
    confusion_tracks,
    forgetting_chart,
    relearning_chart,
)
from mmforget.report.words import FAMILIES, METRICS
from mmforget.report.write import write_report

VOID = {"meta", "img", "br", "link", "input", "path", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it, nothing to close."""
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """It must be the one that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect what a reader sees."""
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_round_trip(results: Results) -> None:
    again = Results.from_json(results.to_json())
    assert again == results
    assert render_html(again) == render_html(results)


def test_written_files_and_determinism(results: Results, tmp_path: Path) -> None:
    page = write_report([results], tmp_path / "a")
    assert page == tmp_path / "a" / "report.html"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["report.html", "report.md"]
    write_report([Results.from_json(results.to_json())], tmp_path / "b")
    for name in ("report.html", "report.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_page_is_self_contained(results: Results) -> None:
    html = render_html(results)
    page = Page(html)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/png;base64,"), (tag, name)
        assert not name.startswith("on")
    assert not re.search(r"url\(|@import|https?://", html)


def test_every_metric_value_is_on_both_pages(results: Results) -> None:
    html, markdown = Page(render_html(results)).text, render_markdown(results)
    for row in results.metrics:
        assert title_of(row.metric) in html and title_of(row.metric) in markdown
    groups = groups_of(columns_of(results), FAMILIES)
    cells = [cell for group in groups for row in group.rows for cell in row.cells]
    shown = sum(bool(cell.value) and cell.value != MISSING for cell in cells)
    # every row of the results is a cell, besides the means of the retrained models
    means = len({(r.metric, r.split) for r in results.metrics if r.model == "retrained-1"})
    assert shown == sum(not row.error for row in results.metrics) + means
    for cell in cells:
        if cell.value:
            assert cell.value in html
        for part in (cell.interval, cell.n):
            assert part in html


def test_values_carry_interval_n_direction_and_target(results: Results) -> None:
    results.metrics[0] = replace(
        results.metrics[0], direction="closer_to_value", target=0.5, ci_low=0.978, ci_high=0.999
    )
    html = Page(render_html(results)).text
    for text in ("≈ closer to 50.0", "97.8 to 99.9", "n = 111", "↑ higher is better", "Wilson"):
        assert text in html


def test_different_n_is_shown_in_the_cells(results: Results) -> None:
    results.metrics[0] = replace(results.metrics[0], n=77)
    group = groups_of(columns_of(results), ["forgetting"])[0]
    assert group.rows[0].n == ""
    assert [cell.n for cell in group.rows[0].cells[:2]] == ["n = 77", "n = 111"]


def test_failed_metrics_are_rows_with_their_reason(results: Results) -> None:
    for text in (Page(render_html(results)).text, render_markdown(results)):
        assert text.count("RuntimeError: invented failure of a metric") == 2  # table and list
    assert 'class="role-unlearned failed"' in render_html(results)


def test_verdict_comes_first(results: Results) -> None:
    text = Page(render_html(results)).text
    order = [text.index(part) for part in (
        results.verdict.sentence, "Measurements", "Pictures", "Curves", "Class by class",
        "What forgotten images are now taken for", "Representation and attacks",
        "Cost, method and data access", "Checks", "Warnings and failed metrics", "Not measured",
        "Not claimed", "Tuning", "Provenance",
    )]  # fmt: skip
    assert order == sorted(order)


def test_everything_that_is_not_a_number_is_there(results: Results) -> None:
    for text in (Page(render_html(results)).text, render_markdown(results)):
        for part in (
            *(check.name for check in results.checks), *results.not_measured, *results.warnings,
            *results.not_claimed, results.tuning, "not testable", "1a" * 32, "2b" * 32, "a1" * 32,
            "mmforget quickstart", "forget labels", "zero groups", "1. first", "class eight",
        ):  # fmt: skip
            assert part in text, part


def test_banner_when_the_audit_cannot_tell(results: Results, failing: Results) -> None:
    assert "Evaluation not discriminative" not in render_html(results)
    html, markdown = render_html(failing), render_markdown(failing)
    assert 'class="verdict not_discriminative" role="alert"' in html
    for text in (html, markdown):
        assert "Evaluation not discriminative" in text and "support no conclusion" in text


def test_hostile_names_stay_text(results: Results) -> None:
    hostile = '<script>alert("x")</script>|`a`"><img src=http://x>\n# head'
    results.title = results.tuning = hostile
    results.data["class_names"][3] = hostile
    results.requests[0]["classes"] = [3]
    results.checks.append(Check(hostile, False, hostile))
    results.warnings.append(hostile)
    results.provenance[hostile] = hostile
    results.models[5] = replace(results.models[5], name=hostile, source=hostile)
    results.metrics = [
        replace(row, model=hostile) if row.model == "Identity" else row for row in results.metrics
    ]
    results.metrics.append(
        MetricResult("m" + hostile, hostile, "privacy", None, "none", hostile, error=hostile)
    )
    page = Page(render_html(results))
    assert page.tags["script"] == 0
    assert page.tags["img"] == len(results.examples)
    assert hostile in page.text
    markdown = render_markdown(results)
    assert "<script" not in markdown and "<img" not in markdown and "\n# head" not in markdown
    width = 0  # no name may add a column to its table
    for line in markdown.splitlines():
        if line.startswith("| "):
            columns = len(re.findall(r"(?<!\\)\|", line))
            assert columns == (width or columns), line
            width = columns
        else:
            width = 0


def test_ids_and_reasons_are_not_disclosed(results: Results) -> None:
    results.requests[0] = {
        "classes": [], "samples": [918273, 645342], "goal": "untraining", "name": "two samples",
        "reason": "a private reason",
    }  # fmt: skip
    for text in (render_html(results), render_markdown(results)):
        assert "2 samples, ids SHA-256" in text
        for secret in ("918273", "645342", "987654", "private reason"):
            assert secret not in text


def test_little_results_make_a_page(results: Results) -> None:
    bare = Results(
        results.title, "untraining", results.requests, {"name": "d"}, results.models[:2],
        results.metrics[:2], [], results.verdict,
    )  # fmt: skip
    assert "Pictures" not in Page(render_html(bare)).text
    assert render_markdown(bare).count("None.") == 1


# ---- charts --------------------------------------------------------------


def test_relearning_shows_the_worst_rate(results: Results) -> None:
    chart = relearning_chart(results, "relearning")
    assert chart is not None
    line = next(series for series in chart.series if series.name == "unlearned")
    x, y = line.path.rsplit("L", 1)[1].split(",")
    best = [
        row["accuracy"]
        for row in results.curves["relearning"]
        if (row["model"], row["step"], row["learning_rate"]) == ("unlearned", 50, 0.01)
    ]
    assert float(x) == 100
    assert float(y) == pytest.approx(100 - 100 * sum(best) / len(best), abs=0.01)
    assert chart.drawn[-1].name == "unlearned"
    assert relearning_chart(replace(results, curves={}), "relearning") is None


def test_forgetting_chart_has_one_part_per_request(results: Results) -> None:
    chart = forgetting_chart(results)
    assert chart is not None
    assert chart.borders == (50.0,)
    forget, retain, previous = chart.series
    assert forget.path.count("M") == retain.path.count("M") == 2
    assert previous.path.count("M") == 1
    assert [text for _, text in chart.x_ticks] == ["first, epochs 1 to 6", "second, epochs 1 to 6"]


def test_class_chart_marks_the_forgotten(results: Results) -> None:
    tracks, remark = class_tracks(results)
    assert [track.label for track in tracks if track.marked] == ["three", "eight"]
    assert tracks[3].summary == "96.0\u2009% → 0.0\u2009%"
    assert remark == ""


def test_many_classes_are_cut_to_those_that_changed(results: Results) -> None:
    count = 100
    results.data["class_names"] = [f"c{index}" for index in range(count)]
    results.requests = [{"classes": [7], "name": "x", "goal": "untraining", "samples": []}]
    before: list[float | None] = [0.9] * count
    after = [*before]
    after[7], after[50] = 0.899, 0.1
    results.class_accuracy = {"original": before, "unlearned": after}
    tracks, remark = class_tracks(results)
    assert len(tracks) == 24
    assert {"c7", "c50"} <= {track.label for track in tracks}
    assert remark.startswith("76 classes")


def test_confusion_is_sorted_by_the_unlearned_model(results: Results) -> None:
    tracks, _ = confusion_tracks(results)
    assert [track.label for track in tracks[:3]] == ["five", "nine", "two"]


def test_censored_values_lie_beyond_the_others(results: Results) -> None:
    track = next(t for t in attack_tracks(results) if t.label.startswith("Relearning steps"))
    last = max(track.marks, key=lambda mark: mark.position)
    assert (last.style, last.position, track.high) == ("role-unlearned", 100.0, "> 50 steps")
    assert sorted(mark.position for mark in track.marks)[-2] <= 90


def test_numbers() -> None:
    shown = [number(v) for v in (0, 3, 1234567.0, 123.4, 12.34, 1.234, 0.1234, 0.0001, -0.5)]
    assert shown == ["0", "3", "1\u2009234\u2009567", "123", "12.3", "1.23", "0.123", "0.0001",
                     "-0.500"]  # fmt: skip


def test_every_metric_of_the_audit_is_explained() -> None:
    from mmforget.audit.rows import METRICS as MEASURED

    assert set(MEASURED) <= set(METRICS)


# ---- comparison --------------------------------------------------------------


def other_run(results: Results) -> Results:
    """The same data, another method."""
    return replace(
        Results.from_json(results.to_json()),
        title="with SCRUB",
        metrics=[replace(r, value=0.31 if r.value == 0 else r.value) for r in results.metrics],
    )


def test_comparison(results: Results, tmp_path: Path) -> None:
    page = write_report([results, other_run(results)], tmp_path)
    html, markdown = page.read_text(encoding="utf-8"), (tmp_path / "report.md").read_text()
    for text in (Page(html).text, markdown):
        assert results.title in text and "with SCRUB" in text
        assert "31.0" in text and "Reference models are those of" in text
    assert "script" not in Page(html).tags


@pytest.mark.parametrize("key", ["hash", "split_hash"])
def test_runs_on_other_data_are_not_compared(results: Results, tmp_path: Path, key: str) -> None:
    other = other_run(results)
    other.data[key] = "99" * 32
    with pytest.raises(DataError, match=r"cannot be compared: their (data|split) hashes differ"):
        write_report([results, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_with_equal_titles_can_be_told_apart(results: Results, tmp_path: Path) -> None:
    copy = Results.from_json(results.to_json())
    copy.models[0] = replace(copy.models[0], hash="00" * 32)
    text = write_report([results, copy], tmp_path).read_text(encoding="utf-8")
    assert f"{results.title} (2)" in text
    assert "start from different original models" in text


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one run folder"):
        write_report([], tmp_path)


def test_folder_that_cannot_be_made(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a file is in its way"):
        write_report([results], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
