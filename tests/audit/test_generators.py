"""The audit of generators: exact rates, every verdict, attacks with controls, filters, mistakes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmforget.attacks.generator_report import GeneratorAttackReport
from mmforget.audit import generator_attacks
from mmforget.audit.generators import (
    OTHER_LATENTS,
    PURPOSE,
    GANAuditSettings,
    GANScene,
    Seen,
    audit_gan,
    render,
)
from mmforget.audit.results import MetricResult, ModelEntry, Results
from mmforget.audit.scene import AuditedModel
from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, DataError, ModelError, RequestError
from mmforget.metrics.judge import ClipJudge, load_judge
from mmforget.mitigation.rejection_filter import RejectionFilter
from mmforget.models.base import state_hash
from mmforget.models.clip import load_clip
from mmforget.models.gan import ImageGAN
from mmforget.report.write import write_report
from mmforget.testing.picture_bank import digit_bank

SEVEN = ConceptSpec("seven")
FEW = GANAuditSettings(pictures=240, edits=0, examples=2, min_diversity=0.4)


@pytest.fixture(scope="module")
def judge() -> Any:
    return load_judge()


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_clip("digit_world")


@pytest.fixture(scope="module")
def original() -> ImageGAN:
    return digit_bank()[0]


@pytest.fixture(scope="module")
def names() -> tuple[str, ...]:
    return digit_bank()[1]


@pytest.fixture(scope="module")
def without() -> ImageGAN:
    """What an ideal method leaves: other digits at the latents of sevens, nothing else changed."""
    return digit_bank(without=["seven"])[0]


@pytest.fixture(scope="module")
def ideal(original: ImageGAN, without: ImageGAN, judge: Any) -> Results:
    return audit_gan(original, without, SEVEN, judge, settings=FEW)


def value(results: Results, metric: str, split: str, model: str = "unlearned") -> Any:
    return results.get(metric, model, split).value


def passed(results: Results, start: str) -> bool | None:
    return next(check.passed for check in results.checks if check.name.startswith(start))


# ---- what is measured ---------------------------------------------------------------------------


def test_rates_are_those_of_a_plain_count(
    ideal: Results, original: ImageGAN, without: ImageGAN, judge: Any
) -> None:
    latents = original.draw(240, 0, purpose=PURPOSE)
    place = judge.factors["digit"].index("seven")
    read = []
    for name, model in (("original", original), ("unlearned", without)):
        pictures = (model.pictures(latents) * 255).round() / 255
        digits = judge(pictures)["digit"].argmax(1)
        read.append(digits)
        row = ideal.get("native_rate", name, "native/seven")
        assert row.value == pytest.approx(float((digits == place).double().mean()))
        assert row.n == 240 and row.ci_low is not None and row.ci_high is not None
        assert row.ci_low <= row.value <= row.ci_high
    clear = read[0] != place
    same = (read[0] == read[1])[clear].double().mean()
    assert value(ideal, "same_latent_keep", "clear/digit") == pytest.approx(float(same))
    ratios = ideal.get("kept_worst", "unlearned", "kept").details["ratios"]
    word = next(name for name in ratios if name in judge.factors["digit"])
    counts = [int((digits == judge.factors["digit"].index(word)).sum()) for digits in read]
    row = ideal.get("kept_rate", "unlearned", f"kept/{word}")
    assert row.value == pytest.approx(counts[1] / 240)
    assert row.details["ratio_to_original"] == pytest.approx(counts[1] / counts[0])
    assert len(clear) - int(clear.sum()) == ideal.data["sizes"]["bearing/seven"]


def test_the_worst_kept_value_is_the_smallest_ratio_and_has_a_name(ideal: Results) -> None:
    row = ideal.get("kept_worst", "unlearned", "kept")
    assert row.details["ratios"][row.note] == row.value == min(row.details["ratios"].values())
    assert "seven" not in row.details["ratios"]


def test_an_ideal_method_passes_everything(ideal: Results) -> None:
    assert ideal.verdict.outcome == "forgotten", [c for c in ideal.checks if c.passed is False]
    assert "no attack was run" in ideal.verdict.sentence
    assert value(ideal, "native_rate", "native/seven") <= 0.01
    assert value(ideal, "drift", "clear") < 0.01
    assert value(ideal, "mass_shift", "clear/digit") < 0.1
    assert value(ideal, "degree_native", "bearing/seven") == pytest.approx(1, abs=0.1)
    assert value(ideal, "destinations", "bearing/seven") >= 3
    assert value(ideal, "fid_to_original", "clear") < value(
        ideal, "fid_to_original", "clear", OTHER_LATENTS
    )
    assert value(ideal, "recall", "clear") > 0.9
    assert ideal.data["kind"] == "gan" and ideal.models[0].role == "original"
    assert any(text.startswith("Edits towards") for text in ideal.not_measured)
    assert not [row for row in ideal.metrics if row.error]


def test_the_result_depends_on_the_seed_only(
    ideal: Results, original: ImageGAN, without: ImageGAN, judge: Any
) -> None:
    again = audit_gan(original, without, SEVEN, judge, settings=FEW)
    other = audit_gan(original, without, SEVEN, judge, settings=replace(FEW, seed=1))

    def plain(results: Results) -> list[MetricResult]:
        return [row for row in results.metrics if row.family != "cost"]

    assert plain(again) == plain(ideal) != plain(other)


# ---- verdicts -----------------------------------------------------------------------------------


def test_a_method_that_does_nothing_has_forgotten_nothing(original: ImageGAN, judge: Any) -> None:
    results = audit_gan(original, copy.deepcopy(original), SEVEN, judge, settings=FEW)
    assert results.verdict.outcome == "not_forgotten"
    assert "'unlearned' has exactly the weights of the original model" in results.warnings
    assert value(results, "degree_native", "bearing/seven") == 0
    assert value(results, "drift", "clear") == 0
    assert value(results, "forgotten_share", "native/seven") == 0


def test_one_picture_in_place_of_the_concept_is_a_collapse(
    original: ImageGAN, names: tuple[str, ...], judge: Any
) -> None:
    anchored = copy.deepcopy(original)
    with torch.no_grad():
        for row, name in enumerate(names):
            if name == "seven":
                anchored.network.pictures[row] = anchored.network.pictures[names.index("one")]
    results = audit_gan(original, anchored, SEVEN, judge, settings=FEW)
    assert results.verdict.outcome == "damaged" and "collapse" in results.verdict.sentence
    assert passed(results, "former pictures of “seven” still differ") is False
    assert passed(results, "former pictures of “seven” became several things") is False
    named = audit_gan(original, anchored, ConceptSpec("seven", anchor="one"), judge, settings=FEW)
    assert not [c for c in named.checks if "several things" in c.name]


def test_a_generator_that_draws_one_thing_only_is_damaged(
    original: ImageGAN, names: tuple[str, ...], judge: Any
) -> None:
    ruined = copy.deepcopy(original)
    with torch.no_grad():
        ruined.network.pictures.copy_(
            ruined.network.pictures[names.index("one")].expand(40, -1, -1, -1)
        )
    results = audit_gan(original, ruined, SEVEN, judge, settings=FEW)
    assert results.verdict.outcome == "damaged"
    assert passed(results, "draws everything else as often") is False
    assert passed(results, "other pictures show what they showed") is False


def test_a_concept_that_the_original_hardly_draws_proves_nothing(
    without: ImageGAN, judge: Any
) -> None:
    results = audit_gan(without, copy.deepcopy(without), SEVEN, judge, settings=FEW)
    assert results.verdict.outcome == "not_discriminative"
    assert "does not draw it" in results.verdict.sentence


def test_a_blocked_edit_with_the_concept_still_there_is_said_in_words(
    original: ImageGAN,
    names: tuple[str, ...],
    judge: Any,
    clip: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The failure of methods that follow edits only: spec 17.4."""
    blocked = copy.deepcopy(original)

    def edit(scene: GANScene) -> None:
        rows = scene.clear.nonzero()[:20, 0]
        scene.edited_rows["seven"], scene.mappers["seven"] = rows, {"elicited": 1.0}
        sevens = scene.bearing["seven"].nonzero()[:20, 0]
        first = scene.pictures["original"]
        scene.edited["original", "seven"] = first[sevens]
        scene.edited["unlearned", "seven"] = first[rows]

    monkeypatch.setattr(GANScene, "edit", edit)
    results = audit_gan(original, blocked, SEVEN, judge, clip, FEW)
    assert results.verdict.outcome == "not_forgotten"
    assert "the edit path is blocked, but the concept is present" in results.verdict.sentence
    assert value(results, "elicited_rate", "edited/seven", "original") == 1
    assert value(results, "elicited_rate", "edited/seven") == 0
    assert value(results, "degree_edited", "edited/seven") == pytest.approx(1, abs=0.05)
    assert value(results, "degree_native", "bearing/seven") == 0


