from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mmforget.audit.intervals import Interval
from mmforget.audit.rows import METRICS, Measured, Rows


def fail() -> Measured:
    raise ZeroDivisionError("no samples")


def test_a_failing_metric_is_a_row_with_its_error() -> None:
    rows = Rows()
    rows.add("accuracy", "a", "test_retain", fail)
    row = rows.get("accuracy", "a", "test_retain")
    assert row is not None
    assert row.value is None and row.error == "ZeroDivisionError: no samples"


def test_rows_carry_range_direction_and_clipped_interval() -> None:
    rows = Rows()
    measured = Measured(0.99, Interval(0.95, 1.03, "normal"), 20)
    rows.add("accuracy", "a", "test_retain", lambda: measured)
    row = rows.get("accuracy", "a", "test_retain")
    assert row is not None
    assert (row.low, row.high, row.direction, row.n) == (0, 1, "higher", 20)
    assert (row.ci_low, row.ci_high, row.ci_method) == (0.95, 1.0, "normal")


def test_values_that_are_not_finite_are_none_with_a_note() -> None:
    rows = Rows()
    rows.add("loss", "a", "test_retain", lambda: Measured(math.inf))
    row = rows.get("loss", "a", "test_retain")
    assert row is not None and row.value is None and row.note == "not finite"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name: str) -> None:
    spec = METRICS[name]
    assert spec.meaning and spec.smallest >= 0
    assert spec.low is None or spec.high is None or spec.low < spec.high


def filled(**values: float) -> Rows:
    rows = Rows()
    for name, value in values.items():
        hits = np.zeros(100)
        hits[: round(100 * value)] = 1
        measured = Measured(value, Interval(value - 0.1, value + 0.1, "x"), 100, hits)
        rows.add("probe_recall", name, "test_forgotten", lambda m=measured: m)  # type: ignore[misc]
    return rows


def details(rows: Rows, model: str) -> dict[str, Any]:
    row = rows.get("probe_recall", model, "test_forgotten")
    assert row is not None
    return row.details


def test_rows_are_related_to_the_retrained_models() -> None:
    rows = filled(original=1.0, unlearned=0.9, r1=0.8, r2=0.8)
    rows.relate(["r1", "r2"], "original")
    found = details(rows, "unlearned")
    assert found["retrained_mean"] == pytest.approx(0.8)
    assert found["retrained_z"] == pytest.approx(0.1 / METRICS["probe_recall"].smallest)
    assert found["progress"] == pytest.approx(0.5)
    assert found["equivalent_to_retrained"] is False
    assert "progress" not in details(rows, "r1")


def test_progress_that_cannot_be_told_is_none() -> None:
    rows = filled(original=0.8, unlearned=0.9, r1=0.8, r2=0.82)
    rows.relate(["r1", "r2"], "original")
    assert details(rows, "unlearned")["progress"] is None


def test_differences_are_paired_where_they_can_be() -> None:
    rows = filled(a=0.9, r=0.9)
    assert rows.half_width("probe_recall", "a", "test_forgotten", ["r"]) == 0.0
    rows.per_sample.clear()
    assert rows.half_width("probe_recall", "a", "test_forgotten", ["r"]) == pytest.approx(0.1)
