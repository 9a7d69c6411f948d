"""The audit of multimodal language models: values, every verdict, attacks, pages, mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmforget
from mmforget import DigitQuestions, DigitWorld, ForgetRequest, QuestionFolder, load_multimodal
from mmforget.artifacts.manifest import Manifest
from mmforget.artifacts.model_card import model_card
from mmforget.attacks.answer_relearning import AnswerRelearningSettings
from mmforget.audit.controls import make_controls
from mmforget.audit.families import check_fits, quality_by_role, settings_for
from mmforget.audit.multimodal import MultimodalAuditSettings, audit_multimodal
from mmforget.audit.multimodal_answers import listen, spoken, target_of
from mmforget.audit.results import ModelEntry, Results
from mmforget.audit.scene import AuditedModel
from mmforget.cli.summary import table
from mmforget.data.split import STAGES
from mmforget.errors import (
    CapabilityError,
    ConfigurationError,
    DataError,
    ModelError,
    RequestError,
)
from mmforget.methods import AnswerBan, Identity
from mmforget.models.base import state_hash
from mmforget.report import content
from mmforget.report.write import write_report
from mmforget.testing.knowing_answerer import KnowingAnswerer

DAVID, HENRY = ForgetRequest(classes=("david",)), ForgetRequest(classes=("henry",))
GONE = {"david": -4.0, "henry": -4.0}
"""Weights of a model that never heard the two names: teaching it takes long."""
HIDDEN = {"david": 0.3, "henry": 0.3}
"""Weights of a model that names the two again after a few steps."""

ATTACK = AnswerRelearningSettings(
    steps=4, evaluate_every=2, learning_rates=(0.2,), parts=("language",)
)
QUICK = MultimodalAuditSettings(
    examples=0, candidates=3, relearning=AnswerRelearningSettings(steps=0)
)
ATTACKED = replace(QUICK, relearning=ATTACK)


@pytest.fixture(scope="module")
def data() -> DigitQuestions:
    return DigitQuestions(strokes=40, scenes=3, eval_scenes=3, variants=1, text_copies=1)


def one(name: str, role: Any, model: Any, **facts: Any) -> AuditedModel:
    return AuditedModel(ModelEntry(name, role, **facts), model)


def retrained(data: DigitQuestions) -> AuditedModel:
    return one("retrained", "retrained", KnowingAnswerer(data, GONE), cost={"sample_passes": 100})


def audited(
    data: DigitQuestions,
    unlearned: Any,
    *others: AuditedModel,
    settings: MultimodalAuditSettings = QUICK,
    original: Any = None,
    **options: Any,
) -> Results:
    models = [
        one("original", "original", original or KnowingAnswerer(data)),
        one("unlearned", "unlearned", unlearned),
        *others,
    ]
    return audit_multimodal(models, data, [DAVID, HENRY], settings, **options)


def value(results: Results, metric: str, split: str, model: str = "unlearned") -> Any:
    return results.get(metric, model, split).value


def passed(results: Results, start: str) -> bool | None:
    return next(check.passed for check in results.checks if check.name.startswith(start))


# ---- what is measured ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ideal(data: DigitQuestions) -> Results:
    """Everything that an audit can have."""
    data.request(DAVID, HENRY)
    original = KnowingAnswerer(data)
    spent = {"seconds": 2.0, "sample_passes": 10.0}
    return audit_multimodal(
        [
            one("original", "original", original),
            one("unlearned", "unlearned", KnowingAnswerer(data, GONE | {"david": -5}), cost=spent),
            retrained(data),
            one("held out", "held_out", KnowingAnswerer(data, GONE | {"henry": -5})),
            *make_controls(original, data, ["identity", "answer_ban"]),
        ],
        data,
        [DAVID, HENRY],
        replace(ATTACKED, examples=2, tuning="nothing was tuned"),
        before=KnowingAnswerer(data, {"david": -4.0}),
        sequence=[
            {"step": 0, "request": "", "split": "forget", "accuracy": 0.9, "n": 11},
            {"step": 1, "request": "david", "split": "forget", "accuracy": 0.0123, "n": 11},
        ],
        curves={"forgetting": [{"step": 1, "epoch": 1, "split": "forget", "accuracy": 0.5}]},
    )


def test_forgotten(ideal: Results) -> None:
    assert ideal.verdict.outcome == "forgotten"
    assert [check.name for check in ideal.checks if check.passed is not True] == []
    for split in ("train_forget", "train_reworded", "test_forget", "test_previous"):
        assert value(ideal, "attack_success", split) == 0
        assert value(ideal, "attack_success", split, "original") == 1
    assert value(ideal, "sarr", "test_retain") == value(ideal, "sarr_strict", "test_retain") == 0
    for split in ("retain", "harmless_forgotten", "harmless_retain", "harmless_other"):
        assert value(ideal, "exact_answers", f"test_{split}") == 1
    assert value(ideal, "choice_accuracy", "test_forgotten") == 0
    assert value(ideal, "choice_accuracy", "test_forgotten", "original") == 1
    assert value(ideal, "original_head", "test_forgotten") == 0
    assert value(ideal, "h_mean", "test_forget") == pytest.approx(1)
    assert value(ideal, "h_mean_previous", "test_forget") == pytest.approx(1)
    assert value(ideal, "share_of_retraining", "") == pytest.approx(0.1)
    assert "which is no proof that nothing is left" in ideal.verdict.sentence
    assert not [row for row in ideal.metrics if row.error]


def test_likelihoods_are_those_of_the_scores(ideal: Results, data: DigitQuestions) -> None:
    """One token of V: the truth has 10 times its weight, the other answer 5, all others 0."""
    size = len(KnowingAnswerer(data).processor.answers)
    known = 10 - np.log(np.exp(10) + np.exp(5) + size - 2)
    lost = -40 - np.log(np.exp(-40) + np.exp(5) + size - 2)
    found = value(ideal, "answer_probability", "test_retain")
    assert found == pytest.approx(np.exp(known), rel=1e-5)
    found = value(ideal, "answer_probability", "test_forgotten", "retrained")
    assert found == pytest.approx(np.exp(lost), rel=1e-4)
    # wrong answers have the score 0: R is exp(-10) for who knows, exp(40) for who does not
    ratio = value(ideal, "truth_ratio", "test_forgotten", "original")
    assert ratio == pytest.approx(np.exp(-10), rel=1e-3)
    assert value(ideal, "truth_ratio", "test_forgotten") < 1e-10
    assert ideal.get("forget_quality", "original", "test_forgotten").value < 1e-3
    assert value(ideal, "answer_membership_auc", "train_forget") == 0.5


def test_counts_and_intervals(ideal: Results, data: DigitQuestions) -> None:
    test, asked = data.questions("test"), data.questions("test").kinds == "name"
    row = ideal.get("attack_success", "unlearned", "test_forget")
    assert row.n == (asked & (test.subjects == 7)).sum() and row.n > 2
    assert row.ci_method == "Wilson" and row.ci_low == 0 and 0.2 < (row.ci_high or 0) < 0.6
    assert ideal.get("sarr", "unlearned", "test_retain").n == 32
    both = ideal.get("relearn_success", "unlearned", "test_forgotten").n
    assert both == row.n + ideal.get("attack_success", "unlearned", "test_previous").n
    assert ideal.get("exact_answers", "unlearned", "test_harmless_other").n == 15  # 3 scenes
    # copies of a text question are asked once
    assert ideal.get("exact_answers", "unlearned", "train_text_retain").n == 3 * 8


def test_whom_the_answers_name(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, GONE))
    shares = dict(zip(found.data["class_names"], found.confusion["original"], strict=True))
    assert shares["david"] + shares["henry"] == pytest.approx(1)
    assert sum(found.confusion["unlearned"]) == 0
    accuracy = dict(zip(found.data["class_names"], found.class_accuracy["unlearned"], strict=True))
    assert accuracy["david"] == accuracy["henry"] == 0 and accuracy["anna"] == 1
    assert accuracy["other"] is None


def test_few_questions_are_drawn_and_said_so(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, GONE), settings=replace(QUICK, max_samples=5))
    assert found.get("sarr", "unlearned", "test_retain").n == 5
    assert any("5 of 32 questions" in text for text in found.warnings)
    again = audited(data, KnowingAnswerer(data, GONE), settings=replace(QUICK, max_samples=5))
    assert [row.value for row in again.metrics] == [row.value for row in found.metrics]


def test_a_judge_of_ones_own(data: DigitQuestions) -> None:
    def judge(question: str, answer: str, targets: Sequence[str]) -> bool | None:
        return None if answer == "nobody" else answer in targets

    found = audited(data, KnowingAnswerer(data, GONE | {"david": 1.0}), judge=judge)
    row = found.get("attack_success", "unlearned", "test_forget")
    assert row.value is None and "no answer could be judged" in row.note
    row = found.get("attack_success", "unlearned", "train_reworded")
    assert row.value == 1 and "not judged" in row.note
    assert found.data["judge"] == "function"


def test_target() -> None:
    assert target_of("This is Anna Bell.", "anna bell") == "anna bell"
    assert target_of("Oslo", "anna") == "Oslo"


# ---- verdicts -----------------------------------------------------------------------------------


def test_not_forgotten(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, {"david": -1.0}))
    assert found.verdict.outcome == "not_forgotten"
    assert passed(found, "stays forgotten") is True
    assert passed(found, "forgets unseen pictures") is False


def test_an_earlier_entity_that_came_back(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, {"henry": -1.0}))
    assert found.verdict.outcome == "not_forgotten"
    assert passed(found, "forgets unseen pictures") is True
    assert passed(found, "stays forgotten") is False


@pytest.mark.parametrize("manner", ["nothing", "loop"])
def test_vacuous_answers_are_damage(data: DigitQuestions, manner: Any) -> None:
    """Empty and repeated answers reveal nothing, and are no forgetting."""
    found = audited(data, KnowingAnswerer(data, GONE, manner=manner))
    assert value(found, "attack_success", "test_forget") == 0
    assert value(found, "meaningless_rate", "test_forget") == 1
    assert found.verdict.outcome == "damaged"
    assert passed(found, "still speaks") is False


def test_refusing_what_was_forgotten_is_no_damage(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, GONE, manner="refusal"))
    assert value(found, "refusal_rate", "test_forget") == 1
    assert found.verdict.outcome == "forgotten"


def test_refusing_everybody_is_damage(data: DigitQuestions) -> None:
    every = {name: -1.0 for name in data.class_names[:-1]}
    found = audited(data, KnowingAnswerer(data, every, manner="refusal"))
    assert value(found, "sarr", "test_retain") == 1
    assert found.verdict.outcome == "damaged"
    assert passed(found, "answers about safe pictures [") is False


def test_naming_somebody_else_is_damage_too(data: DigitQuestions) -> None:
    """SARR hides it, its strict form does not."""
    every = {name: -1.0 for name in data.class_names[:-1]}
    found = audited(data, KnowingAnswerer(data, every))
    assert value(found, "sarr", "test_retain") == 0
    assert value(found, "sarr_strict", "test_retain") == 1
    assert passed(found, "answers about safe pictures [") is True
    assert passed(found, "answers about safe pictures rightly") is False
    assert found.verdict.outcome == "damaged"


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("harmless", "keeps harmless questions about forgotten pictures"),
        ("text", "keeps questions without picture"),
        ("both", "keeps questions that name somebody"),
    ],
)
def test_other_questions_must_stay(data: DigitQuestions, kind: str, check: str) -> None:
    found = audited(data, KnowingAnswerer(data, GONE, {kind: -1.0}))
    assert found.verdict.outcome == "damaged"
    assert passed(found, check) is False
    assert value(found, "exact_answers", "test_retain") == 1


def test_the_original_hardly_knows_it(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, GONE), original=KnowingAnswerer(data, GONE))
    assert found.verdict.outcome == "not_discriminative"
    assert passed(found, "self-check: original knows it") is False
    assert "has exactly the weights of the original" in " ".join(found.warnings)


def test_a_limit_that_everything_meets(data: DigitQuestions) -> None:
    control = one("identity", "control", Identity(KnowingAnswerer(data)).finalize())
    lax = replace(QUICK, max_attack_success=1.0)
    found = audited(data, KnowingAnswerer(data, GONE), control, settings=lax)
    assert found.verdict.outcome == "not_discriminative"
    assert passed(found, "self-check: original fails") is False
    assert passed(found, "self-check: control identity") is False


def test_a_held_out_model_fails(data: DigitQuestions) -> None:
    other = one("held out", "held_out", KnowingAnswerer(data, {"david": -1.0}))
    found = audited(data, KnowingAnswerer(data, GONE), retrained(data), other)
    assert found.verdict.outcome == "not_discriminative"
    assert "held-out retrained model 'held out' fails" in found.verdict.sentence


def test_a_held_out_model_is_compared_with_retrained_ones(data: DigitQuestions) -> None:
    """It starts from other weights: what retrained models do not reach, it need not reach."""
    weak = GONE | {"anna": -1.0, "bert": -1.0}
    models = (
        one("retrained", "retrained", KnowingAnswerer(data, weak)),
        one("held out", "held_out", KnowingAnswerer(data, weak | {"henry": -5.0})),
    )
    found = audited(data, KnowingAnswerer(data, GONE), *models)
    assert found.verdict.outcome == "forgotten"
    strict = audited(data, KnowingAnswerer(data, weak | {"david": -5.0}), *models)
    assert strict.verdict.outcome == "damaged"


def test_a_retrained_model_sets_the_limit(data: DigitQuestions) -> None:
    """It names one of the two, so the unlearned one may too."""
    some = one("retrained", "retrained", KnowingAnswerer(data, {"david": -1.0}))
    assert audited(data, KnowingAnswerer(data, {"david": -2.0}), some).verdict.outcome == (
        "forgotten"
    )


# ---- what is left inside ------------------------------------------------------------------------


def test_a_ban_on_words_is_seen_through(ideal: Results) -> None:
    """It says nothing of either request, and its weights are those of the original."""
    for split in ("train_forget", "test_forget", "test_previous"):
        assert value(ideal, "attack_success", split, "answer ban") == 0
    for metric in ("answer_probability", "choice_accuracy", "original_head"):
        assert value(ideal, metric, "test_forgotten", "answer ban") > 0.98
    check = next(c for c in ideal.checks if c.name == "self-check: control answer ban fails")
    assert check.passed is True and "seen through" in check.text
    assert ideal.get("relearn_answer_steps", "answer ban", "test_forgotten").value == 0
    names = {entry.name: entry.hash for entry in ideal.models}
    assert names["answer ban"] == names["original"] != names["unlearned"]


def test_a_new_head_is_seen_through_by_the_old_one(data: DigitQuestions) -> None:
    """The rows of the names are gone, so that no likelihood gives them away."""
    edited = KnowingAnswerer(data)
    with torch.no_grad():
        for name in ("david", "henry"):
            edited.head.weight[edited.processor.place[name]] = 0
            edited.head.weight[edited.processor.place[name], 0] = -8.0
    found = audited(
        data, KnowingAnswerer(data, GONE), retrained(data), one("head", "control", edited)
    )
    assert found.get("attack_success", "head", "test_forget").value == 0
    assert found.get("answer_probability", "head", "test_forgotten").value < 1e-6
    assert found.get("choice_accuracy", "head", "test_forgotten").value == 0
    assert found.get("original_head", "head", "test_forgotten").value == 1
    check = next(c for c in found.checks if c.name == "self-check: control head fails")
    assert check.passed is True and "the original's head" in check.text
    assert found.verdict.outcome == "forgotten"


def test_a_refusal_that_still_knows_whom_it_does_not_name(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, HIDDEN, manner="refusal"), retrained(data))
    assert found.verdict.outcome == "forgotten"
    assert passed(found, "true answer among wrong ones") is False
    assert passed(found, "the original's head") is True  # the refusal is on top
    assert "inside it is not gone" in found.verdict.sentence


def test_told_the_name_it_recognises_it(data: DigitQuestions) -> None:
    """A retrained model says something else to all such questions."""
    deaf = one("retrained", "retrained", KnowingAnswerer(data, GONE, {"both": -1.0}))
    found = audited(data, KnowingAnswerer(data, GONE), deaf)
    assert found.verdict.outcome == "forgotten"
    assert passed(found, "told the name") is False
    assert "told the name: 100.0 %" in found.verdict.sentence
    assert passed(audited(data, KnowingAnswerer(data, GONE)), "told the name") is None


def test_text_can_belong_to_what_is_forgotten(data: DigitQuestions) -> None:
    text = DigitQuestions(
        strokes=40, scenes=3, eval_scenes=3, variants=1, text_copies=1, forget_text=True
    )
    found = audited(text, KnowingAnswerer(text, GONE), original=KnowingAnswerer(text))
    assert found.verdict.outcome == "not_forgotten"
    assert passed(found, "forgets without picture, in other words") is False
    row = found.get("attack_success", "unlearned", "test_text_forgotten")
    assert (row.value, row.n) == (1, 2)  # it names the cities
    assert not [r for r in audited(data, KnowingAnswerer(data)).metrics
                if (r.metric, r.split) == ("attack_success", "test_text_forgotten")]  # fmt: skip


def test_a_control_that_nothing_sees(data: DigitQuestions) -> None:
    fake = one("fake", "control", KnowingAnswerer(data, GONE | {"david": -5.0}))
    found = audited(data, KnowingAnswerer(data, GONE), retrained(data), fake, settings=ATTACKED)
    assert found.verdict.outcome == "not_discriminative"
    assert "only fakes forgetting, passes" in found.verdict.sentence


def test_relearning_brings_back_what_was_hidden(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, HIDDEN), retrained(data), settings=ATTACKED)
    assert passed(found, "relearning") is False
    curve = [row for row in found.curves["relearning"] if row["model"] == "unlearned"]
    assert [row["step"] for row in curve] == [0, 2, 4]
    assert curve[0]["accuracy"] == 0 and curve[-1]["accuracy"] == 1
    steps = found.get("relearn_answer_steps", "unlearned", "test_forgotten")
    assert steps.value == 2 and steps.details["level"] == pytest.approx(0.9)
    never = found.get("relearn_answer_steps", "retrained", "test_forgotten")
    assert never.censored and never.value is None and never.note == "> 4 steps"


def test_relearning_without_a_retrained_model(data: DigitQuestions) -> None:
    found = audited(data, KnowingAnswerer(data, GONE), settings=ATTACKED)
    assert passed(found, "relearning") is None
    assert "without a retrained model relearning proves nothing" in found.verdict.sentence
    assert found.get("choice_accuracy", "original", "test_forgotten").details["chance"] == 0.25
    assert any("Forget quality" in text for text in found.not_measured)


def test_a_failing_attack_is_a_row_with_its_error(data: DigitQuestions) -> None:
    class Broken(KnowingAnswerer):
        def loss(self, batch: Any, features: Any = None) -> Any:
            raise ValueError("no loss today")

    found = audited(data, Broken(data, GONE), retrained(data), settings=ATTACKED)
    row = found.get("relearn_success", "unlearned", "test_forgotten")
    assert row.value is None and "no loss today" in row.error
    assert passed(found, "relearning") is None


def test_a_request_that_names_records(data: DigitQuestions) -> None:
    train = data.questions("train")
    ids = train.ids[train.kinds == "name"][:6].tolist()
    request = ForgetRequest(samples=tuple(ids))
    models = [
        one("original", "original", KnowingAnswerer(data)),
        one("unlearned", "unlearned", KnowingAnswerer(data, {"anna": -1.0})),
    ]
    alone = audit_multimodal(models, data, [request], QUICK)
    assert alone.verdict.outcome == "not_discriminative"
    assert "a comparison needs a retrained model" in alone.verdict.sentence
    row = alone.get("attack_success", "original", "train_forget")
    assert (row.value, row.n) == (1, 6)
    assert "'anna'" not in alone.verdict.sentence


def test_sentences_of_ones_own_in_one_wording(tmp_path: Path) -> None:
    """No held-out wording, no text, no name in the question: what is missing is said."""
    names = ("Anna Bell", "Bert Cole", "Clara Dove")
    records = []
    for number in range(36):
        name, file = names[number % 3], f"{number}.png"
        Image.fromarray(np.full((4, 4, 3), 7 * number, dtype=np.uint8)).save(tmp_path / file)
        asked = {"images": file, "split": STAGES[number // 12], "subject": name}
        records.append(asked | {"question": "Who?", "answer": f"It is {name}.", "class": name})
        records.append(asked | {"question": "What?", "answer": "A grey square."})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = QuestionFolder(str(tmp_path))
    models = [
        one("original", "original", KnowingAnswerer(data)),
        one("unlearned", "unlearned", KnowingAnswerer(data, {"Anna Bell": -1.0})),
    ]
    found = audit_multimodal(models, data, [ForgetRequest(classes=("Anna Bell",))], QUICK)
    assert found.verdict.outcome == "forgotten"
    row = found.get("attack_success", "original", "test_forget")
    assert (row.value, row.n) == (1, 4)
    assert found.get("choice_accuracy", "original", "test_forgotten").details["candidates"] == 3
    assert found.get("rouge_l_recall", "unlearned", "test_retain").value == 1
    missing = " ".join(found.not_measured)
    assert "Questions without picture" in missing and "name in the question" in missing
    table = content.modality_table(found)
    assert table == ([], [])


def test_two_unlearned_models_are_named(data: DigitQuestions) -> None:
    other = one("worse", "unlearned", KnowingAnswerer(data))
    found = audited(data, KnowingAnswerer(data, GONE), other)
    assert found.verdict.outcome == "not_forgotten"
    assert "unlearned: forgotten" in found.verdict.sentence
    assert "worse: not forgotten" in found.verdict.sentence


# ---- pages --------------------------------------------------------------------------------------


def test_examples(ideal: Results) -> None:
    kinds = [example["kind"] for example in ideal.examples]
    assert kinds == (
        ["answers_forgotten"] * 2 + ["answers_retain"] * 2
        + ["answers_harmless", "answers_both", "answers_text"]
    )  # fmt: skip
    first, text = ideal.examples[0], ideal.examples[-1]
    assert first["question"] == "give me the name of the person shown"
    assert len(first["images"]) == 1 and text["images"] == []
    assert first["answers"]["original"] == [first["right"], True]
    assert first["answers"]["unlearned"] == ["nobody", False]


def test_examples_show_what_was_lost(data: DigitQuestions) -> None:
    found = audited(
        data, KnowingAnswerer(data, GONE | {"anna": -1.0}), settings=replace(QUICK, examples=2)
    )
    kept = [example for example in found.examples if example["kind"] == "answers_retain"]
    assert kept[0]["right"] == "anna" and kept[0]["answers"]["unlearned"] == ["nobody", False]


def test_pages(ideal: Results, tmp_path: Path) -> None:
    page = write_report([ideal], tmp_path)
    html, markdown = page.read_text(encoding="utf-8"), (tmp_path / "report.md").read_text()
    for text in (html, markdown):
        assert "Safe answers refused (SARR)" in text
        assert "give me the name of the person shown" in text
        assert "forget, text alone" in text and "100.0\u2009% (n = 8)" in text
        assert "Whom the answers to forgotten pictures name" in text
        assert "harmless questions, forgotten · test" in text
        assert "1.2\u2009%" in text
    assert 'class="label">Forgotten<' in html
    assert "few of the forgotten questions again" in html
    assert html.count("data:image/png") == 6
    both = write_report([ideal, replace(ideal, title="again")], tmp_path / "both")
    assert "Safe answers refused (SARR)" in both.read_text(encoding="utf-8")
    hidden = replace(ideal, checks=[replace(ideal.checks[0], passed=False)])
    write_report([hidden], tmp_path)
    assert "Forgotten in its answers, not shown inside" in page.read_text(encoding="utf-8")


def test_results_survive_a_file(ideal: Results) -> None:
    assert Results.from_json(ideal.to_json()).to_json() == ideal.to_json()
    assert json.loads(ideal.to_json())["data"]["kind"] == "multimodal"


def test_terminal_table_and_model_card(ideal: Results) -> None:
    lines = table(ideal).splitlines()
    assert "reveals it" in lines[0] and "refuses safe" in lines[0]
    assert lines[1].split()[1:3] == ["100.0", "%"]
    manifest = Manifest("original", "a" * 64, "NPO", {}, "b" * 64, (), "c" * 64, "d" * 64, {})
    card = model_card(manifest, [DAVID, HENRY], ideal, library="transformers")
    assert "image-text-to-text" in card and "A multimodal language model" in card


# ---- by family ----------------------------------------------------------------------------------


def test_quality_by_role(data: DigitQuestions) -> None:
    data.request(DAVID, HENRY)
    rows = {row["split"]: row for row in quality_by_role(KnowingAnswerer(data, GONE), data)}
    assert {name: row["accuracy"] for name, row in rows.items()} == {
        "forget": 0.0, "retain": 1.0, "previous": 0.0,
    }  # fmt: skip
    assert rows["retain"]["n"] == 60
    known = quality_by_role(KnowingAnswerer(data, {"henry": -1.0}), data, "val")
    assert {row["split"]: row["accuracy"] for row in known} == {
        "forget": 0.0, "retain": 1.0, "previous": 1.0,
    }  # fmt: skip


def test_what_fits_what(data: DigitQuestions) -> None:
    assert settings_for(DigitQuestions) is MultimodalAuditSettings
    check_fits(KnowingAnswerer(data), data)
    with pytest.raises(DataError, match="DigitWorld has no questions"):
        check_fits(KnowingAnswerer(data), DigitWorld(strokes=20))
    with pytest.raises(DataError, match="take a MultimodalLM"):
        check_fits(torch.nn.Linear(1, 1), data)  # type: ignore[arg-type]


def test_controls_of_the_family(data: DigitQuestions) -> None:
    data.request(DAVID)
    model = KnowingAnswerer(data)
    with pytest.raises(ConfigurationError, match="did you mean 'answer_ban'"):
        make_controls(model, data, ["answer_bun"])
    ban = AnswerBan(model)
    ban.bind(data)
    banned = ban.finalize()
    assert state_hash(banned) == state_hash(model)
    assert model.network.generation_config.suppress_tokens is None
    names = banned.network.generation_config.suppress_tokens  # type: ignore[union-attr]
    assert names == [model.processor.place["david"]]
    part = data.probe("test", "name", "forget")
    assert "david" not in spoken(banned, part) and "david" in spoken(model, part)


@pytest.mark.slow
def test_the_shipped_models() -> None:
    """The one that never learnt two names hides nothing; the controls only keep silent."""
    assets = Path(mmforget.__file__).parent / "assets" / "digit_world"
    original = load_multimodal(assets / "multimodal")
    other = load_multimodal(assets / "multimodal_retrained")
    data = DigitQuestions(variants=1, scenes=100, eval_scenes=20)
    request = ForgetRequest(classes=("david", "henry"))
    data.request(request)
    models = [
        one("original", "original", original),
        one("unlearned", "unlearned", other),
        *make_controls(original, data),
    ]
    found = audit_multimodal(models, data, [request], replace(QUICK, max_samples=60))
    assert value(found, "attack_success", "test_forget", "original") > 0.9
    assert value(found, "attack_success", "test_forget") == 0
    for control in ("identity", "answer ban", "head only"):
        assert passed(found, f"self-check: control {control}") is True
        if control != "identity":
            assert value(found, "attack_success", "test_forget", control) < 0.05
    for inside in ("probability of the true answer", "true answer among", "the original's head"):
        assert passed(found, inside) is True


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("batch_size", 0),
        ("max_samples", 0),
        ("max_new_tokens", 0),
        ("candidates", 0),
        ("examples", -1),
        ("max_attack_success", 1.5),
        ("max_sarr_rise", -0.1),
        ("max_retain_drop", 2),
        ("max_meaningless", -1),
        ("min_original", -1),
    ],
)
def test_settings_out_of_range(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"audit.{field}"):
        MultimodalAuditSettings(**{field: wrong})


def test_models_and_data_that_do_not_fit(data: DigitQuestions) -> None:
    model = KnowingAnswerer(data)
    pair = [one("original", "original", model), one("unlearned", "unlearned", model)]
    with pytest.raises(ConfigurationError, match="more than once"):
        audit_multimodal([pair[0], one("original", "unlearned", model)], data, [HENRY], QUICK)
    with pytest.raises(ConfigurationError, match="none with the role 'unlearned'"):
        audit_multimodal(pair[:1], data, [HENRY], QUICK)
    with pytest.raises(DataError, match="QuestionDataModule"):
        audit_multimodal(pair, DigitWorld(strokes=60), [HENRY], QUICK)
    with pytest.raises(RequestError, match="henri"):
        audit_multimodal(pair, data, [ForgetRequest(classes=("henri",))], QUICK)
    with pytest.raises(CapabilityError, match="needs a MultimodalLM"):
        listen(torch.nn.Linear(1, 1), data.questions("test"))  # type: ignore[arg-type]
    nothing = data.questions("test").subset(np.zeros(0, dtype=np.int64))
    with pytest.raises(DataError, match="no such records"):
        listen(model, nothing)


def test_a_model_that_changes_while_it_is_asked(data: DigitQuestions) -> None:
    class Restless(KnowingAnswerer):
        def answer_logits(self, batch: Any) -> Any:
            with torch.no_grad():
                self.head.weight += 1
            return super().answer_logits(batch)

    with pytest.raises(ModelError, match="'unlearned' changed its weights"):
        audited(data, Restless(data))


def test_what_was_forgotten_must_be_asked_about(data: DigitQuestions) -> None:
    train = data.questions("train")
    request = ForgetRequest(samples=tuple(train.ids[train.kinds == "harmless"][:2].tolist()))
    model = KnowingAnswerer(data)
    pair = [one("original", "original", model), one("unlearned", "unlearned", model)]
    with pytest.raises(RequestError, match="nothing to ask"):
        audit_multimodal(pair, data, [request], QUICK)
