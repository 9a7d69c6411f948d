from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmforget.attacks.relearning import RelearningSettings
from mmforget.audit.controls import make_controls
from mmforget.audit.protocol import audit
from mmforget.audit.results import Results
from mmforget.audit.scene import AuditSettings
from mmforget.models.classifier import ImageClassifier
from mmforget.request import ForgetRequest

Audited = Callable[..., Any]
EIGHT = [ForgetRequest(classes=(8,))]


@pytest.fixture
def judge(
    original: ImageClassifier, audited: Audited, quick: AuditSettings, digits: Any
) -> Callable[..., Results]:
    """Audits `unlearned` and others beside the original, with the cheapest attack."""
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))

    def run(*others: Any) -> Results:
        return audit([audited(original, "original"), *others], digits, EIGHT, settings)

    return run


def check(results: Results, name: str) -> bool | None:
    return next(check.passed for check in results.checks if check.name == name)


def test_without_retrained_model_the_limits_are_said(
    judge: Callable[..., Results], masked: ImageClassifier, audited: Audited
) -> None:
    found = judge(audited(masked, "unlearned"))
    assert found.verdict.outcome == "forgotten"
    sentence = found.verdict.sentence
    assert "to 0.0 %" in sentence and "unseen images of 'eight'" in sentence
    assert "without a retrained model the audit cannot tell this from a masked output" in sentence
    assert check(found, "linear probe [unlearned]") is None
    assert check(found, "self-check: held-out passes") is None
    assert any("no retrained model was given" in line for line in found.not_measured)


def test_the_untouched_model_is_not_forgotten(
    judge: Callable[..., Results], original: ImageClassifier, audited: Audited
) -> None:
    found = judge(audited(copy.deepcopy(original), "unlearned"))
    assert found.verdict.outcome == "not_forgotten"
    assert found.verdict.sentence.startswith("Not forgotten: accuracy on unseen images of 'eight'")


def test_collateral_damage_is_named(
    judge: Callable[..., Results], masked: ImageClassifier, audited: Audited
) -> None:
    with torch.no_grad():
        masked.head.bias[2] = -1e4
    found = judge(audited(masked, "unlearned"))
    assert found.verdict.outcome == "damaged"
    assert check(found, "keeps the rest [unlearned]") is False
    worst = found.get("worst_class_drop", "unlearned", "test_retain")
    assert worst.details["class"] == "two" and worst.value > 0.9  # type: ignore[operator]


def test_a_held_out_model_that_fails_makes_the_audit_useless(
    judge: Callable[..., Results],
    original: ImageClassifier,
    masked: ImageClassifier,
    retrained: list[ImageClassifier],
    audited: Audited,
) -> None:
    found = judge(
        audited(masked, "unlearned"),
        audited(retrained[0], "retrained"),
        audited(copy.deepcopy(original), "held_out"),
    )
    assert found.verdict.outcome == "not_discriminative"
    assert found.verdict.sentence.startswith("This audit is not discriminative: held-out")
    assert check(found, "self-check: held-out passes") is False


def test_an_original_that_never_knew_makes_the_audit_useless(
    masked: ImageClassifier, audited: Audited, quick: AuditSettings, digits: Any
) -> None:
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))
    models = [audited(masked, "original"), audited(copy.deepcopy(masked), "unlearned")]
    found = audit(models, digits, EIGHT, settings)
    assert found.verdict.outcome == "not_discriminative"
    assert "the original model passes the forgetting check" in found.verdict.sentence


def test_a_control_that_passes_everything_makes_the_audit_useless(
    judge: Callable[..., Results], retrained: list[ImageClassifier], audited: Audited
) -> None:
    """A retrained model in the place of a control cannot be told from the others."""
    found = judge(
        audited(copy.deepcopy(retrained[0]), "unlearned"),
        audited(retrained[0], "retrained", "one"),
        audited(retrained[0], "retrained", "two"),
        audited(retrained[0], "control", "fake"),
    )
    assert found.verdict.outcome == "not_discriminative"
    assert "control 'fake', which only fakes forgetting, passes" in found.verdict.sentence


