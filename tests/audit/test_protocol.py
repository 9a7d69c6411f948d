from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmforget.audit.controls import make_controls
from mmforget.audit.protocol import accuracies, audit
from mmforget.audit.results import Results
from mmforget.audit.scene import AuditSettings
from mmforget.errors import ConfigurationError
from mmforget.models.base import state_hash
from mmforget.models.classifier import ImageClassifier
from mmforget.request import ForgetRequest

Audited = Callable[..., Any]
EIGHT = [ForgetRequest(classes=(8,))]


@pytest.fixture(scope="module")
def results(
    original: ImageClassifier,
    retrained: list[ImageClassifier],
    audited: Audited,
    quick: AuditSettings,
    make_digits: Callable[..., Any],
) -> Results:
    """The masked original as unlearned model, two retrained models, two controls."""
    data = make_digits()
    controls = make_controls(original, data, ("identity", "logit_mask"))
    models = [
        audited(original, "original"),
        audited(controls[1].model, "unlearned", cost={"seconds": 1.0, "sample_passes": 30.0}),
        *(
            audited(model, "retrained", f"retrained {i}", cost={"sample_passes": 300.0})
            for i, model in enumerate(retrained, 1)
        ),
        *controls,
    ]
    sequence = [{"step": 0, "request": "", "split": "forget", "accuracy": 1.0, "n": 64}]
    curve = [{"step": 1, "epoch": 0, "split": "forget", "accuracy": 0.5}]
    return audit(models, data, EIGHT, quick, sequence=sequence, curves={"forgetting": curve})


def test_nothing_failed(results: Results) -> None:
    assert [(row.metric, row.model, row.error) for row in results.metrics if row.error] == []


def test_every_value_lies_in_its_range_and_interval(results: Results) -> None:
    for row in results.metrics:
        where = (row.metric, row.model, row.split)
        if row.value is None:
            assert row.note, where
            continue
        assert row.low is None or row.value >= row.low - 1e-9, where
        assert row.high is None or row.value <= row.high + 1e-9, where
        if row.ci_low is not None and "maximum" not in row.note:
            assert row.ci_high is not None and row.ci_method
            assert row.ci_low - 1e-6 <= row.value <= row.ci_high + 1e-6, where
        assert row.family == "cost" or row.n, where


def test_results_survive_json(results: Results) -> None:
    again = Results.from_json(results.to_json())
    assert json.loads(again.to_json()) == json.loads(results.to_json())


def test_accuracies_are_those_of_the_models(
    results: Results, original: ImageClassifier, digits: Any
) -> None:
    test = digits.dataset("test")
    batch = test[list(range(len(test)))]
    with torch.no_grad():
        hits = original(batch["image"]).argmax(1) == batch["label"]
    gone = batch["label"] == 8
    assert results.get("accuracy", "original", "test_forget").value == pytest.approx(
        float(hits[gone].double().mean())
    )
    assert results.get("accuracy", "original", "test_retain").n == int((~gone).sum())
    assert results.get("accuracy", "unlearned", "test_forget").value == 0.0


def test_a_masked_output_looks_perfect_outside_and_untouched_inside(results: Results) -> None:
    assert results.get("h_mean", "unlearned", "test_forget").value > 0.8  # type: ignore[operator]
    assert results.get("h_mean", "identity", "test_forget").value == 0.0
    probe = [results.get("probe_recall", m, "test_forgotten") for m in ("unlearned", "original")]
    assert probe[0].value == probe[1].value
    assert results.get("cka_to_original", "unlearned", "test_forgotten").value == pytest.approx(1)
    assert results.get("changed_parameters", "identity").value == 0.0


def test_cost_is_compared_with_retraining(results: Results) -> None:
    assert results.get("share_of_retraining", "unlearned").value == pytest.approx(0.1)
    assert results.get("seconds", "unlearned").value == 1.0


def test_membership_is_declared_untestable(results: Results) -> None:
    """The model hardly memorises: an attack that sees nothing must not certify anything."""
    value = results.get("membership_validity", "original", "train_retain").value
    assert value is not None and value < 0.55
    check = next(check for check in results.checks if check.name == "membership [unlearned]")
    assert check.passed is None and "not testable" in check.text
    assert any("Privacy: not testable" in line for line in results.not_measured)


def test_the_report_has_its_other_parts(results: Results) -> None:
    assert results.class_accuracy["unlearned"][8] == 0.0
    assert sum(results.confusion["original"]) == pytest.approx(1)
    assert results.confusion["original"][8] > 0.8
    assert results.confusion["unlearned"][8] == 0.0
    assert results.sequence[0]["accuracy"] == 1.0
    assert results.curves["forgetting"][0]["epoch"] == 0
    for key in ("relearning", "relearning_head"):
        assert {row["model"] for row in results.curves[key]} == {e.name for e in results.models}
    assert any("U-LiRA" in line for line in results.not_measured)
    assert results.not_claimed and results.provenance["versions"]["torch"]
    assert results.data["forget_classes"] == ["eight"]


