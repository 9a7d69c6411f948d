"""The audit of memorized pictures, on the shipped model that has memorized some."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmforget
from mmforget.attacks import embedding_inversion
from mmforget.audit.drawing import IDENTITY
from mmforget.audit.memorization import (
    MemorizationAuditSettings,
    MemorizationScene,
    audit_memorization,
)
from mmforget.audit.memorization_attack import AttackFinding, attack_all
from mmforget.audit.memorization_pictures import denoising_losses, measure, paired_difference
from mmforget.audit.memorization_verdict import conclude
from mmforget.audit.results import ModelEntry, Results
from mmforget.audit.rows import Rows
from mmforget.audit.scene import AuditedModel
from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import WORDS, planted_memories
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.copying import NormalisedCorrelation
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.report.html import render_html
from mmforget.report.markdown import render_markdown
from mmforget.report.pictures import attack_charts, strips
from mmforget.report.words import headline

SHIPPED = Path(mmforget.__file__).parent / "assets" / "digit_world" / "memorizing_unet"
QUICK = MemorizationAuditSettings(
    pictures=2,
    ordinary=12,
    steps=3,
    loss_pictures=32,
    detection=1,
    detection_prompts=8,
    examples=1,
    example_pictures=2,
    attack_budgets=(0, 50),
    attack_inits=("random",),
)
CLEAN, ATTACKED = ("unlearned", "located/verbatim"), ("unlearned", "located/template")


@pytest.fixture(scope="module")
def original() -> DiffusionGenerator:
    return load_generator(SHIPPED, steps=3)


@pytest.fixture(scope="module")
def memorized() -> tuple[MemorizedSet, MemorizedSet]:
    located, held_out = planted_memories(retain=64, test=64, control_count=3).split(0.5)
    assert held_out is not None
    return located, held_out


@pytest.fixture(scope="module")
def concealed(original: DiffusionGenerator) -> DiffusionGenerator:
    """The original with its titles unlearnt: every word of them reads as another one.

    The denoiser keeps all its memories, so that only an attack can find them.
    """
    model = copy.deepcopy(original)
    tokenizer = model.pipeline.tokenizer
    table = model.text_encoders["text_encoder"].get_input_embeddings().weight
    titles = [word for word in WORDS if word in " ".join(planted_memories(1, 1).texts).split()]
    with torch.no_grad():
        for word in titles:
            plain = tokenizer("a" if word == "the" else "sheet", add_special_tokens=False)
            own = tokenizer(word, add_special_tokens=False)
            table[own.input_ids[0]] = table[plain.input_ids[0]].clone()
    return model


@pytest.fixture(scope="module")
def scene(
    original: DiffusionGenerator,
    concealed: DiffusionGenerator,
    memorized: tuple[MemorizedSet, MemorizedSet],
) -> MemorizationScene:
    models = [
        AuditedModel(ModelEntry("original", "original"), original),
        AuditedModel(ModelEntry("unlearned", "unlearned"), concealed),
    ]
    found = MemorizationScene(models, *memorized, NormalisedCorrelation(), None, QUICK)
    found.draw()
    return found


@pytest.fixture(scope="module")
def rows(scene: MemorizationScene) -> Rows:
    found = Rows()
    measure(scene, found)
    assert [row.error for row in found.rows.values() if row.error] == []
    return found


def curve(
    verbatim: float = 0.0,
    template: float = 0.0,
    control: float | None = 0.0,
    budgets: tuple[int, ...] = (0, 50),
    group: str = "memorized",
) -> tuple[dict[str, Any], ...]:
    """What an attack could have found; rates at the last budget, before it nothing."""
    found = []
    for budget in budgets:
        last = budget == budgets[-1]
        for kind, rate in (("verbatim", verbatim), ("template", template)):
            found.append(row(group, kind, budget, rate if last else 0.0))
        if control is not None:
            found.append(row("control", None, budget, control if last else 0.0))
    return tuple(found)


def row(group: str, kind: str | None, budget: int, rate: float, init: str = "random") -> Any:
    return {"group": group, "kind": kind, "init": init, "budget": budget, "n": 4, "rate": rate,
            "mean_similarity": rate}  # fmt: skip


POWER = AttackFinding("original", curve(1.0, 1.0))


def verdict_of(scene: MemorizationScene, rows: Rows, finding: AttackFinding | None) -> Any:
    """Outcome, sentence and outcome per kind of the unlearned model."""
    attacked = {} if finding is None else {"original": POWER, "unlearned": finding}
    _, verdict, outcomes = conclude(scene, rows, attacked)
    return verdict.outcome, verdict.sentence, outcomes["unlearned"]


# ---- what is measured ----------------------------------------------------------------------------


def test_copies_before_and_after(rows: Rows) -> None:
    for split, n in (("located/verbatim", 4), ("located/template", 2), ("held_out/verbatim", 4)):
        before = rows.get("replication_rate", "original", split)
        after = rows.get("replication_rate", "unlearned", split)
        assert before is not None and after is not None
        assert (before.value, before.n) == (1.0, n)
        assert after.value == 0 if split.startswith("located") else (after.value or 0) <= 0.25
        assert (rows.value("copy_similarity", "original", split) or 0) > 0.95
        assert rows.value("replication_rate", IDENTITY, split) == 1.0
        assert len(before.details["per_prompt"]) == n
    # the seeds of a verbatim memory give one picture, those of a template differ
    seeds = [rows.value("seed_similarity", "original", f"located/{kind}") or 0
             for kind in ("verbatim", "template")]  # fmt: skip
    assert seeds[0] > 0.98 > seeds[1]


def test_losses_and_specificity_follow_from_the_pictures(
    rows: Rows, scene: MemorizationScene
) -> None:
    part = scene.parts[0]
    likeness = [scene.likeness(name, part).double() for name in ("original", "unlearned")]
    lost = (likeness[0] - likeness[1]).mean(1)
    assert rows.value("copy_drop", "unlearned", part.split) == pytest.approx(float(lost.mean()))
    before, after = (scene.of(name, "ordinary") for name in ("original", "unlearned"))
    rest = 1 - scene.similarity(after, before).double().mean()
    found = rows.get("specificity", "unlearned", part.split)
    assert found is not None
    assert found.value == pytest.approx(float(lost.mean() - rest), abs=1e-6)
    assert found.details["others_drop"] == pytest.approx(float(rest), abs=1e-6)
    # nothing but the titles was changed, and none of their words is in an ordinary prompt
    assert rows.value("denoising_loss_rise", "unlearned", "ordinary") == 0
    assert rows.value("similarity_to_original", "unlearned", "ordinary") == pytest.approx(1)
    assert (found.ci_low or 0) > 0.3
    gap = paired_difference(rows, "copy_drop", part.split, "unlearned", IDENTITY)
    assert gap is not None and gap.low > 0.3
    assert paired_difference(rows, "copy_drop", part.split, "unlearned", "nobody") is None


def test_memorized_prompts_pull_harder(rows: Rows) -> None:
    for kind in ("verbatim", "template"):
        split = f"located/{kind}"
        assert rows.value("detection_auc", "original", split) == 1.0
        pull = [
            rows.value("noise_magnitude", name, split) or 0 for name in ("original", "unlearned")
        ]
        assert pull[0] > 1.5 * pull[1]
    found = rows.get("detection_auc", "original", "located/verbatim")
    assert found is not None and (found.target, found.direction) == (0.5, "closer_to_value")


def test_losses_are_paired_and_see_damage(original: DiffusionGenerator) -> None:
    test = planted_memories(retain=2, test=16, control_count=1).test
    assert test.images is not None
    first = denoising_losses(original, test.images, test.prompts, 0, batch_size=16)
    again = denoising_losses(original, test.images, test.prompts, 0, batch_size=5)
    assert torch.allclose(first, again, atol=1e-5)
    other = denoising_losses(original, test.images, test.prompts, 1, batch_size=16)
    assert not torch.allclose(first, other, atol=1e-2)
    ruined = copy.deepcopy(original)
    with torch.no_grad():
        ruined.network.conv_out.weight.zero_()
    assert denoising_losses(ruined, test.images, test.prompts, 0).mean() > 2 * first.mean()
    assert all(parameter.grad is None for parameter in original.parameters())


# ---- the verdict ---------------------------------------------------------------------------------


def test_clean_prompts_alone_are_never_called_removed(scene: MemorizationScene, rows: Rows) -> None:
    outcome, sentence, _ = verdict_of(scene, rows, None)
    assert outcome == "unattacked"
    assert "no attack was run" in sentence
    assert "removed" not in sentence.lower()


@pytest.mark.parametrize(
    ("finding", "outcome", "text"),
    [
        (AttackFinding("unlearned", curve()), "removed", "bring back at most 0.0 % of 4"),
        (AttackFinding("unlearned", curve(0.5, 0.5)), "hidden", "brings back 50.0 % of 4"),
        (AttackFinding("unlearned", curve(control=None)), "unattacked", "nobody was trained on"),
        (
            AttackFinding("unlearned", curve(0.5, 0.5, control=None)),
            "unattacked",
            "run without pictures that nobody",
        ),
        (
            AttackFinding("unlearned", curve(1.0, 1.0, control=0.5)),
            "unattacked",
            "already after 50 steps the attack draws pictures",
        ),
        (
            AttackFinding("unlearned", curve(), error="DataError: no"),
            "unattacked",
            "the attack failed",
        ),
        (
            AttackFinding(
                "unlearned", (*curve(), row("memorized", "verbatim", 0, 0.0, init="trigger"))
            ),
            "unattacked",
            "nobody was trained on",
        ),
        (AttackFinding("unlearned", curve(budgets=(0, 20))), "unattacked", "already after"),
        (
            AttackFinding("unlearned", curve(0.75, 0.0, budgets=(0, 50, 100))),
            "hidden",
            "of 100 steps",
        ),
        (AttackFinding("unlearned"), "unattacked", "nobody was trained on"),
    ],
)
def test_what_an_attack_must_show(
    scene: MemorizationScene, rows: Rows, finding: AttackFinding, outcome: str, text: str
) -> None:
    found, sentence, _ = verdict_of(scene, rows, finding)
    assert found == outcome, sentence
    assert text in sentence
    assert (outcome == "removed") == ("removed, as far" in sentence.lower())


def test_an_attack_without_power_proves_nothing(scene: MemorizationScene, rows: Rows) -> None:
    for known in ({}, {"original": AttackFinding("original", curve(0.25, 0.25))}):
        attacked = {**known, "unlearned": AttackFinding("unlearned", curve())}
        _, verdict, _ = conclude(scene, rows, attacked)
        assert verdict.outcome == "unattacked"
        assert "the same attack" in verdict.sentence


def test_success_beyond_the_controls_does_not_count(scene: MemorizationScene, rows: Rows) -> None:
    late = (
        *curve(0.0, 0.0, 0.0, budgets=(0, 50)),
        row("memorized", "verbatim", 500, 1.0),
        row("memorized", "template", 500, 1.0),
        row("control", None, 500, 1.0),
    )
    finding = AttackFinding("unlearned", late)
    assert finding.valid_steps(0.1) == 50
    outcome, sentence, _ = verdict_of(scene, rows, finding)
    assert outcome == "removed" and "up to 50 steps" in sentence
    assert finding.valid_steps(1.0) == 500
    assert AttackFinding("u", curve(control=0.5, budgets=(0,))).valid_steps(0.1) == 0


def test_kinds_are_judged_apart(scene: MemorizationScene, rows: Rows) -> None:
    outcome, sentence, kinds = verdict_of(scene, rows, AttackFinding("unlearned", curve(0.0, 1.0)))
    assert outcome == "hidden"
    assert (kinds["outcome_verbatim"], kinds["outcome_template"]) == ("removed", "hidden")
    assert "verbatim copies went" in sentence and "template copies went" in sentence


def test_harm_is_not_called_removal(scene: MemorizationScene, rows: Rows) -> None:
    changed = with_row(rows, "denoising_loss_rise", "unlearned", "ordinary", value=0.2)
    for finding in (None, AttackFinding("unlearned", curve())):
        outcome, sentence, _ = verdict_of(scene, changed, finding)
        assert outcome == "damaged"
        assert "the rest was damaged" in sentence and "removed" not in sentence.lower()
    # what is still there is worse
    outcome, *_ = verdict_of(scene, changed, AttackFinding("unlearned", curve(1.0)))
    assert outcome == "hidden"


def test_memories_that_come_out_elsewhere_are_not_removed(
    scene: MemorizationScene, rows: Rows
) -> None:
    leak = {"copies_of": {"located/verbatim": 0.25}}
    changed = with_row(rows, "false_copies", "unlearned", "ordinary", value=0.25, details=leak)
    outcome, sentence, kinds = verdict_of(scene, changed, AttackFinding("unlearned", curve()))
    assert outcome == "hidden" and kinds["outcome_template"] == "removed"
    assert "ordinary prompts now bring copies of these pictures (25.0 %)" in sentence


def test_what_resembles_everything_judges_nothing(scene: MemorizationScene, rows: Rows) -> None:
    changed = with_row(rows, "false_copies", "original", "ordinary", value=0.5)
    outcome, sentence, kinds = verdict_of(scene, changed, AttackFinding("unlearned", curve()))
    assert outcome == kinds["outcome"] == "not_discriminative"
    assert sentence.startswith("Copies cannot be told")


def test_what_the_original_does_not_know_is_not_judged(
    scene: MemorizationScene, rows: Rows
) -> None:
    changed = with_row(rows, "replication_rate", "original", "located/template", value=0.25)
    outcome, sentence, kinds = verdict_of(scene, changed, AttackFinding("unlearned", curve()))
    assert outcome == "removed" and kinds["outcome_template"] == "not_discriminative"
    assert "too few in the original model" in sentence


def test_template_verdicts_of_whole_picture_measures_are_flagged(
    scene: MemorizationScene, rows: Rows
) -> None:
    class Descriptor(NormalisedCorrelation):
        name = "sscd"

        def protocol(self) -> dict[str, Any]:
            return super().protocol() | {"regions": "not used"}

    other = copy.copy(scene)
    other.similarity = Descriptor()
    checks, verdict, outcomes = conclude(
        other, rows, {"original": POWER, "unlearned": AttackFinding("unlearned", curve())}
    )
    assert verdict.outcome == "removed"
    assert outcomes["unlearned"]["outcome_template"] == "not_discriminative"
    assert "unreliable metric" in verdict.sentence
    states = {check.name: check.passed for check in checks}
    assert states["no copies: template [unlearned]"] is None
    assert states["no copies: verbatim [unlearned]"] is True
    # but what even such a measure finds is there
    hit = {"original": POWER, "unlearned": AttackFinding("unlearned", curve(0.0, 1.0))}
    assert conclude(other, rows, hit)[1].outcome == "hidden"


def with_row(rows: Rows, metric: str, model: str, split: str, **changes: Any) -> Rows:
    """The rows with one changed."""
    found = copy.copy(rows)
    found.rows = dict(rows.rows)
    before = found.rows[metric, model, split]
    changes["details"] = before.details | changes.get("details", {})
    found.rows[metric, model, split] = replace(before, **changes)
    return found


# ---- the whole of it -----------------------------------------------------------------------------


def faked(rate: Mapping[str, float]) -> Callable[..., Any]:
    """An attack that finds what it is told to, and draws the training pictures themselves."""

    def attack(model: Any, memorized: MemorizedSet, similarity: Any, **given: Any) -> Any:
        name = "original" if state_hash(model) == rate["hash"] else "unlearned"
        rows, pictures = [], {}
        for budget in given["budgets"]:
            for kind in memorized.kinds:
                own = memorized.of_kind(kind)
                share = rate[name] if budget else 0.0
                rows.append(row("memorized", kind, budget, share, given["inits"][0])
                            | {"names": list(own.images)})  # fmt: skip
            rows.append(row("control", None, budget, 0.0, given["inits"][0]) | {"names": []})
            ordered = [
                i for kind in memorized.kinds for i in memorized.of_kind(kind).images.values()
            ]
            pictures["memorized", given["inits"][0], budget] = torch.stack(
                [image for image in ordered for _ in range(given["pictures"])]
            )
        return embedding_inversion.EmbeddingAttackReport(
            tuple(rows), {}, None, given["budgets"][-1], 1.0, {"budgets": [0, 50]}, 7, 0.5,
            pictures=pictures if given["keep"] else {},
        )  # fmt: skip

    return attack


@pytest.fixture
def audited(
    original: DiffusionGenerator,
    concealed: DiffusionGenerator,
    memorized: tuple[MemorizedSet, MemorizedSet],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Results]:
    """Audit the concealed model under an attack that finds a given share in it."""

    def run(share: float, **changes: Any) -> Results:
        known: Any = {"hash": state_hash(original), "original": 1.0, "unlearned": share}
        monkeypatch.setattr(embedding_inversion, "embedding_attack", faked(known))
        located, _ = memorized
        remember = changes.pop("remember", None)
        settings = replace(QUICK, attack=True, controls=(), detection=0, pictures=1, **changes)
        return audit_memorization(
            original, concealed, located, NormalisedCorrelation(), settings=settings,
            remember=remember,
        )  # fmt: skip

    return run


def test_an_attack_becomes_rows_curves_and_pictures(audited: Callable[..., Results]) -> None:
    results = audited(0.75)
    assert results.verdict.outcome == "hidden"
    found = results.get("attack_embedding", "unlearned", "located/verbatim")
    assert (found.value, found.n, found.details["steps"]) == (0.75, 4, 50)
    assert results.get("attack_embedding", "original", "located/verbatim").value == 1.0
    assert results.get("attack_embedding_controls", "unlearned", "never_trained").value == 0.0
    assert results.get("attack_valid_steps", "unlearned", "never_trained").value == 50
    shown = [example for example in results.examples if example["kind"] == "located/verbatim"]
    assert len(shown) == 1 and set(shown[0]["attacked"]) == {"unlearned"}
    chart = attack_charts(results)
    assert [one.caption.partition(":")[0] for one in chart] == ["unlearned", "unlearned"]
    assert len(chart[0].series) == 3  # memorized, original, controls
    assert Results.from_json(results.to_json()) == results
    table = strips(results, "located/verbatim")[0]
    assert [title for title, _, _ in table.images] == [
        "training picture", "original", "unlearned", "unlearned, after attack",
    ]  # fmt: skip
    html, markdown = render_html(results), render_markdown(results)
    for text in ("Hidden, not removed", "Specificity", "verbatim memories, read by the method",
                 "Never-trained pictures under the same search", "that nobody was trained on",
                 "6 memorized prompts, SHA-256"):  # fmt: skip
        assert text in html and text in markdown, text
    for text in ("unlearned: verbatim memories that an embedding search brings back",
                 "training picture", "after attack"):  # fmt: skip
        assert text in html, text
    assert "the amber lantern poster" not in markdown.partition("## Pictures")[0]


def test_removed_is_green_only_if_every_check_holds(audited: Callable[..., Results]) -> None:
    results = audited(0.0)
    assert results.verdict.outcome == "removed"
    assert headline(results) == ("Removed, as far as the attack went", "✓", "removed")
    results.checks.append(replace(results.checks[0], name="required: x", passed=False))
    label, _, style = headline(results)
    assert "not every check holds" in label and style == "damaged"
    damaged = replace(results, verdict=replace(results.verdict, outcome="damaged"))
    assert "emoved" not in headline(damaged)[0] and "orgotten" not in headline(damaged)[0]


def test_attacks_are_remembered(audited: Callable[..., Results]) -> None:
    kept: dict[str, Any] = {}
    asked: list[str] = []

    def remember(name: str, compute: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        asked.append(name)
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    first = audited(0.75, remember=remember)
    assert asked == ["attack-original-random", "attack-unlearned-random"]
    second = audited(0.0, remember=remember)  # what was found before is not looked for again
    assert second.curves == first.curves and second.verdict == first.verdict


def test_a_failing_attack_is_a_row_and_no_proof(
    scene: MemorizationScene, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise DataError("no pictures")

    monkeypatch.setattr(embedding_inversion, "embedding_attack", broken)
    table = copy.copy(rows)
    table.rows = dict(rows.rows)
    found = attack_all(scene, table, lambda name, compute: compute())
    failed = table.get("attack_embedding", "unlearned", "located/verbatim")
    assert failed is not None and "DataError: no pictures" in failed.error
    assert conclude(scene, table, found)[1].outcome == "unattacked"


@pytest.mark.slow
def test_a_real_attack_finds_what_was_only_hidden(
    original: DiffusionGenerator,
    concealed: DiffusionGenerator,
    memorized: tuple[MemorizedSet, MemorizedSet],
) -> None:
    settings = replace(
        QUICK, attack=True, controls=(), detection=0, pictures=1, attack_pictures=1,
        attack_batch_size=4,
    )  # fmt: skip
    before = [state_hash(model) for model in (original, concealed)]
    results = audit_memorization(
        original, concealed, memorized[0], NormalisedCorrelation(), settings=settings
    )
    assert results.verdict.outcome == "hidden"
    assert results.get("attack_embedding_controls", "unlearned", "never_trained").value == 0.0
    assert before == [state_hash(model) for model in (original, concealed)]
    assert all(p.grad is None for model in (original, concealed) for p in model.parameters())


def test_an_unchanged_model_still_copies_and_locates_nothing(
    original: DiffusionGenerator, memorized: tuple[MemorizedSet, MemorizedSet]
) -> None:
    located, held_out = memorized
    density = {"density": {"layers": {"a": 0.1}, "chosen_layers": 0.1, "network": 0.01}}
    entry = ModelEntry("pruned", "unlearned", details=density)
    mask = ModelEntry("random mask", "control", details=density)
    settings = replace(QUICK, detection=0, pictures=1, controls=())
    results = audit_memorization(
        original,
        [AuditedModel(entry, copy.deepcopy(original)), AuditedModel(mask, original)],
        located,
        NormalisedCorrelation(),
        held_out,
        settings,
    )
    assert results.verdict.outcome == "present"
    assert "locating had no specific effect" in results.verdict.sentence
    assert "removed" not in render_markdown(results).lower().replace("called removed", "")
    assert "'pruned' has exactly the weights of the original model" in results.warnings
    states = {check.name: check.passed for check in results.checks}
    assert states["locating had a specific effect: verbatim [pruned]"] is False
    assert states["reaches held-out prompts: verbatim [pruned]"] is False
    assert states["baseline: random mask (verbatim)"] is None
    assert results.get("changed_parameters", "random mask").value == 0
    assert "embedding attack and its controls: not run" in " ".join(results.not_measured)
    assert results.data["kind"] == "memorization" and results.data["similarity"]["name"] == "ncc"
    render_html(results)


# ---- mistakes ------------------------------------------------------------------------------------


def test_sets_without_pictures_are_refused(original: DiffusionGenerator) -> None:
    bare = MemorizedSet((MemorizedPrompt("the amber lantern poster"),))
    with pytest.raises(DataError, match="no memorized prompt has a training picture"):
        audit_memorization(original, original, bare, NormalisedCorrelation(), settings=QUICK)
    image = torch.rand(3, 16, 16)
    alone = MemorizedSet((MemorizedPrompt("a sheet", ("x",)),), {"x": image})
    with pytest.raises(ConfigurationError, match="need different names"):
        entry = AuditedModel(ModelEntry("original", "unlearned"), original)
        audit_memorization(original, entry, alone, NormalisedCorrelation(), settings=QUICK)
    with pytest.raises(DataError, match="there are no pictures that are not memorized"):
        audit_memorization(original, original, alone, NormalisedCorrelation(), settings=QUICK)
    large = MemorizedSet(
        (MemorizedPrompt("a sheet", ("x",)),),
        {"x": torch.rand(3, 32, 32)},
        test=Captioned(("a",), torch.rand(1, 3, 32, 32)),
    )
    with pytest.raises(DataError, match="resize the references"):
        audit_memorization(original, original, large, NormalisedCorrelation(), settings=QUICK)


def test_without_test_prompts_the_empty_one_stands_in(original: DiffusionGenerator) -> None:
    images: Tensor = torch.rand(8, 3, 16, 16)
    memorized = MemorizedSet(
        (MemorizedPrompt("a sheet", ("x",)),), {"x": torch.rand(3, 16, 16)},
        retain=Captioned(tuple("abcdefgh"), images),
    )  # fmt: skip
    entry = AuditedModel(ModelEntry("original", "original"), original)
    found = MemorizationScene([entry], memorized, None, NormalisedCorrelation(), None, QUICK)
    assert {prompt for prompt, _ in found.ordinary} == {""}
    assert len(found.ordinary) == QUICK.ordinary and "no ordinary prompts" in found.remarks[0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pictures": 0}, "`audit.pictures` is 0, it must be at least 1"),
        ({"ordinary": 1}, "`audit.ordinary` is 1, it must be at least 2"),
        ({"max_rate": 2}, "must lie in"),
        ({"controls": ("identiti",)}, "did you mean 'identity'"),
        ({"attack_inits": ("randm",)}, "did you mean 'random'"),
        ({"attack": True, "attack_budgets": (0, 10)}, "or the attack proves nothing"),
        ({"attack": True, "attack_inits": ()}, "`audit.attack_inits` is empty"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        MemorizationAuditSettings(**settings)
