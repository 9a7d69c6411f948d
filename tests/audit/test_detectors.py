"""The audit of detectors: exact values, every verdict, relearning, pictures, pages, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmforget import DigitScenes, DigitWorld, ForgetRequest
from mmforget.artifacts.manifest import Manifest
from mmforget.artifacts.model_card import model_card
from mmforget.attacks.detector_relearning import DetectorRelearningSettings
from mmforget.audit.detector_pictures import drawn
from mmforget.audit.detectors import DetectorAuditSettings, audit_detector
from mmforget.audit.results import ModelEntry, Results
from mmforget.audit.scene import AuditedModel
from mmforget.cli.summary import table
from mmforget.errors import ConfigurationError, DataError, RequestError
from mmforget.methods import Identity, LogitMask
from mmforget.models.base import state_hash
from mmforget.report.write import write_report
from mmforget.testing.knowing_detector import KnowingDetector

THREE, SEVEN = ForgetRequest(classes=("three",)), ForgetRequest(classes=("seven",))
GONE = {"three": -1.0, "seven": -1.0}
"""Weights of a model that never saw the two: teaching it takes long."""
HIDDEN = {"three": -0.05, "seven": -0.05}
"""Weights of a model that finds the two again after a few steps."""

ATTACK = DetectorRelearningSettings(
    shots=2,
    steps=6,
    evaluate_every=3,
    learning_rates=(0.05,),
    head_learning_rates=(),
    evaluation_images=30,
)
QUICK = DetectorAuditSettings(
    replicates=0, examples=0, relearning=DetectorRelearningSettings(steps=0)
)
ATTACKED = replace(QUICK, relearning=ATTACK)


@pytest.fixture(scope="module")
def data() -> DigitScenes:
    return DigitScenes(scenes=26, eval_scenes=26)


def one(name: str, role: Any, model: Any, **facts: Any) -> AuditedModel:
    return AuditedModel(ModelEntry(name, role, **facts), model)


def audited(
    data: DigitScenes,
    unlearned: Any,
    *others: AuditedModel,
    settings: DetectorAuditSettings = QUICK,
    original: Any = None,
    **options: Any,
) -> Results:
    models = [
        one("original", "original", original or KnowingDetector(data)),
        one("unlearned", "unlearned", unlearned),
        *others,
    ]
    return audit_detector(models, data, [THREE, SEVEN], settings, **options)


def value(results: Results, metric: str, split: str, model: str = "unlearned") -> Any:
    return results.get(metric, model, split).value


def passed(results: Results, start: str) -> bool | None:
    return next(check.passed for check in results.checks if check.name.startswith(start))


def retrained(data: DigitScenes) -> AuditedModel:
    return one("retrained", "retrained", KnowingDetector(data, GONE), cost={"sample_passes": 100})


# ---- what is measured ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ideal(data: DigitScenes) -> Results:
    """Everything that an audit can have."""
    data.request(THREE, SEVEN)
    mask = LogitMask(KnowingDetector(data))
    mask.bind(data)
    spent = {"seconds": 2.0, "sample_passes": 10.0}
    return audit_detector(
        [
            one("original", "original", KnowingDetector(data)),
            one(
                "unlearned", "unlearned", KnowingDetector(data, GONE | {"three": -1.1}), cost=spent
            ),
            retrained(data),
            one("held out", "held_out", KnowingDetector(data, GONE | {"seven": -1.1})),
            one("identity", "control", KnowingDetector(data)),
            one("logit mask", "control", mask.finalize()),
        ],
        data,
        [THREE, SEVEN],
        replace(ATTACKED, replicates=50, examples=1, tuning="nothing was tuned"),
        before=KnowingDetector(data, {"three": -1.0}),
        sequence=[
            {"step": 0, "request": "", "split": "forget", "accuracy": 0.9, "n": 11},
            {"step": 1, "request": "three", "split": "forget", "accuracy": 0.0123, "n": 11},
        ],
        curves={"forgetting": [{"step": 1, "epoch": 1, "split": "forget", "accuracy": 0.5}]},
    )


def test_forgotten(ideal: Results) -> None:
    assert ideal.verdict.outcome == "forgotten"
    assert all(check.passed for check in ideal.checks)
    assert value(ideal, "average_precision", "test_forget") == 0
    assert value(ideal, "average_precision", "test_previous") == 0
    assert value(ideal, "average_precision", "test_forgotten") == 0
    assert value(ideal, "average_precision", "test_class_seven") == 0
    assert value(ideal, "average_precision", "test_retain") == pytest.approx(1)
    assert value(ideal, "average_precision_50", "test_retain") == pytest.approx(1)
    assert value(ideal, "average_precision", "test_class_zero") == pytest.approx(1)
    assert value(ideal, "average_precision_drop", "test_retain") == pytest.approx(0)
    assert value(ideal, "h_mean", "test_forget") == pytest.approx(1)
    assert value(ideal, "h_mean_previous", "test_forget") == pytest.approx(1)
    assert value(ideal, "found_rate", "test_forgotten") == 0
    assert value(ideal, "found_rate", "test_retain") == 1
    assert value(ideal, "vanished_rate", "test_forgotten") == 1
    assert value(ideal, "moved_rate", "test_forgotten") == 0
    assert value(ideal, "false_boxes", "test") == 0
    assert value(ideal, "share_of_retraining", "") == pytest.approx(0.1)
    assert "which is no proof that nothing is left" in ideal.verdict.sentence
    assert not [row for row in ideal.metrics if row.error]


def test_the_original_finds_everything(ideal: Results) -> None:
    for split in ("test_forget", "test_previous", "test_retain", "test_forgotten"):
        assert value(ideal, "average_precision", split, "original") == pytest.approx(1)
    objects = value(ideal, "false_boxes", "test", "original") * 26
    assert objects == pytest.approx(ideal.get("found_rate", "original", "test_forgotten").n)


def test_counts_and_intervals(ideal: Results, data: DigitScenes) -> None:
    marks = data.dataset("test").annotations  # type: ignore[attr-defined]
    counts = {
        split: ideal.get("average_precision", "unlearned", split).n
        for split in ("test_forget", "test_previous", "test_retain", "test_forgotten")
    }
    assert counts["test_forget"] == (marks.labels == 7).sum()
    assert counts["test_previous"] == (marks.labels == 3).sum()
    assert counts["test_forgotten"] == counts["test_forget"] + counts["test_previous"]
    assert sum(counts.values()) - counts["test_forgotten"] == len(marks.labels)
    beside, apart = (
        ideal.get("neighbour_average_precision", "unlearned", f"test_retain_{where}").n
        for where in ("beside", "apart")
    )
    assert beside and apart and beside + apart == counts["test_retain"]
    row = ideal.get("average_precision", "original", "test_retain")
    assert (row.ci_low, row.ci_high) == (pytest.approx(1), pytest.approx(1))
    assert "bootstrap over images" in row.ci_method
    assert ideal.get("found_rate", "unlearned", "test_forgotten").ci_method == "Wilson"


def test_sizes(ideal: Results) -> None:
    sizes = [row.split for row in ideal.metrics if row.split.startswith("test_retain_s")]
    assert "test_retain_small" in sizes


def test_no_model_is_changed(data: DigitScenes) -> None:
    models = [KnowingDetector(data), KnowingDetector(data, GONE)]
    before = [state_hash(model) for model in models]
    audited(data, models[1], original=models[0], settings=ATTACKED)
    assert [state_hash(model) for model in models] == before


def test_moved_objects_and_where_they_go(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, moved={"three": "eight", "seven": "one"}))
    assert value(found, "moved_rate", "test_forgotten") == 1
    assert value(found, "vanished_rate", "test_forgotten") == 0
    row = found.get("moved_rate", "unlearned", "test_forgotten")
    assert set(row.details["taken_for"]) == {"eight", "one"}
    assert sum(row.details["taken_for"].values()) == row.n
    shares = dict(zip(found.data["class_names"], found.confusion["unlearned"], strict=True))
    assert shares["eight"] > 0 and shares["one"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_false_boxes_are_counted_anywhere(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, GONE, false="seven"))
    assert value(found, "false_boxes", "test") == 1
    assert value(found, "found_rate", "test_forgotten") == 0
    below = audited(
        data, KnowingDetector(data, GONE, false="seven"), settings=replace(QUICK, score=0.95)
    )
    assert value(below, "false_boxes", "test") == 0


def test_boxes_beside_the_object_lose_precision_at_high_overlaps(data: DigitScenes) -> None:
    """A shift by a quarter of the width leaves an overlap of 0.6: the levels 0.50 to 0.60."""
    found = audited(data, KnowingDetector(data, GONE, shift=0.24))
    assert value(found, "average_precision", "test_retain") == pytest.approx(0.3, abs=0.02)
    assert value(found, "average_precision_50", "test_retain") == pytest.approx(1, abs=0.02)


# ---- verdicts -----------------------------------------------------------------------------------


def test_not_forgotten(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, {"three": -1.0}))
    assert found.verdict.outcome == "not_forgotten"
    assert passed(found, "stays forgotten") is True
    assert passed(found, "forgets") is False
    assert found.verdict.sentence.startswith("Not forgotten")


def test_an_earlier_class_that_came_back(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, {"seven": -1.0}))
    assert found.verdict.outcome == "not_forgotten"
    assert passed(found, "forgets") is True
    assert passed(found, "stays forgotten") is False


def test_objects_that_are_still_found_are_not_forgotten(data: DigitScenes) -> None:
    """Their boxes are so badly framed that the average precision is next to nothing."""
    found = audited(
        data,
        KnowingDetector(data, shift=0.3),
        settings=replace(QUICK, max_average_precision=0.15, max_retain_drop=1, max_class_drop=1),
    )
    assert value(found, "average_precision", "test_forget") < 0.15
    assert passed(found, "forgets") is True
    assert passed(found, "is not found") is False
    assert found.verdict.outcome == "not_forgotten"


def test_damaged_as_a_whole(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, GONE, shift=0.03))
    lost = value(found, "average_precision_drop", "test_retain")
    assert 0.02 < lost <= 0.2
    assert found.verdict.outcome == "damaged"
    assert passed(found, "keeps the rest") is False
    assert "retained classes suffered" in found.verdict.sentence


def test_damaged_in_one_class(data: DigitScenes) -> None:
    found = audited(
        data,
        KnowingDetector(data, GONE | {"four": 0.0}),
        settings=replace(QUICK, max_retain_drop=0.2),
    )
    row = found.get("worst_class_precision_drop", "unlearned", "test_retain")
    assert (row.value, row.note) == (pytest.approx(1), "four")
    assert passed(found, "keeps the rest") is True
    assert passed(found, "keeps every class") is False
    assert found.verdict.outcome == "damaged"


def test_the_original_hardly_finds_it(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, GONE), original=KnowingDetector(data, GONE))
    assert found.verdict.outcome == "not_discriminative"
    assert passed(found, "self-check: original finds the class") is False
    assert "has exactly the weights of the original" in " ".join(found.warnings)


def test_the_original_passes(data: DigitScenes) -> None:
    """A limit that everything meets tells nothing."""
    lax = replace(QUICK, max_average_precision=1.0, max_found_rate=1.0)
    identity = Identity(KnowingDetector(data)).finalize()
    found = audited(
        data, KnowingDetector(data, GONE), one("identity", "control", identity), settings=lax
    )
    assert found.verdict.outcome == "not_discriminative"
    assert passed(found, "self-check: original fails") is False
    assert passed(found, "self-check: control identity") is False


def test_a_held_out_model_fails(data: DigitScenes) -> None:
    other = one("held out", "held_out", KnowingDetector(data, {"three": -1.0}))
    found = audited(data, KnowingDetector(data, GONE), retrained(data), other)
    assert found.verdict.outcome == "not_discriminative"
    assert "held-out retrained model 'held out' fails" in found.verdict.sentence


def test_a_held_out_model_is_compared_with_retrained_ones(data: DigitScenes) -> None:
    """It starts from other weights: what retrained models do not reach, it need not reach."""
    weak = GONE | {"four": 0.0}
    models = (
        one("retrained", "retrained", KnowingDetector(data, weak)),
        one("held out", "held_out", KnowingDetector(data, weak | {"seven": -2.0})),
    )
    found = audited(data, KnowingDetector(data, GONE), *models)
    assert found.verdict.outcome == "forgotten"
    strict = audited(data, KnowingDetector(data, weak | {"three": -2.0}), *models)
    assert strict.verdict.outcome == "damaged"


def test_a_retrained_model_sets_the_limit(data: DigitScenes) -> None:
    """It finds the class now and then, so the unlearned one may too."""
    some = one("retrained", "retrained", KnowingDetector(data, {"three": -1.0}))
    found = audited(data, KnowingDetector(data, {"three": -2.0}), some)
    assert found.verdict.outcome == "forgotten"


def test_a_mask_that_relearning_sees(ideal: Results) -> None:
    assert passed(ideal, "self-check: control logit mask") is True
    assert value(ideal, "relearn_average_precision", "test_forgotten", "logit mask") > 0.9
    assert value(ideal, "relearn_average_precision", "test_forgotten", "retrained") == 0


def test_a_mask_that_relearning_misses(data: DigitScenes) -> None:
    """The control is as slow as a retrained model: this attack sees nothing inside."""
    fake = one("mask", "control", KnowingDetector(data, GONE | {"three": -1.5}))
    found = audited(data, KnowingDetector(data, GONE), retrained(data), fake, settings=ATTACKED)
    assert found.verdict.outcome == "not_discriminative"
    assert "only fakes forgetting, passes" in found.verdict.sentence


def test_without_relearning_nothing_inside_was_looked_at(data: DigitScenes) -> None:
    data.request(THREE, SEVEN)
    mask = LogitMask(KnowingDetector(data))
    mask.bind(data)
    control = one("logit mask", "control", mask.finalize())
    found = audited(data, KnowingDetector(data, GONE), retrained(data), control)
    assert found.verdict.outcome == "forgotten"
    assert passed(found, "self-check: control logit mask") is None
    assert passed(found, "relearning") is None
    assert "nothing inside was looked at" in found.verdict.sentence
    assert any("nothing inside was looked at" in text for text in found.not_measured)


def test_relearning_brings_back_what_was_hidden(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, HIDDEN), retrained(data), settings=ATTACKED)
    assert found.verdict.outcome == "forgotten"
    assert passed(found, "relearning") is False
    assert "bring back more of it than in a retrained model" in found.verdict.sentence
    curve = [row for row in found.curves["relearning"] if row["model"] == "unlearned"]
    assert [row["step"] for row in curve] == [0, 3, 6]
    assert curve[0]["accuracy"] == 0 < curve[-1]["accuracy"]


def test_which_boxes_the_attacker_has(data: DigitScenes) -> None:
    """With all boxes he also strengthens a weak retained class; else it stays as it is."""
    weak = KnowingDetector(data, HIDDEN | {"zero": 0.01})
    left = []
    for boxes in ("all", "forgotten"):
        attack = replace(ATTACK, boxes=boxes, shots=8)
        found = audited(data, weak, settings=replace(QUICK, relearning=attack))
        row = found.get("relearn_average_precision", "unlearned", "test_forgotten")
        left.append(row.details["retained"])
    assert left[1] < left[0]


def test_relearning_without_a_retrained_model(data: DigitScenes) -> None:
    found = audited(data, KnowingDetector(data, HIDDEN), settings=ATTACKED)
    assert passed(found, "relearning") is None
    assert "cannot tell whether that is remembered or learnt anew" in found.verdict.sentence


def test_a_request_that_names_images(data: DigitScenes) -> None:
    ids = data.dataset("train").ids[:6].tolist()
    request = ForgetRequest(samples=tuple(ids))
    models = [
        one("original", "original", KnowingDetector(data)),
        one("unlearned", "unlearned", KnowingDetector(data, {"three": -1.0})),
    ]
    alone = audit_detector(models, data, [request], QUICK)
    assert alone.verdict.outcome == "not_discriminative"
    assert "a comparison needs a retrained model" in alone.verdict.sentence
    row = alone.get("average_precision", "original", "train_forget")
    assert row.value == pytest.approx(1)
    assert not [r for r in alone.metrics if r.metric == "false_boxes"]
    assert "'three'" not in alone.verdict.sentence.split("on retained")[0]


def test_two_unlearned_models_are_named(data: DigitScenes) -> None:
    other = one("worse", "unlearned", KnowingDetector(data))
    found = audited(data, KnowingDetector(data, GONE), other)
    assert found.verdict.outcome == "not_forgotten"
    assert "unlearned: forgotten" in found.verdict.sentence
    assert "worse: not forgotten" in found.verdict.sentence


# ---- pictures and pages -------------------------------------------------------------------------


def test_pictures_of_each_kind(ideal: Results, data: DigitScenes) -> None:
    kinds = [example["kind"] for example in ideal.examples]
    assert "boxes_both" in kinds and "boxes_changed" in kinds
    for example in ideal.examples:
        assert set(example["images"]) == {"original", "unlearned", "retrained"}
        assert example["labelled"] == example["images"]["original"] or example["labelled"]
    both = next(e for e in ideal.examples if e["kind"] == "boxes_both")
    assert both["images"]["original"] != both["images"]["unlearned"]
    changed = next(e for e in ideal.examples if e["kind"] == "boxes_changed")
    assert changed["images"]["original"] == changed["images"]["unlearned"]
    place = int(np.flatnonzero(data.dataset("test").ids == both["id"])[0])
    held = data.dataset("test").classes
    assert held is not None and held[place, [3, 7]].any() and held[place].sum() > 1


def test_small_scenes_are_enlarged(ideal: Results) -> None:
    import base64
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(ideal.examples[0]["labelled"])))
    assert image.size == (480, 480)  # six times as large


def test_pages_call_it_average_precision(ideal: Results, tmp_path: Path) -> None:
    page = write_report([ideal], tmp_path)
    html, markdown = page.read_text(encoding="utf-8"), (tmp_path / "report.md").read_text()
    for text in (html, markdown):
        assert "Average precision after every request" in text
        assert "Average precision while forgetting" in text
        assert "Test average precision per class" in text
        assert "What forgotten objects are now taken for" in text
        assert "1.2\u2009%" in text
        assert "retain, beside forgotten objects" in text
        assert "class seven" in text
        assert "accuracy" not in text.lower()
    assert "Average precision while relearning the forgotten classes" in html
    assert "labelled boxes" in html and "Images with forgotten and retained objects" in html
    assert "a score of 0.30" in " ".join(html.split())
    assert 'class="label">Forgotten<' in html
    hidden = replace(ideal, checks=[replace(ideal.checks[0], passed=False)])
    write_report([hidden], tmp_path)
    assert "but boxes bring it back" in page.read_text(encoding="utf-8")


def test_results_survive_a_file(ideal: Results) -> None:
    assert Results.from_json(ideal.to_json()).to_json() == ideal.to_json()
    assert json.loads(ideal.to_json())["data"]["kind"] == "detection"


def test_terminal_table(ideal: Results) -> None:
    lines = table(ideal).splitlines()
    assert "AP retained" in lines[0] and "AP relearned" in lines[0]
    assert lines[1].split()[-5:-2] == ["%", "100.0", "%"]
    assert "0.0 %" in lines[2]


def test_model_card(ideal: Results) -> None:
    manifest = Manifest("original", "a" * 64, "GSLoRA", {}, "b" * 64, (), "c" * 64, "d" * 64, {})
    card = model_card(manifest, [THREE, SEVEN], ideal, library="transformers")
    assert "object-detection" in card and "An object detector" in card


def test_comparison_of_two_audits(ideal: Results, tmp_path: Path) -> None:
    page = write_report([ideal, replace(ideal, title="again")], tmp_path)
    assert "Average precision" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("count", "named"), [(8, True), (9, False)])
def test_in_a_crowd_only_what_was_forgotten_is_named(count: int, named: bool) -> None:
    image, boxes = torch.zeros(3, 64, 64), torch.tensor([[4.0, 20.0, 30.0, 50.0]]).repeat(count, 1)

    def picture(names: tuple[str, str], label: int) -> str:
        scene: Any = SimpleNamespace(class_names=names, forgotten_classes=(1,))
        return drawn(scene, image, boxes, [label] * count, [])

    assert (picture(("one", "two"), 0) != picture(("ten", "two"), 0)) == named
    assert picture(("one", "two"), 1) != picture(("one", "six"), 1)


def test_no_pictures_if_none_are_wanted(data: DigitScenes) -> None:
    assert audited(data, KnowingDetector(data, GONE)).examples == []


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("batch_size", 0),
        ("score", 1.5),
        ("replicates", 10),
        ("replicates", -1),
        ("examples", -1),
        ("max_average_precision", -0.1),
        ("max_retain_drop", 2),
        ("min_original", -1),
    ],
)
def test_settings_out_of_range(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"audit.{field}"):
        DetectorAuditSettings(**{field: wrong})


def test_models_and_data_that_do_not_fit(data: DigitScenes) -> None:
    model = KnowingDetector(data)
    pair = [one("original", "original", model), one("unlearned", "unlearned", model)]
    with pytest.raises(ConfigurationError, match="more than once"):
        audit_detector([pair[0], one("original", "unlearned", model)], data, [SEVEN], QUICK)
    with pytest.raises(ConfigurationError, match="none with the role 'unlearned'"):
        audit_detector(pair[:1], data, [SEVEN], QUICK)
    with pytest.raises(DataError, match="DetectionDataModule"):
        audit_detector(pair, DigitWorld(strokes=60), [SEVEN], QUICK)
    with pytest.raises(RequestError, match="sevn"):
        audit_detector(pair, data, [ForgetRequest(classes=("sevn",))], QUICK)


def test_a_failing_attack_is_a_row_with_its_error(data: DigitScenes) -> None:
    class Broken(KnowingDetector):
        def training_loss(self, batch: Any) -> Any:
            raise ValueError("no loss today")

    found = audited(data, Broken(data, GONE), retrained(data), settings=ATTACKED)
    row = found.get("relearn_average_precision", "unlearned", "test_forgotten")
    assert row.value is None and "no loss today" in row.error
    assert passed(found, "relearning") is None
    assert "the relearning attack failed" in found.verdict.sentence
