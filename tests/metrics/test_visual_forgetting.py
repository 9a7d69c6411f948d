"""Curves of accuracy against where the picture is taken away, and the modality table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.modality import ModalityTable
from mmforget.metrics.visual_forgetting import ForgettingCurve, VisualForgetting


def test_statistics_of_a_curve_worked_out_by_hand():
    curve = ForgettingCurve(0.9, (0.1, 0.4, 0.6, 0.9, 0.9), "reprefill", 20)
    assert curve.losses == pytest.approx((0.8, 0.5, 0.3, 0.0, 0.0))
    assert curve.area == pytest.approx(0.32)
    assert curve.half_life == 0.5
    assert curve.to_dict()["accuracy_without_picture"] == 0.1
    assert curve.to_dict()["removal"] == "reprefill"


@pytest.mark.parametrize(("scale", "rate"), [(0.7, 3.0), (0.2, 0.4), (0.5, 0.0), (0.9, 40.0)])
def test_an_exponential_is_found_again(scale, rate):
    losses = scale * np.exp(-rate * np.linspace(0, 1, 9))
    found = ForgettingCurve(0.95, tuple((0.95 - losses).tolist())).decay
    assert found is not None
    assert found.scale == pytest.approx(scale, rel=1e-3)
    assert found.rate == pytest.approx(rate, rel=1e-2, abs=1e-3)


def test_a_picture_that_is_needed_until_the_end():
    curve = ForgettingCurve(0.8, (0.0,) * 9)
    assert curve.area == pytest.approx(0.8)
    assert curve.half_life is None
    assert curve.decay is not None and curve.decay.rate == pytest.approx(0.0, abs=1e-6)


def test_a_picture_that_never_mattered():
    curve = ForgettingCurve(0.5, (0.5, 0.6, 0.5))
    assert curve.half_life is None and curve.decay is None
    assert curve.area == pytest.approx(-0.1 / 3)


def test_curves_that_are_none():
    with pytest.raises(DataError, match="1 places"):
        ForgettingCurve(0.5, (0.5,))
    with pytest.raises(ConfigurationError, match="'reprefil', did you mean 'reprefill'"):
        ForgettingCurve(0.5, (0.5, 0.5), "reprefil")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`places` is 1"):
        VisualForgetting(1)


def test_a_metric_collects_the_curve():
    metric = VisualForgetting(3, removal="evict")
    assert metric.curve() is None
    metric.reset()
    metric.update([1, 1, 0, 1], [[0, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    curve = metric.curve()
    assert curve == ForgettingCurve(0.75, (0.25, 0.5, 0.75), "evict", 4)
    assert math.isclose(curve.half_life or 0, 0.5)
    with pytest.raises(DataError, match=r"\(B, 3\)"):
        metric.update([1], [[0, 1]])


def test_modality_table():
    metric = ModalityTable((*("image", "text"), "other_image"))
    metric.update(
        [False, True, True, None, 1.0],
        ["forget", "forget", "forget", "retain", "retain"],
        ["image", "text", "text", "image", "other_image"],
    )
    table = metric.table()
    assert table.cells["forget"]["image"].value == 0.0
    assert table.cells["forget"]["text"].n == 2
    assert table.cells["retain"]["image"] == (0.0, 0, 1)
    assert table.gap() == 1.0
    assert table.gap("retain") is None
    assert len(table.rows()) == 6
    assert table.rows()[0] == {"role": "forget", "prompt": "image", "value": 0.0, "n": 1}


def test_modality_table_refuses_what_it_does_not_know():
    metric = ModalityTable()
    with pytest.raises(ConfigurationError, match="'forgot', did you mean 'forget'"):
        metric.update([1.0], ["forgot"], ["image"])
    with pytest.raises(ConfigurationError, match="'picture'"):
        metric.update([1.0], ["forget"], ["picture"])
    with pytest.raises(DataError, match="2 scores"):
        metric.update([1.0, 0.0], ["forget"], ["image"])
    with pytest.raises(ConfigurationError, match="distinct names"):
        ModalityTable(("image", "image"))
