from __future__ import annotations

import pytest

from mmforget.metrics.summary import (
    adaptive_unlearning_score,
    average_gap,
    h_mean,
    progress,
    retrained_z,
    tug_of_war,
)


def test_h_mean_worked_example_and_edges() -> None:
    assert h_mean(0.9, 0.95, 0.05) == pytest.approx(0.9)
    assert h_mean(0.8, 1.0, 0.4) == pytest.approx(2 * 0.8 * 0.6 / 1.4)
    assert h_mean(0.9, 0.1, 0.5) == 0.0  # accuracy rose
    assert h_mean(0.0, 0.0, 0.0) == 0.0


def test_tug_of_war() -> None:
    assert tug_of_war([0.0, 0.9, 0.8], [0.0, 0.9, 0.8]) == 1.0
    assert tug_of_war([0.1, 0.9, 0.8], [0.0, 0.9, 0.8]) == pytest.approx(0.9)
    assert tug_of_war([0.1, 0.8, 0.8], [0.0, 0.9, 0.8]) == pytest.approx(0.81)
    with pytest.raises(ValueError):
        tug_of_war([0.1], [0.1, 0.2])


def test_average_gap() -> None:
    assert average_gap([0.1, 0.9], [0.0, 0.8]) == pytest.approx(0.1)


def test_adaptive_unlearning_score() -> None:
    assert adaptive_unlearning_score(0.97, 0.97, 0.0) == 1.0
    assert adaptive_unlearning_score(0.97, 0.87, 1.0) == pytest.approx(0.45)


def test_distance_to_retrained_in_their_own_units() -> None:
    assert retrained_z(0.5, [0.1, 0.3], 0.01) == pytest.approx(0.3 / 0.02**0.5)
    assert retrained_z(0.3, [0.1, 0.1], 0.1) == pytest.approx(2.0)  # not infinite
    assert retrained_z(0.3, [0.1], 0.1) == pytest.approx(2.0)


def test_progress_runs_from_original_to_retrained() -> None:
    assert progress(1.0, 1.0, [0.0, 0.02], 0.01) == pytest.approx(0.0)
    assert progress(0.01, 1.0, [0.0, 0.02], 0.01) == pytest.approx(1.0)
    assert progress(-0.5, 1.0, [0.0], 0.01) == pytest.approx(1.5)


def test_progress_needs_a_difference_that_can_be_told() -> None:
    assert progress(0.5, 0.6, [0.3, 0.7], 0.01) is None
    assert progress(0.5, 0.6, [0.59], 0.02) is None
