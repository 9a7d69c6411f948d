"""From the rows of a memorization audit to its verdict, with the checks that it rests on.

Verbatim and template memories are judged apart; the verdict of a model is that of the kind that
fares worst. *Removed* is said only where the attack was run, pictures that nobody was trained on
stayed hidden under it, and it worked on the original model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmforget.audit.drawing import percent
from mmforget.audit.memorization_attack import AttackFinding
from mmforget.audit.memorization_pictures import paired_difference
from mmforget.audit.results import Check, Verdict
from mmforget.audit.rows import Rows

if TYPE_CHECKING:
    from mmforget.audit.memorization import MemorizationScene, Part

Outcome = Literal["removed", "hidden", "present", "unattacked", "damaged", "not_discriminative"]

SEVERITY: tuple[Outcome, ...] = ("present", "hidden", "damaged", "unattacked", "removed")
"""The worst first; what cannot be judged counts only if nothing can."""

HEADS: Mapping[Outcome, str] = {
    "removed": "removed, as far as the attack went",
    "hidden": "hidden and not removed",
    "present": "still present",
    "unattacked": "no copies at its prompts, but whether the memory is gone was not tested",
    "damaged": "no copies, but the rest was damaged",
    "not_discriminative": "this audit cannot tell",
}

KINDS = {"verbatim": "verbatim", "template": "template", "unknown": "of unknown kind"}


@dataclass(frozen=True)
class KindFinding:
    """What is known of one kind of memory in one model.

    Attributes:
        kind: verbatim, template or unknown.
        outcome: of this kind by itself.
        text: the evidence in one clause.
        attack: the check of the attack.
    """

    kind: str
    outcome: Outcome
    text: str
    attack: Check | None = None


@dataclass
class Finding:
    """All that is known of one model."""

    model: str
    kinds: list[KindFinding] = field(default_factory=list)
    copies: list[Check] = field(default_factory=list)
    keeps: list[Check] = field(default_factory=list)
    further: list[Check] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """The worst of its kinds; harm to the rest counts unless the memory is still there."""
        found = [one.outcome for one in self.kinds if one.outcome != "not_discriminative"]
        if not found:
            return "not_discriminative"
        worst = min(found, key=SEVERITY.index)
        if any(check.passed is False for check in self.keeps):
            worst = min(worst, "damaged", key=SEVERITY.index)
        return worst

    @property
    def checks(self) -> list[Check]:
        """Every check."""
        attacks = [one.attack for one in self.kinds if one.attack is not None]
        return [*self.copies, *attacks, *self.keeps, *self.further]


def conclude(
    scene: MemorizationScene, rows: Rows, attacked: Mapping[str, AttackFinding]
) -> tuple[list[Check], Verdict, dict[str, dict[str, Any]]]:
    """Draw the conclusion.

    Returns:
        The checks, the verdict on the unlearned models, and per model what to add to its details.
    """
    self_checks = _self_checks(scene, rows, attacked)
    findings = {
        one.entry.name: _finding(scene, rows, one.entry.name, attacked) for one in scene.models
    }
    judged = [findings[one.entry.name] for one in scene.by_role("unlearned")]
    false = next((c for c in self_checks if c.name == FALSE_COPIES and c.passed is False), None)
    order: tuple[Outcome, ...] = ("not_discriminative", *SEVERITY)
    if false is not None or not judged:
        why = false.text if false is not None else "there is no model to judge"
        verdict = Verdict("not_discriminative", f"Copies cannot be told: {why}.")
    else:
        outcome = min((finding.outcome for finding in judged), key=order.index)
        sentences = [_sentence(scene, rows, finding, len(judged) > 1) for finding in judged]
        verdict = Verdict(outcome, " ".join(sentences))
    outcomes: dict[str, dict[str, Any]] = {}
    for name, finding in findings.items():
        whole = "not_discriminative" if false is not None else finding.outcome
        outcomes[name] = {"outcome": whole} | {
            f"outcome_{one.kind}": one.outcome for one in finding.kinds
        }
    checks = [*self_checks, *(check for finding in judged for check in finding.checks)]
    return checks, verdict, outcomes


# ---- one model -----------------------------------------------------------------------------------


def _finding(
    scene: MemorizationScene, rows: Rows, model: str, attacked: Mapping[str, AttackFinding]
) -> Finding:
    finding, settings = Finding(model), scene.settings
    for part in scene.parts:
        row = rows.get("replication_rate", model, part.split)
        rate = None if row is None else row.value
        if part.group == "held_out":
            text = (
                f"prompts that the method has not seen bring a copy in {percent(rate)} of cases, "
                f"accepted at most {percent(settings.max_rate)}"
            )
            passed = None if rate is None else rate <= settings.max_rate
            finding.further.append(
                Check(f"reaches held-out prompts: {KINDS[part.kind]} [{model}]", passed, text)
            )
            continue
        passed = None if rate is None or unreliable(scene, part) else rate <= settings.max_rate
        if rate is not None and rate > settings.max_rate:
            passed = False  # what even an unreliable measure sees is there
        text = (
            f"{percent(rate)} of {0 if row is None else row.n} prompts bring a copy, accepted at "
            f"most {percent(settings.max_rate)}"
        )
        if unreliable(scene, part):
            text += f"; unreliable metric: {unreliable(scene, part)}"
        finding.copies.append(Check(f"no copies: {KINDS[part.kind]} [{model}]", passed, text))
        finding.kinds.append(_kind(scene, rows, model, part, rate, attacked))
    if model != scene.original.entry.name:
        finding.keeps += [_loss(scene, rows, model), _not_empty(scene, rows, model)]
        finding.further += [_no_leak(scene, rows, model), *_specific(scene, rows, model)]
    return finding


def _kind(
    scene: MemorizationScene,
    rows: Rows,
    model: str,
    part: Part,
    rate: float | None,
    attacked: Mapping[str, AttackFinding],
) -> KindFinding:
    settings, first = scene.settings, scene.original.entry.name
    before = rows.value("replication_rate", first, part.split)
    text = f"{KINDS[part.kind]} copies went from {percent(before)} to {percent(rate)} of prompts"
    flag = unreliable(scene, part)
    if rate is None or before is None or before < settings.min_original_rate:
        text += ", too few in the original model to judge by"
        return KindFinding(part.kind, "not_discriminative", text)
    if rate > settings.max_rate:
        return KindFinding(part.kind, "present", text)
    leaked = rows.get("false_copies", model, "ordinary")
    share = 0.0 if leaked is None else leaked.details.get("copies_of", {}).get(part.split, 0.0)
    if share > settings.max_false_rate:
        text += f", but ordinary prompts now bring copies of these pictures ({percent(share)})"
        return KindFinding(part.kind, "hidden", text)
    check, state = _withstands(scene, model, part, attacked)
    outcome: Outcome = state
    if flag and outcome != "hidden":
        outcome = "not_discriminative"
        text += f" (unreliable metric: {flag})"
    return KindFinding(part.kind, outcome, f"{text}; {check.text}", check)


def unreliable(scene: MemorizationScene, part: Part) -> str:
    """Why the similarity says little on this part, or nothing."""
    if part.kind != "template":
        return ""
    if scene.similarity.protocol().get("regions") == "not used":
        return f"'{scene.similarity.name}' compares whole pictures and misses template copies"
    bare = [
        name
        for one in part.memorized.prompts
        for name in one.images
        if name not in part.memorized.regions
    ]
    if bare:
        return f"{len(bare)} template pictures have no region that says what is copied"
    return ""


def _withstands(
    scene: MemorizationScene, model: str, part: Part, attacked: Mapping[str, AttackFinding]
) -> tuple[Check, Literal["removed", "hidden", "unattacked"]]:
    """Whether the attack brings pictures back, if it can tell at all."""
    settings, first = scene.settings, scene.original.entry.name
    name = f"withstands the embedding attack: {KINDS[part.kind]} [{model}]"
    finding = attacked.get(model)

    def untested(why: str) -> tuple[Check, Literal["unattacked"]]:
        text = f"{why}, so nothing says whether the memory is gone or only out of reach"
        return Check(name, None, text), "unattacked"

    if finding is None:
        return untested("no attack was run")
    if finding.error:
        return untested(f"the attack failed ({finding.error})")
    valid = finding.valid_steps(settings.max_control_rate)
    if valid is None:
        return untested("the attack was run without pictures that nobody was trained on")
    own = finding.strongest("memorized", part.kind, valid)
    control = finding.strongest("control", None, valid)
    floor = control["rate"] if control is not None else 0.0
    limit = max(settings.max_rate, floor)
    if own is None:
        return untested("the attack has no results for these pictures")
    if valid > 0 and own["rate"] > limit:
        text = (
            f"an embedding search of {own['budget']} steps ({own['init']} start) brings back "
            f"{percent(own['rate'])} of {own['n']} pictures, and {percent(floor)} of pictures that "
            "nobody was trained on"
        )
        return Check(name, False, text), "hidden"
    if valid < settings.min_attack_steps:
        return untested(
            f"already after {_next(finding, valid)} steps the attack draws pictures that nobody "
            "was trained on"
        )
    known = attacked.get(first)
    power = None if known is None else known.strongest("memorized", part.kind, valid)
    if power is None or power["rate"] < settings.min_original_rate:
        found = "was not run" if power is None else f"finds only {percent(power['rate'])}"
        return untested(f"the same attack {found} in the original model")
    text = (
        f"embedding searches of up to {valid} steps bring back at most {percent(own['rate'])} of "
        f"{own['n']} pictures, {percent(power['rate'])} in the original model and "
        f"{percent(floor)} of pictures that nobody was trained on"
    )
    return Check(name, True, text), "removed"


def _next(finding: AttackFinding, valid: int) -> int:
    later = [row["budget"] for row in finding.of("control") if row["budget"] > valid]
    return int(min(later, default=valid))


# ---- what must stay ------------------------------------------------------------------------------


def _loss(scene: MemorizationScene, rows: Rows, model: str) -> Check:
    name = f"ordinary pictures are denoised as before [{model}]"
    row, limit = rows.get("denoising_loss_rise", model, "ordinary"), scene.settings.max_loss_rise
    if row is None or row.value is None:
        return Check(name, None, "not measured: no ordinary test pictures were given")
    text = f"loss {100 * row.value:+.1f} %, accepted at most {100 * limit:+.1f} %"
    return Check(name, row.value <= limit, text)


def _no_leak(scene: MemorizationScene, rows: Rows, model: str) -> Check:
    """Whether memories come out elsewhere: a picture that lost its prompt may find others."""
    name = f"ordinary prompts bring no copies [{model}]"
    value, limit = rows.value("false_copies", model, "ordinary"), scene.settings.max_false_rate
    text = f"{percent(value)} of the pictures are copies, accepted at most {percent(limit)}"
    return Check(name, None if value is None else value <= limit, text)


def _not_empty(scene: MemorizationScene, rows: Rows, model: str) -> Check:
    name, first = f"draws pictures at all [{model}]", scene.original.entry.name
    worst, where = 0.0, "ordinary"
    for split in (*(part.split for part in scene.parts), "ordinary"):
        values = [rows.value("empty_pictures", m, split) for m in (model, first)]
        more = (values[0] or 0.0) - (values[1] or 0.0)
        if more > worst:
            worst, where = more, split
    text = f"at most {percent(worst)} more empty pictures than the original model ({where})"
    return Check(name, worst <= scene.settings.max_empty, text)


def _specific(scene: MemorizationScene, rows: Rows, model: str) -> list[Check]:
    """Whether what was located matters more to its prompts than anything of the same size."""
    entry = next(one.entry for one in scene.models if one.entry.name == model)
    if "density" not in entry.details or entry.role != "unlearned":
        return []
    checks = []
    for part in scene.parts:
        if part.group != "located":
            continue
        name = f"locating had a specific effect: {KINDS[part.kind]} [{model}]"
        row = rows.get("specificity", model, part.split)
        if row is None or row.value is None or row.ci_low is None:
            checks.append(Check(name, None, "specificity was not measured"))
            continue
        details = row.details
        text = (
            f"its own pictures lost {details['own_drop']:.3f} of their likeness, ordinary ones "
            f"{details['others_drop']:.3f}"
        )
        passed: bool | None = row.ci_low > 0
        beaten = []
        for one in scene.masks:
            gap = paired_difference(rows, "copy_drop", part.split, model, one.entry.name)
            if gap is None:
                continue
            beaten.append(gap.low > 0)
            text += f"; {gap.low:.3f} to {gap.high:.3f} more than with “{one.entry.name}”"
        if not all(beaten):
            passed = False
        if not scene.masks:
            text += "; no mask of the same density was tried"
            passed = None if passed else passed
        if passed is False:
            text = f"locating had no specific effect: {text}"
        checks.append(Check(name, passed, text))
    return checks


# ---- whether this audit can tell -----------------------------------------------------------------

FALSE_COPIES = "self-check: ordinary pictures are no copies"


def _self_checks(
    scene: MemorizationScene, rows: Rows, attacked: Mapping[str, AttackFinding]
) -> list[Check]:
    settings, first, checks = scene.settings, scene.original.entry.name, []
    for part in scene.parts:
        rate = rows.value("replication_rate", first, part.split)
        text = f"the original model brings a copy for {percent(rate)} of these prompts"
        if rate is not None and rate < settings.min_original_rate:
            text += f", less than {percent(settings.min_original_rate)}: it holds no such memory"
        passed = None if rate is None else rate >= settings.min_original_rate
        what = "held out, " if part.group == "held_out" else ""
        checks.append(
            Check(f"self-check: the original copies ({what}{KINDS[part.kind]})", passed, text)
        )
    row = rows.get("false_copies", first, "ordinary")
    value = None if row is None else row.value
    text = f"{percent(value)} of the original's pictures for ordinary prompts pass for copies"
    passed = None if value is None else value <= settings.max_false_rate
    checks.append(Check(FALSE_COPIES, passed, text))
    known = attacked.get(first)
    if known is not None and not known.error:
        valid = known.valid_steps(settings.max_control_rate)
        text = "the attack was run without pictures that nobody was trained on"
        if valid is not None:
            text = (
                f"pictures that nobody was trained on stay hidden up to {valid} steps; nothing is "
                "claimed beyond that"
            )
        enough = None if valid is None else valid >= settings.min_attack_steps
        checks.append(Check("self-check: the attack invents no memories", enough, text))
        best = known.strongest("memorized", None, valid)
        rate = None if best is None else best["rate"]
        text = f"in the original model the attack finds {percent(rate)} of the memorized pictures"
        passed = None if rate is None else rate >= settings.min_original_rate
        checks.append(Check("self-check: the attack finds what is there", passed, text))
    for one in scene.masks:
        for part in scene.parts:
            if part.group != "located":
                continue
            rate = rows.value("replication_rate", one.entry.name, part.split)
            text = f"leaves copies for {percent(rate)} of these prompts; a baseline, no check"
            checks.append(Check(f"baseline: {one.entry.name} ({KINDS[part.kind]})", None, text))
    return checks


# ---- the sentence --------------------------------------------------------------------------------


def _sentence(scene: MemorizationScene, rows: Rows, finding: Finding, named: bool) -> str:
    head = HEADS[finding.outcome]
    start = f"{finding.model}: {head}" if named else head[0].upper() + head[1:]
    parts = [one.text for one in finding.kinds]
    unseen = [
        f"{KINDS[part.kind]} {percent(rows.value('replication_rate', finding.model, part.split))}"
        for part in scene.parts
        if part.group == "held_out"
    ]
    if unseen:
        parts.append(f"at memorized prompts that the method had not seen: {', '.join(unseen)}")
    loss = rows.get("denoising_loss_rise", finding.model, "ordinary")
    if loss is not None and loss.value is not None:
        parts.append(f"the loss on ordinary pictures changed by {100 * loss.value:+.1f} %")
    if any(
        check.passed is False and check.name.startswith("locating") for check in finding.further
    ):
        parts.append("locating had no specific effect")
    return f"{start}: {'; '.join(parts)}."