def test_several_unlearned_models_get_the_worst_outcome(
    judge: Callable[..., Results],
    original: ImageClassifier,
    masked: ImageClassifier,
    audited: Audited,
) -> None:
    found = judge(
        audited(masked, "unlearned", "good"), audited(copy.deepcopy(original), "unlearned", "bad")
    )
    assert found.verdict.outcome == "not_forgotten"
    assert "good: forgotten in its answers" in found.verdict.sentence
    outcomes = {entry.name: entry.details["outcome"] for entry in found.models}
    assert outcomes["good"] == "forgotten" and outcomes["bad"] == "not_forgotten"


def test_concept_removal_aims_at_chance(
    original: ImageClassifier,
    masked: ImageClassifier,
    audited: Audited,
    quick: AuditSettings,
    digits: Any,
) -> None:
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))
    requests = [replace(EIGHT[0], goal="concept_removal")]
    models = [audited(original, "original"), audited(masked, "unlearned")]
    found = audit(models, digits, requests, settings)
    assert found.verdict.outcome == "forgotten"
    row = found.get("accuracy", "unlearned", "test_forget")
    assert (row.direction, row.target) == ("closer_to_value", 0.0)
    assert any("chance level 10.0 %" in check.text for check in found.checks)


@pytest.mark.slow
def test_the_reference_run_of_the_protocol(
    reference: dict[str, ImageClassifier],
    random_labels: ImageClassifier,
    audited: Audited,
    digits: Any,
) -> None:
    """Only what held in every seed of the reference run is asserted."""
    controls = make_controls(reference["original"], digits, max_epochs=10)
    mask = next(control for control in controls if control.entry.name == "logit mask")
    models = [
        audited(reference["original"], "original"),
        audited(mask.model, "unlearned", "mask"),
        audited(random_labels, "unlearned", "random labels"),
        *(audited(reference[f"retrained {i}"], "retrained", f"retrained {i}") for i in range(1, 5)),
        audited(reference["held-out"], "held_out"),
        *controls,
    ]
    attack = RelearningSettings(
        learning_rates=(1e-3, 1e-2, 5e-2), steps=40, evaluate_every=1, batch_size=50
    )
    found = audit(models, digits, EIGHT, AuditSettings(relearning=attack))
    gone = "test_forgotten"

    def value(metric: str, model: str, split: str = gone) -> float:
        result = found.get(metric, model, split).value
        assert result is not None
        return result

    oracles = [f"retrained {i}" for i in range(1, 5)]
    for metric in ("js_to_retrained", "zrf", "cka_to_retrained"):
        band = [value(metric, oracle) for oracle in oracles]
        assert min(band) - 0.05 <= value(metric, "held_out") <= max(band) + 0.05, metric
    assert value("accuracy", "mask", "test_forget") == 0.0
    assert value("js_to_retrained", "original") > 0.6
    assert value("cka_to_retrained", "mask") < min(value("cka_to_retrained", o) for o in oracles)
    recall = sum(value("probe_recall", oracle) for oracle in oracles) / 4
    assert value("probe_recall", "mask") > recall
    steps = [value("relearn_steps_full", oracle) for oracle in oracles]
    assert value("relearn_steps_full", "mask") < min(steps)
    zrf = sum(value("zrf", oracle) for oracle in oracles) / 4
    assert value("zrf", "random labels") > zrf + 0.3
    checks = {check.name: check.passed for check in found.checks}
    assert checks["self-check: original fails"] is True
    assert checks["self-check: held-out passes"] is True
    assert checks["self-check: control logit mask fails"] is True
    assert checks["self-check: control head only fails"] is True
    assert checks["features like retrained [mask]"] is False
    assert "its features differ from those of retrained models" in found.verdict.sentence