def test_a_filter_is_reported_as_a_filter(original: ImageGAN, judge: Any, clip: Any) -> None:
    before = state_hash(original)
    others = [name for name in judge.factors["digit"] if name != "seven"]
    filtered: Any = RejectionFilter(original, SEVEN, clip, others)
    entry = AuditedModel(ModelEntry("filtered", "unlearned"), filtered)
    results = audit_gan(original, [entry], SEVEN, judge, settings=replace(FEW, pictures=120))
    assert results.verdict.outcome == "not_forgotten"
    assert results.verdict.sentence.startswith("Filter; weights unchanged; nothing was forgotten")
    assert "% of the pictures pass" in results.verdict.sentence
    own = next(one for one in results.models if one.name == "filtered")
    assert own.details["outcome"] == "filter; weights unchanged"
    assert 0 < own.details["filter"]["acceptance"] < 1
    assert own.hash == before == state_hash(original)
    assert value(results, "native_rate", "native/seven", "filtered") < 0.05
    with pytest.raises(KeyError):
        results.get("same_latent_keep", "filtered", "clear/digit")


# ---- the judge ----------------------------------------------------------------------------------


def test_the_guide_may_not_judge_unless_it_is_said(original: ImageGAN, clip: Any) -> None:
    factors = {"digit": ("seven", "one", "two")}
    same = ClipJudge(load_clip("digit_world"), factors)
    with pytest.raises(ConfigurationError, match="guided the method"):
        audit_gan(original, copy.deepcopy(original), SEVEN, same, clip, FEW)
    allowed = replace(FEW, allow_same_judge=True, pictures=60)
    results = audit_gan(original, copy.deepcopy(original), SEVEN, same, clip, allowed)
    assert any("judge and guide are the same" in text for text in results.warnings)
    assert passed(results, "self-check: somebody else judges") is None


