"""The audit of a generator, on the shipped pipeline, judge and CLIP model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmforget
from mmforget import ConceptSpec, DiffusionGenerator
from mmforget.attacks.report import AttackReport
from mmforget.audit.concept_attacks import Recovery
from mmforget.audit.concept_judge import SOMETHING_ELSE, zero_shot
from mmforget.audit.concept_pictures import Readings, facts_in, known_facts, plan
from mmforget.audit.concept_verdict import _withstands
from mmforget.audit.concept_words import NEGATIVE_PROMPT
from mmforget.audit.concepts import (
    ConceptAuditSettings,
    ConceptScene,
    audit_generator,
)
from mmforget.audit.drawing import IDENTITY, render, spread
from mmforget.audit.results import ModelEntry, Results
from mmforget.audit.scene import AuditedModel
from mmforget.errors import ConfigurationError, RequestError
from mmforget.metrics.judge import load_judge
from mmforget.models.clip import load_clip
from mmforget.models.diffusion import load_generator
from mmforget.report.html import render_html
from mmforget.report.markdown import render_markdown

SHIPPED = Path(mmforget.__file__).parent / "assets" / "digit_world" / "diffusion_unet"
RED = ConceptSpec(
    "red",
    synonyms=("scarlet",),
    anchor="white",
    preserve=("green", "blue"),
    templates=("{}", "a {} digit"),
)
QUICK = ConceptAuditSettings(
    pictures=6,
    preserved_pictures=4,
    steps=4,
    together="a {ink} {digit}",
    max_target_rate=0.2,
    examples=2,
)


@pytest.fixture(scope="module")
def original() -> DiffusionGenerator:
    return load_generator(SHIPPED)


@pytest.fixture(scope="module")
def judge() -> Any:
    return load_judge()


@pytest.fixture(scope="module")
def erased(original: DiffusionGenerator) -> DiffusionGenerator:
    return DiffusionGenerator(mmforget.erase(original, RED, max_drift=1.0))


@pytest.fixture(scope="module")
def results(original: DiffusionGenerator, erased: DiffusionGenerator, judge: Any) -> Results:
    return audit_generator(original, erased, RED, judge, load_clip(), QUICK)


def test_the_rates_before_and_after(results: Results) -> None:
    before = results.get("target_rate", "original", "target/red")
    after = results.get("target_rate", "unlearned", "target/red")
    assert before.value is not None and before.value >= 5 / 6
    assert after.value is not None and after.value <= 1 / 6
    assert (after.n, after.ci_method, after.direction) == (6, "Wilson", "lower")
    assert before.details["by_prompt"].keys() == {"red", "a red digit"}
    for split in ("synonym/scarlet", "together/red", "target/red"):
        assert results.get("target_rate", IDENTITY, split).value is not None
    kept = results.get("preserved_rate", "unlearned", "preserved")
    assert kept.value is not None and kept.value >= 0.75 and kept.n == 8
    assert results.verdict.outcome == "forgotten"
    assert "“red” went from" in results.verdict.sentence


def test_summaries_are_made_of_the_rates(results: Results) -> None:
    splits = ("preserved/green", "preserved/blue")
    for model in ("original", "unlearned", NEGATIVE_PROMPT):
        rates = [results.get("preserved_rate", model, split).value or 0.0 for split in splits]
        mean = results.get("preserved_rate", model, "preserved").value
        assert mean == pytest.approx(sum(rates) / 2)
        worst = results.get("preserved_worst", model, "preserved")
        assert worst.value == min(rates)
    drop = results.get("preserved_drop", NEGATIVE_PROMPT, "preserved").value
    means = [
        results.get("preserved_rate", model, "preserved").value or 0.0
        for model in ("original", NEGATIVE_PROMPT)
    ]
    assert drop == pytest.approx(means[0] - means[1])
    gone = [
        1 - (results.get("target_rate", "unlearned", split).value or 0.0)
        for split in ("target/red", "synonym/scarlet")
    ]
    kept = results.get("preserved_rate", "unlearned", "preserved").value or 0.0
    harmonic = 3 / sum(1 / part for part in (*gone, kept))
    assert results.get("erasure_h_mean", "unlearned").value == pytest.approx(harmonic)


def test_distances_and_controls(results: Results) -> None:
    for metric in ("clip_score", "kid_to_original", "paired_change", "empty_pictures"):
        for role in ("target", "preserved"):
            assert results.get(metric, "unlearned", role).error == ""
    change = {
        role: results.get("paired_change", "unlearned", role).value or 0.0
        for role in ("target", "preserved")
    }
    assert change["target"] > 10 * change["preserved"]
    assert [m.role for m in results.models] == ["original", "unlearned", "control", "control"]
    checks = {check.name: check.passed for check in results.checks}
    assert checks["self-check: identity fails"] is True
    assert checks["self-check: judge of “ink”"] is True
    assert checks["keeps the rest [unlearned]"] is True
    assert results.data["judge_accuracy_on_real_pictures"]["ink"] == 1.0
    assert any("Attacks that were not run" in text for text in results.not_measured)


def test_the_same_again_and_through_json(
    results: Results, original: DiffusionGenerator, erased: DiffusionGenerator, judge: Any
) -> None:
    assert Results.from_json(results.to_json()) == results
    scene = ConceptScene(
        [AuditedModel(ModelEntry("o", "original"), original)], [RED], judge, None, QUICK
    )
    rows = scene.rows[:3]
    assert torch.equal(render(original, rows, 0, 4), render(original, rows, 0, 4))
    alone = torch.cat([render(original, [row], 0, 4) for row in rows])
    assert (alone.int() - render(original, rows, 0, 4).int()).abs().max() <= 1


def test_the_report_reads_well(results: Results) -> None:
    html, markdown = render_html(results), render_markdown(results)
    for text in (
        "Erase “red”", "Forgotten", "Pictures that show “red”", "prompts with the synonym",
        "negative prompt", "Empty pictures", "object “red”, also “scarlet”",
    ):  # fmt: skip
        assert text in html and text in markdown, text
    for text in ("What was erased, before and after", "What must stay, before and after"):
        assert text in html
    for text in ("retrained", "Class by class", "What forgotten images are now taken for"):
        assert text not in html.partition("</style>")[2], text
    strips = sum(len(example["images"]) for example in results.examples)
    assert html.count("data:image/png;base64,") == strips == 3 * len(results.examples)


def test_a_changed_nothing_is_not_forgotten(original: DiffusionGenerator, judge: Any) -> None:
    settings = replace(QUICK, controls=(), together="")
    found = audit_generator(original, copy.deepcopy(original), RED, judge, None, settings)
    assert found.verdict.outcome == "not_forgotten"
    assert "'unlearned' has exactly the weights of the original model" in found.warnings
    assert "CLIP score and kernel distance: no CLIP model was given" in found.not_measured
    assert [m.name for m in found.models] == ["original", "unlearned"]


def test_a_ruined_model_is_damaged(original: DiffusionGenerator, judge: Any) -> None:
    ruined = copy.deepcopy(original)
    with torch.no_grad():  # the decoder now paints everything grey
        for parameter in ruined.vae.decoder.conv_out.parameters():
            parameter.zero_()
    settings = replace(QUICK, controls=(), together="", pictures=4)
    found = audit_generator(original, ruined, RED, judge, None, settings)
    assert found.get("empty_pictures", "unlearned", "target").value == 1.0
    assert found.get("empty_pictures", "original", "target").value == 0.0
    assert found.verdict.outcome == "damaged"
    checks = {check.name: check.passed for check in found.checks}
    assert checks["draws pictures at all [unlearned]"] is False


def test_an_unknown_concept_makes_the_audit_say_nothing(
    original: DiffusionGenerator, erased: DiffusionGenerator
) -> None:
    class Blind:
        """Sees no red anywhere, whatever it is shown."""

        factors: Mapping[str, tuple[str, ...]] = {"ink": ("red", "green", "blue")}
        accuracy: Mapping[str, float] = {"ink": 0.5}

        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            return {"ink": torch.tensor([[0.0, 1.0, 0.0]]).expand(len(images), 3)}

    settings = replace(QUICK, controls=(), together="", pictures=2, preserved_pictures=1)
    found = audit_generator(original, erased, RED, Blind(), None, settings)
    assert found.verdict.outcome == "not_discriminative"
    assert "the original model shows “red” in 0.0 %" in found.verdict.sentence
    assert any(text.startswith("concept not represented") for text in found.warnings)
    assert any("reads 'ink' in only 50.0 %" in text for text in found.warnings)


def test_without_judge_and_clip_it_cannot_tell(
    original: DiffusionGenerator, erased: DiffusionGenerator
) -> None:
    settings = replace(QUICK, controls=(), together="", pictures=2, preserved_pictures=1)
    found = audit_generator(original, erased, RED, settings=settings)
    assert found.verdict.outcome == "not_discriminative"
    assert "the audit cannot tell" in found.verdict.sentence
    assert not any(row.metric.endswith("_rate") for row in found.metrics)
    assert (found.get("paired_change", "unlearned", "target").value or 0) > 0
    assert "Rates: neither a judge" in found.not_measured[0]
    render_html(found)
    render_markdown(found)


def test_clip_judges_if_there_is_no_judge(
    original: DiffusionGenerator, erased: DiffusionGenerator
) -> None:
    settings = replace(QUICK, controls=(), together="", pictures=4, preserved_pictures=2)
    found = audit_generator(original, erased, RED, clip=load_clip(), settings=settings)
    assert found.data["judge"] == "zero-shot CLIP"
    before = found.get("target_rate", "original", "target/red").value
    after = found.get("target_rate", "unlearned", "target/red").value
    assert before is not None and after is not None and before > after
    assert json.loads(found.to_json())["data"]["kind"] == "generator"


def test_an_attack_is_a_row_and_a_check(
    original: DiffusionGenerator, erased: DiffusionGenerator, judge: Any
) -> None:
    def recovery(rate: float | None, floor: float | None = None, attack: str = "prompts") -> Any:
        report = AttackReport(attack, "red", (), 0.0, rate, rate, 10, 1, 0.1, "smoke", {}, floor)
        return Recovery(attack, "unlearned", report)

    scene = ConceptScene(
        [AuditedModel(ModelEntry("original", "original"), original)], [RED], judge, None, QUICK
    )
    assert _withstands(scene, recovery(0.0)).passed is True
    assert _withstands(scene, recovery(0.4)).passed is False
    assert _withstands(scene, recovery(0.4, floor=0.5)).passed is True
    assert _withstands(scene, recovery(None)).passed is None
    assert _withstands(scene, recovery(0.9, attack="sdedit")).passed is None
    row = recovery(0.4).measured()
    assert (row.value, row.n) == (0.4, 10) and row.interval is not None
    assert recovery(None).measured().value is None


# ---- prompts -------------------------------------------------------------------------------------


def test_pictures_are_spread_over_sentences() -> None:
    assert spread(["a", "b"], 5) == (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2))
    assert spread(["", ""], 3) == (("", 0), ("", 1), ("", 2))


def test_the_plan(judge: Any) -> None:
    cells = {cell.split: cell for cell in plan([RED], judge, 4, 2, "a {ink} {digit}")}
    assert list(cells) == ["target/red", "synonym/scarlet", "together/red", "preserved/green",
                           "preserved/blue", "unconditional"]  # fmt: skip
    assert cells["target/red"].rows[:2] == (("red", 0), ("a red digit", 0))
    assert cells["synonym/scarlet"].facts == {"ink": "red"}
    assert cells["together/red"].rows[0] == ("a red zero", 0)
    assert cells["together/red"].others[1] == {"digit": "one"}
    with pytest.raises(ConfigurationError, match="the judge has no factor 'inc'"):
        plan([RED], judge, 4, 2, "a {inc} {digit}")


def test_facts(judge: Any) -> None:
    assert facts_in(judge, "A red seven") == {"digit": "seven", "ink": "red"}
    assert facts_in(judge, "sevenfold") == {}
    assert known_facts(judge, "x", ["7", "seven"]) == {"digit": "seven"}
    with pytest.raises(RequestError, match=r"`preserve` has 'sevn', .* did you mean 'seven'"):
        plan([replace(RED, preserve=("sevn",))], judge, 4, 2)


def test_readings(judge: Any, original: DiffusionGenerator) -> None:
    pictures = render(original, [("red", 0), ("green", 0)], 0, 4)
    readings = Readings(judge, pictures)
    assert readings.sees({"ink": "red"}).tolist() == [True, False]
    assert readings.sees_each([{"ink": "red"}, {"ink": "red"}]).tolist() == [True, False]


def test_zero_shot_values() -> None:
    judge = zero_shot(load_clip(), [replace(RED, anchor="white")])
    assert judge.factors["concept"] == ("red", "green", "blue", "white", SOMETHING_ELSE)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pictures": 0}, "`audit.pictures` is 0, it must be at least 1"),
        ({"steps": 0}, "`audit.steps` is 0"),
        ({"max_target_rate": 2}, "must lie in"),
        ({"controls": ("identiti",)}, "did you mean 'identity'"),
        ({"attacks": ("promts",)}, "did you mean 'prompts'"),
        ({"budget": "smok"}, "did you mean 'smoke'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        ConceptAuditSettings(**settings)