def test_pictures_are_of_the_right_kind(results: Results) -> None:
    from PIL import Image

    kinds = [row["kind"] for row in results.examples]
    assert kinds == ["forgotten"] * 2 + ["most_changed_retained"] * 2
    for row in results.examples:
        picture = Image.open(io.BytesIO(base64.b64decode(row["image"])))
        assert picture.size == (8, 8)
        assert (row["label"] == "eight") == (row["kind"] == "forgotten")
        assert row["predictions"].keys() == {entry.name for entry in results.models}


def test_models_are_untouched_and_the_order_of_samples_does_not_matter(
    original: ImageClassifier,
    masked: ImageClassifier,
    retrained: list[ImageClassifier],
    audited: Audited,
    quick: AuditSettings,
    make_digits: Callable[..., Any],
) -> None:
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))
    models = [
        audited(original, "original"),
        audited(masked, "unlearned"),
        audited(retrained[0], "retrained"),
    ]
    hashes = [state_hash(one.model) for one in models]
    found = [
        audit(models, make_digits(backwards=backwards), EIGHT, settings)
        for backwards in (False, True)
    ]
    assert [state_hash(one.model) for one in models] == hashes
    rows = [{(r.metric, r.model, r.split): r for r in one.metrics} for one in found]
    assert rows[0].keys() == rows[1].keys()
    for key, row in rows[0].items():
        other = rows[1][key]
        assert (row.value, row.ci_low, row.ci_high) == (other.value, other.ci_low, other.ci_high)
    assert found[0].verdict == found[1].verdict


def test_a_network_that_cannot_be_rebuilt_gives_rows_with_errors(
    original: ImageClassifier, audited: Audited, quick: AuditSettings, digits: Any
) -> None:
    given = ImageClassifier(copy.deepcopy(original.network), num_classes=10).eval()
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))
    models = [audited(given, "original"), audited(given, "unlearned")]
    found = audit(models, digits, EIGHT, settings)
    row = found.get("zrf", "original", "test_forgotten")
    assert row.value is None and row.error.startswith("ModelError")
    assert any("no randomly initialised anchor" in line for line in found.warnings)
    assert any("exactly the weights of the original" in line for line in found.warnings)
    assert any("measurements failed" in line for line in found.not_measured)
    assert found.get("accuracy", "unlearned", "test_retain").value is not None
    assert found.verdict.outcome == "not_forgotten"


def test_samples_and_earlier_requests(
    original: ImageClassifier,
    masked: ImageClassifier,
    audited: Audited,
    quick: AuditSettings,
    digits: Any,
) -> None:
    train = digits.dataset("train")
    some = train.ids[np.flatnonzero(train.labels == 1)[:20]].tolist()
    requests = [*EIGHT, ForgetRequest(samples=tuple(some))]
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))
    models = [audited(original, "original"), audited(masked, "unlearned")]
    found = audit(models, digits, requests, settings, before=masked)
    assert found.get("accuracy", "unlearned", "test_previous").value == 0.0
    assert found.get("accuracy", "unlearned", "train_forget").n == 20
    first = found.get("h_mean", "unlearned", "train_forget")
    last = found.get("h_mean_previous", "unlearned", "train_forget")
    assert first.details["before"] == last.details["before"] == 1.0
    assert found.verdict.outcome == "not_discriminative"  # samples, and no retrained model
    rows = accuracies(masked, digits)
    assert {row["split"]: row["n"] for row in rows} == {
        "forget": 20,
        "retain": len(digits.subset("test", "retain")),
        "previous": len(digits.subset("test", "previous")),
    }


def test_missing_classes_have_their_own_rows(
    original: ImageClassifier,
    masked: ImageClassifier,
    audited: Audited,
    quick: AuditSettings,
    make_digits: Callable[..., Any],
) -> None:
    from mmforget.data.split import Limits

    data = make_digits()
    data.limits = Limits(missing_classes=("two", "five"))
    settings = replace(quick, relearning=replace(quick.relearning, modes=("head",), steps=2))
    found = audit(
        [audited(original, "original"), audited(masked, "unlearned")], data, EIGHT, settings
    )
    both = found.get("accuracy", "original", "test_missing").n
    single = [found.get("accuracy", "original", f"test_missing_{c}").n for c in ("two", "five")]
    assert both == sum(n or 0 for n in single) and min(n or 0 for n in single) > 0


@pytest.mark.parametrize(
    ("roles", "names", "message"),
    [
        (("unlearned",), ("a",), "0 with the role 'original'"),
        (("original", "original", "unlearned"), ("a", "b", "c"), "2 with the role 'original'"),
        (("original",), ("a",), "none with the role 'unlearned'"),
        (("original", "unlearned"), ("a", "a"), "'a' more than once"),
    ],
)
def test_bad_sets_of_models_are_refused(
    roles: tuple[Any, ...],
    names: tuple[str, ...],
    message: str,
    original: ImageClassifier,
    audited: Audited,
    digits: Any,
) -> None:
    models = [audited(original, role, name) for role, name in zip(roles, names, strict=True)]
    with pytest.raises(ConfigurationError, match=message):
        audit(models, digits, EIGHT)


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"train_samples": 0}, {"cka_batch_size": 4}, {"examples": -1}]
)
def test_bad_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        AuditSettings(**change)