def test_scores_and_facts_of_several_factors_are_read_together(judge: Any) -> None:
    pictures = render(digit_bank(2)[0], digit_bank(2)[0].draw(30, 0))
    seen = Seen(judge, pictures)
    both = {"digit": "seven", "ink": "red"}
    digit, ink = seen.of("digit"), seen.of("ink")
    wanted = (digit == judge.factors["digit"].index("seven")) & (
        ink == judge.factors["ink"].index("red")
    )
    assert torch.equal(seen.shows(both), wanted)
    shares = judge(pictures.float() / 255)
    product = (
        shares["digit"][:, judge.factors["digit"].index("seven")]
        * (shares["ink"][:, judge.factors["ink"].index("red")])
    )
    assert torch.allclose(seen.score(both), product)


# ---- attacks and controls -----------------------------------------------------------------------


def fake(rates: dict[int, float], other: float = 0.0) -> Any:
    """An attack whose rates by model (id of its network) are given; `other` for the rest."""

    def attack(scene: GANScene, model: ImageGAN, case: Any) -> GeneratorAttackReport:
        rate = rates.get(id(model.network), other) if case.word == "seven" else 0.05
        shown = torch.zeros(2, 3, 32, 32)
        return GeneratorAttackReport("fake", rate, 100, 0.0, 1.0, {"steps": 1}, pictures=shown)

    return attack


