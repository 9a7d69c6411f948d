"""Matrices of scores, and the two kinds of forgetting."""

from __future__ import annotations

import numpy as np
import pytest

from mmforget.errors import DataError
from mmforget.metrics.continual import ScoreMatrix, forgetting_kinds, style_scores
from mmforget.metrics.rates import Mean

MATRIX = [[0.8, 0.3, 0.1], [0.6, 0.9, 0.2], [0.5, 0.7, 1.0]]


def test_matrix_worked_out_by_hand():
    found = ScoreMatrix(MATRIX, untrained=[0.1, 0.1, 0.1])
    assert found.average_performance == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert found.changes == pytest.approx([-0.3, -0.2, 0.0])
    assert found.backward_transfer == pytest.approx(-0.25)
    assert found.mean_average_accuracy == pytest.approx((0.8 + 0.75 + 2.2 / 3) / 3)
    assert found.forward_transfer == pytest.approx((0.2 + 0.1) / 2)
    assert found.to_dict()["matrix"] == MATRIX


def test_matrix_with_gaps_and_single_task():
    gaps = np.array(MATRIX)
    gaps[np.triu_indices(3, 1)] = np.nan  # nobody measures tasks that are still to come
    found = ScoreMatrix(gaps, untrained=[0.1] * 3)
    assert found.backward_transfer == pytest.approx(-0.25)
    assert found.mean_average_accuracy == pytest.approx(ScoreMatrix(MATRIX).mean_average_accuracy)
    assert found.forward_transfer is None
    assert found.to_dict()["matrix"][0] == [0.8, None, None]
    gaps[2, 0] = np.nan
    broken = ScoreMatrix(gaps)
    assert broken.average_performance is None
    assert broken.backward_transfer is None
    assert broken.changes[0] is None and broken.changes[1] == pytest.approx(-0.2)
    single = ScoreMatrix([[0.4]])
    assert single.average_performance == single.mean_average_accuracy == 0.4
    assert single.backward_transfer is None and single.forward_transfer is None


@pytest.mark.parametrize("values", [[], [[1, 2]], [1, 2], 3.0])
def test_what_is_no_matrix(values):
    with pytest.raises(DataError, match="one row and one column"):
        ScoreMatrix(values)


def test_matrix_and_tasks_must_fit():
    with pytest.raises(DataError, match=r"`untrained` has the shape \(2,\)"):
        ScoreMatrix(MATRIX, untrained=[0.1, 0.2])
    with pytest.raises(DataError, match=r"`tasks` has the shape \(1,\)"):
        ScoreMatrix(MATRIX, tasks=["art"])


def test_superficial_and_essential_forgetting_add_up():
    found = forgetting_kinds(Mean(90, 100), Mean(70, 100), Mean(20, 100))
    assert found is not None
    assert found.essential == pytest.approx(0.2)
    assert found.superficial == pytest.approx(0.5)
    assert found.total == pytest.approx(0.7)
    assert forgetting_kinds(Mean(90, 100), Mean(0, 0), Mean(20, 100)) is None


def test_styles():
    answers = ["anna", "It is Anna.", "B", "the dog", "(B) or so", "a dog or a cat", "C", "yes"]
    truths = ["anna", "anna", "B", "B", "B", "B", "B", "no"]
    options = [None, None, *[["a cat", "dog", "cow"]] * 5, None]
    found = style_scores(answers, truths, options)
    assert found["strict"].per_sample == (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
    assert found["fact"].per_sample == (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert style_scores(["Anna!"], ["anna"])["strict"].value == 1.0
    small = style_scores(["b", "a dog"], ["b", "b"], [["a cat", "dog"]] * 2)
    assert small["strict"].per_sample == (1.0, 0.0) and small["fact"].value == 1.0
    with pytest.raises(DataError, match="'E', but there are 2"):
        style_scores(["B"], ["E"], [["a", "b"]])
