"""What attacks on generators share: judges, intervals of differences, and comparisons."""

from __future__ import annotations

import json

import pytest
import torch

from mmforget.attacks.generator_report import (
    GeneratorAttackReport,
    compare_attack,
    compared,
    difference_interval,
    everybody,
    judge_logits,
)
from mmforget.attacks.latent_search import latent_search
from mmforget.errors import ConfigurationError
from mmforget.metrics.judge import load_judge
from mmforget.testing.painter import is_red, painter, red_logits


def report(rate: float | None, n: int = 100) -> GeneratorAttackReport:
    return GeneratorAttackReport("latent_search", rate, n, 0.0, 1.0, {})


def test_judge_logits_are_the_log_odds_of_the_judge():
    judge = load_judge()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images.requires_grad_(True)
    for factor, value in (("digit", "seven"), (list(judge.factors)[-1], None)):
        values = judge.factors[factor]
        value = value or values[-1]
        found = judge_logits(judge, factor, value)(images)
        expected = judge(images)[factor][:, values.index(value)]
        assert torch.allclose(found.sigmoid(), expected, atol=1e-5)
        assert torch.autograd.grad(found.sum(), images)[0].abs().sum() > 0


def test_a_wrong_factor_value_or_judge_is_refused():
    with pytest.raises(ConfigurationError, match="no factor 'shape'"):
        judge_logits(load_judge(), "shape", "seven")
    with pytest.raises(ConfigurationError, match="did you mean 'seven'"):
        judge_logits(load_judge(), "digit", "sevn")
    with pytest.raises(ConfigurationError, match="not differentiable"):
        judge_logits(is_red, "digit", "seven")


def test_everybody_has_to_see_it():
    images = torch.stack([torch.full((3, 4, 4), v) for v in (0.2, 0.5, 0.9)])
    both = everybody(lambda x: x.mean(dim=(1, 2, 3)) > 0.3, lambda x: x.mean(dim=(1, 2, 3)) < 0.7)
    assert both(images).tolist() == [False, True, False]


def test_the_interval_of_a_difference_is_that_of_newcombe():
    # an example of the paper: 56 of 70 against 48 of 80, method 10
    found = difference_interval(56, 70, 48, 80)
    assert found.low == pytest.approx(0.0524, abs=1e-4)
    assert found.high == pytest.approx(0.3339, abs=1e-4)
    turned = difference_interval(48, 80, 56, 70)
    assert (turned.low, turned.high) == (-found.high, -found.low)


def test_recovery_counts_only_beyond_the_control():
    same = compared(report(0.8), report(0.7), [report(0.1), report(0.71)], "retrained")
    assert same.excess == pytest.approx(-0.01)
    assert same.recovers is False
    assert "no more than the retrained model" in same.words
    more = compared(report(0.8), report(0.7), [report(0.1)], "proxy")
    assert more.recovers is True
    assert more.words.startswith("Recovers more than the proxy control, by 60 points")
    nobody = compared(report(0.8), report(0.7), [], "none")
    assert nobody.recovers is None
    assert "Without a control" in nobody.words
    blind = compared(report(0.0), report(0.0), [report(0.0)], "retrained")
    assert blind.blind
    assert "original" in blind.words
    unknown = compared(report(0.8), report(None), [report(0.1)], "retrained")
    assert unknown.recovers is None


def test_an_attack_runs_in_the_same_way_on_all_models():
    def attack(model):
        return latent_search(model, red_logits, is_red, n=30, steps=30)

    hidden = compare_attack(attack, painter(), painter(0.5), [painter(0.0)])
    assert hidden.control == "retrained"
    assert hidden.recovers is True
    gone = compare_attack(attack, painter(), painter(0.0), [painter(0.0)])
    assert gone.recovers is False
    assert gone.excess == 0
    assert not gone.blind
    # nothing is brighter than white, so that the original cannot draw it
    proxy = compare_attack(
        attack, painter(), painter(), proxy=lambda m: latent_search(
            m, lambda x: red_logits(x) - 99, is_red, n=30, steps=5
        )
    )  # fmt: skip
    assert proxy.control == "proxy"
    assert proxy.recovers is True


def test_reports_become_plain_data():
    one = latent_search(painter(), red_logits, is_red, n=4, steps=2)
    plain = json.loads(json.dumps(one.to_dict()))
    assert plain["n"] == 4
    assert "pictures" not in plain
    assert one.hits == round(one.rate * 4)
    assert one.interval.low <= one.rate <= one.interval.high
    assert report(None).interval is None
    text = json.dumps(compared(one, one, [one], "retrained").to_dict())
    assert json.loads(text)["recovers"] is False
