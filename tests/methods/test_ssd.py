"""SSD: selection, dampening, refusals, warnings, line search."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from mmforget.errors import ConfigurationError, DivergenceError, NoOpError
from mmforget.methods import SSD
from mmforget.models import ImageClassifier, state_hash
from mmforget.request import ForgetRequest
from mmforget.testing.conformance import accuracy, quiet_trainer, whole
from mmforget.testing.patterns import PatternData, pattern_model


def forget_data(batch_size: int = 16, **request) -> PatternData:
    data = PatternData(batch_size=batch_size, view="statistics")
    data.request(ForgetRequest(**(request or {"classes": (1,)})))
    return data


def passed(method: SSD, data: PatternData) -> SSD:
    """The method after its pass over the data."""
    quiet_trainer(max_epochs=1).fit(method, datamodule=data.restricted(method.access))
    return method


@pytest.fixture
def model() -> ImageClassifier:
    return pattern_model()


def with_sums(model: ImageClassifier, forget: list[float], both: list[float], **settings) -> SSD:
    """A method whose first weights have given mean importances, and all others none.

    Five of ten samples are forgotten, so that the ceiling is 2.
    """
    method = SSD(model, **settings)
    method.counts.copy_(torch.tensor([5.0, 5.0]))
    size = len(forget)
    method.sums[0, :size] = 5 * torch.tensor(forget, dtype=torch.float64)
    method.sums[1, :size] = 10 * torch.tensor(both, dtype=torch.float64) - method.sums[0, :size]
    return method


def first_weights(model: ImageClassifier, size: int) -> torch.Tensor:
    return next(model.parameters()).detach().reshape(-1)[:size].clone()


def test_selection_is_strict_and_dampening_is_capped(model):
    with torch.no_grad():
        next(model.parameters()).fill_(2.0)
    # ratios:        1.5 (= alpha)  1.6     1.9        0       0 / 0
    method = with_sums(model, [1.5, 1.6, 0.19, 0.0, 0.0], [1.0, 1.0, 0.1, 1.0, 0.0], alpha=1.5)
    result = method.finalize()
    expected = torch.tensor([2.0, 2 / 1.6, 2 / 1.9, 2.0, 2.0])
    torch.testing.assert_close(first_weights(result, 5), expected)
    assert method.statistics()["selected"] == 2
    others = list(zip(model.parameters(), result.parameters(), strict=True))[1:]
    assert all(torch.equal(a, b) for a, b in others)


def test_dampening_never_enlarges(model):
    with torch.no_grad():
        next(model.parameters()).fill_(2.0)
    method = with_sums(model, [1.6, 1.9], [1.0, 1.0], alpha=1.5, lam=1.7)
    found = first_weights(method.finalize(), 2)
    torch.testing.assert_close(found, torch.tensor([2.0, 2 * 1.7 / 1.9]))


def test_a_weight_that_only_the_forget_set_uses_is_zeroed_against_the_retain_set(model):
    # all of the importance is the forget set's: I_r = 0
    method = with_sums(model, [1.0, 1.0], [0.5, 0.9], alpha=5.0, reference="D_r")
    result = method.finalize()
    assert first_weights(result, 1) == 0
    assert torch.equal(first_weights(result, 2)[1], first_weights(model, 2)[1])


def test_both_references_select_the_same_weights_at_the_same_relative_threshold(model):
    both = passed(SSD(model, alpha_rel=0.3), forget_data())
    rest = SSD(model, alpha_rel=0.3, reference="D_r")
    rest.sums.copy_(both.sums)
    rest.counts.copy_(both.counts)
    both.finalize()
    rest.finalize()
    share = both.statistics()["forget_share"]
    assert both.statistics()["alpha"] == pytest.approx(0.3 / share)
    assert rest.statistics()["alpha"] == pytest.approx(0.3 / share * (1 - share) / 0.7)
    assert both.statistics()["selected"] == rest.statistics()["selected"] > 0


def test_the_ratio_has_a_ceiling(model):
    method = passed(SSD(model, kind="empirical_fisher", reference="D"), forget_data())
    forget, reference = method.importances()
    ratio = (forget / reference)[reference > 0]
    assert float(ratio.max()) <= 5 + 1e-6  # a fifth is forgotten
    assert method.counts.tolist() == [31, 124]


@pytest.mark.parametrize("kind", ["empirical_fisher", "abs_l2_output"])
def test_the_result_is_identical_for_any_batch_size(model, kind):
    hashes = {
        state_hash(passed(SSD(model, kind=kind, alpha_rel=0.2), forget_data(size)).finalize())
        for size in (7, 16, 155)
    }
    assert len(hashes) == 1


def test_a_threshold_above_the_ceiling_is_refused_before_any_work(model):
    method = SSD(model, alpha=10)
    with pytest.raises(NoOpError, match=r"`alpha` is 10, .* cannot exceed 5 when 31 of 155"):
        passed(method, forget_data())
    assert method.cost()["sample_passes"] == 0
    assert not method.sums.any()


def test_an_empty_selection_found_after_the_pass_is_refused(model):
    method = passed(SSD(model, alpha=4.99), forget_data())
    with pytest.raises(NoOpError, match=r"no importance ratio exceeds 4\.99"):
        method.finalize()


def test_a_pass_without_data_is_refused(model):
    with pytest.raises(ConfigurationError, match="0 forget and 0 retain samples"):
        SSD(model).finalize()


def test_nothing_can_be_gained_from_a_model_that_is_not_finite(model):
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(DivergenceError, match="SSD: the importance is not finite at step 3"):
        passed(SSD(model), forget_data())


def test_the_default_reads_no_labels(model):
    method = SSD(model)
    assert not method.access.forget_labels
    assert not method.access.retain_labels
    assert SSD(model, kind="empirical_fisher").access.forget_labels
    data = forget_data().restricted(method.access)
    assert "label" not in next(iter(data.train_dataloader()))


def test_quantile_needs_no_threshold(model):
    method = passed(SSD(model), forget_data())
    method.finalize()
    report = method.statistics()
    # ln(1 + 100 * 0.2) = 3.04 percent of the weights with any importance
    assert 0.02 < report["selected_fraction"] <= 0.0305
    assert report["alpha"] > 1


def test_random_samples_give_a_warning(model, caplog):
    data = forget_data(samples=tuple(range(0, 150, 11)))
    method = passed(SSD(model), data)
    with caplog.at_level(logging.WARNING, logger="mmforget"):
        method.finalize()
    assert any("looks like all data" in record.message for record in caplog.records)


def test_importance_owned_by_the_forget_set_gives_a_warning(model, caplog):
    method = with_sums(model, [1.9, 1.8, 1.7], [1.0, 1.0, 1.0], alpha_rel=0.9)
    with caplog.at_level(logging.WARNING, logger="mmforget"):
        method.finalize()
    assert any("may destroy the model" in record.message for record in caplog.records)


def test_search_stops_at_the_first_threshold_that_forgets(model):
    data = forget_data()
    method = passed(SSD(model, search=True, target=0.5, max_drop=0.1), data)
    result = method.finalize()
    trials = method.statistics()["search"]
    assert trials[-1]["forget"] <= 0.5
    assert all(trial["forget"] > 0.5 for trial in trials[:-1])
    assert [t["alpha_rel"] for t in trials] == [0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1][
        : len(trials)
    ]
    assert accuracy(result, whole(data.subset("val", "forget"))) == trials[-1]["forget"]
    # the weights are those of one edit, not of all trials one after the other
    share = method.statistics()["forget_share"]
    direct = SSD(model, alpha=trials[-1]["alpha_rel"] / share)
    direct.sums.copy_(method.sums)
    direct.counts.copy_(method.counts)
    assert state_hash(direct.finalize()) == state_hash(result)


def test_search_refuses_to_lose_more_than_allowed(model):
    method = passed(SSD(model, search=True, target=-1.0, max_drop=0.02), forget_data())
    before = state_hash(method.model)
    with pytest.raises(NoOpError, match=r"within `max_drop` 0\.02"):
        method.finalize()
    assert state_hash(method.model) == before


def test_frozen_parameters_stay(model):
    model.network.blocks[0].requires_grad_(False)
    method = passed(SSD(model, alpha_rel=0.2), forget_data())
    result = method.finalize()
    frozen = zip(
        model.network.blocks[0].parameters(), result.network.blocks[0].parameters(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in frozen)
    named = method.statistics()["selected_fraction_by_layer"]
    assert named
    assert not any("blocks.0." in name for name in named)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fisher"}, "`kind` is 'fisher'"),
        ({"reference": "D_f"}, "`reference` is 'D_f'"),
        ({"alpha_rel": 1.0}, "`alpha_rel` is 1.0, it must lie between 0 and 1"),
        ({"alpha": 0.0}, "`alpha` is 0.0"),
        ({"lam": -1.0}, "`lam` is -1.0"),
        ({"alpha_rel": 0.3, "alpha": 2.0}, "`alpha_rel` and `alpha` both choose the threshold"),
        ({"search": True, "alpha": 2.0}, "`alpha` and `search` both choose the threshold"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SSD(model, **settings)