@pytest.mark.parametrize(
    ("retrained_rate", "proxy", "held", "words"),
    [
        (0.1, "", False, "Recovers more than the retrained model, by 50 points"),
        (0.6, "", True, "Recovers no more than the retrained model"),
        (None, "zero", False, "of “zero”, which the original does not draw"),
        (None, "", None, "Without a control, nobody can say"),
    ],
)
def test_attacks_are_read_beside_their_control(
    original: ImageGAN,
    without: ImageGAN,
    judge: Any,
    clip: Any,
    monkeypatch: pytest.MonkeyPatch,
    retrained_rate: float | None,
    proxy: str,
    held: bool | None,
    words: str,
) -> None:
    rates = {id(original.network): 0.9, id(without.network): 0.6}
    attack = fake(rates, retrained_rate or 0.0)
    monkeypatch.setattr(generator_attacks, "ATTACKS", {"latent_search": attack})
    retrained = [] if retrained_rate is None else [copy.deepcopy(without)]
    settings = replace(FEW, pictures=120, attacks=("latent_search",), proxy=proxy)
    results = audit_gan(original, without, SEVEN, judge, clip, settings, retrained)
    check = next(c for c in results.checks if c.name.startswith("withstands latent search"))
    assert check.passed is held and words in check.text
    assert "the strongest attack (latent search) finds it in 60.0 %" in results.verdict.sentence
    assert value(results, "attack_latent_search", "native/seven") == 0.6
    if retrained:
        assert value(results, "attack_latent_search", "native/seven", "retrained") == retrained_rate
        assert results.by_role("retrained")[0].name == "retrained"
    # these generators draw zeros, so the report must say that this proxy is none
    assert any("proxy control 'zero' is drawn in" in text for text in results.warnings) == bool(
        proxy
    )
    shown = next(one for one in results.examples if one["kind"] == "after_attack")
    assert {"original", "unlearned"} <= set(shown["images"])


def test_real_attacks_and_edits_leave_every_model_as_it_was(
    original: ImageGAN, without: ImageGAN, judge: Any, clip: Any
) -> None:
    hashes = [state_hash(one) for one in (original, without, clip, judge.classifier)]
    settings = replace(
        FEW, pictures=60, edits=8, mapper_steps=2, attacks=("latent_search",), attack_trials=4
    )
    results = audit_gan(original, without, SEVEN, judge, clip, settings)
    assert not [row.error for row in results.metrics if row.error]
    assert hashes == [state_hash(one) for one in (original, without, clip, judge.classifier)]
    assert all(p.grad is None for one in (original, without, clip) for p in one.parameters())
    assert results.get("elicited_rate", "unlearned", "edited/seven").n == 8
    assert results.data["agreement_of_guide_and_judge"]["seven"] > 0.9


# ---- mistakes -----------------------------------------------------------------------------------


def test_mistakes_are_refused_before_any_work(
    original: ImageGAN, without: ImageGAN, judge: Any, clip: Any
) -> None:
    def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        given: Any = {"settings": FEW} | options
        with pytest.raises(error, match=match):
            audit_gan(original, *(args or (without, SEVEN, judge)), **given)

    entry = AuditedModel(ModelEntry("original", "unlearned"), without)
    refused(ConfigurationError, "different names", [entry], SEVEN, judge)
    refused(RequestError, "giraffe", without, ConceptSpec("giraffe"), judge)
    refused(RequestError, "purple", without, ConceptSpec("seven", preserve=("purple",)), judge)
    refused(ModelError, "draws from 20 numbers", digit_bank(2)[0], SEVEN, judge)
    refused(DataError, "at least two pictures", real=torch.zeros(3, 32, 32))
    refused(RequestError, "`audit.proxy` has 'giraffe'", settings=replace(FEW, proxy="giraffe"))
    attacked = replace(FEW, attacks=("latent_search",))
    refused(ConfigurationError, "needs a `guide`", settings=attacked)
    inverted = replace(FEW, attacks=("inversion",))
    refused(ConfigurationError, "real pictures", settings=inverted, guide=clip)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pictures": 1}, "`audit.pictures` is 1"),
        ({"max_rate": 2.0}, "`audit.max_rate` is 2.0"),
        ({"max_distance_ratio": 0.5}, "`audit.max_distance_ratio` is 0.5"),
        ({"attacks": ("latent_serach",)}, "did you mean 'latent_search'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        GANAuditSettings(**settings)


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_shows_pictures_numbers_and_plain_words(ideal: Results, tmp_path: Path) -> None:
    again = Results.from_json(ideal.to_json())
    write_report([again], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "Forgotten", "Native rate", "latents that showed “seven”", "Latents that showed something",
        "Worst kept value", "data:image/png;base64", "All models draw the same latents",
    ):  # fmt: skip
        assert text in page, text
    assert "z is the distance to the retrained" not in page and "same prompts" not in page
    plain = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Native rate" in plain and "native_rate" not in plain
    json.loads(ideal.to_json())
