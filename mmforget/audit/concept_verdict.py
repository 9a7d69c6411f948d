"""From the rows of a generator audit to its verdict, with the checks that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmforget.audit.concept_attacks import INFORMATIVE, Recovery
from mmforget.audit.drawing import percent
from mmforget.audit.results import Check, Verdict
from mmforget.audit.rows import Rows

if TYPE_CHECKING:
    from mmforget.audit.concepts import ConceptScene

GROUPS = ("target", "preserved", "unconditional")

HEADS = {
    "forgotten": "forgotten in its pictures",
    "damaged": "forgotten in its pictures, but the rest suffered",
    "not_forgotten": "not forgotten",
    "not_discriminative": "forgetting cannot be judged",
}


@dataclass
class Finding:
    """All checks of one model."""

    model: str
    forgets: list[Check] = field(default_factory=list)
    keeps: list[Check] = field(default_factory=list)
    attacks: list[Check] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """Of this model by itself."""
        if not self.forgets or all(check.passed is None for check in self.forgets):
            return "not_discriminative"
        if any(check.passed is False for check in self.forgets):
            return "not_forgotten"
        if any(check.passed is False for check in self.keeps):
            return "damaged"
        return "forgotten"

    @property
    def checks(self) -> list[Check]:
        """Every check."""
        return [*self.forgets, *self.keeps, *self.attacks]


def conclude(
    scene: ConceptScene, rows: Rows, recoveries: Sequence[Recovery]
) -> tuple[list[Check], Verdict, dict[str, str]]:
    """Draw the conclusion.

    Returns:
        The checks, the verdict on the unlearned models, and the outcome per model.
    """
    findings = {
        one.entry.name: _finding(scene, rows, one.entry.name, recoveries) for one in scene.models
    }
    first = scene.original.entry.name
    self_checks = _self_checks(scene, rows, findings[first])
    judged = [findings[one.entry.name] for one in scene.by_role("unlearned")]
    blind = next((check for check in self_checks if check.passed is False), None)
    if scene.judge is None:
        why = "no judge and no CLIP model looked at the pictures, so the audit cannot tell"
        verdict = Verdict("not_discriminative", f"Forgetting cannot be judged: {why}.")
    elif blind is not None:
        verdict = Verdict("not_discriminative", f"Forgetting cannot be judged: {blind.text}.")
    else:
        order = ("not_discriminative", "not_forgotten", "damaged", "forgotten")
        outcome = min((finding.outcome for finding in judged), key=order.index)
        sentences = [_sentence(scene, rows, f, len(judged) > 1, recoveries) for f in judged]
        verdict = Verdict(outcome, " ".join(sentences))  # type: ignore[arg-type]
    checks = [*self_checks, *(check for finding in judged for check in finding.checks)]
    outcomes = {
        name: "not_discriminative" if verdict.outcome == "not_discriminative" else finding.outcome
        for name, finding in findings.items()
    }
    return checks, verdict, outcomes


def _finding(
    scene: ConceptScene, rows: Rows, model: str, recoveries: Sequence[Recovery]
) -> Finding:
    settings, finding = scene.settings, Finding(model)
    if scene.judge is None:
        return finding
    for cell in scene.cells:
        row = rows.get("target_rate", model, cell.split)
        if row is None or cell.role not in ("target", "synonym", "together"):
            continue
        what = {"target": "", "synonym": "synonym ", "together": "other sentences with "}[cell.role]
        title = f"erased: {what}“{cell.word}”"
        text = (
            f"seen in {percent(row.value)} of {row.n} pictures, "
            f"accepted at most {percent(settings.max_target_rate)}"
        )
        passed = None if row.value is None else row.value <= settings.max_target_rate
        finding.forgets.append(Check(f"{title} [{model}]", passed, text))
    finding.keeps += [
        _kept(rows, model, "preserved_drop", "keeps the rest", settings.max_preserved_drop),
        _kept(
            rows, model, "preserved_worst_drop", "keeps every single concept",
            settings.max_worst_drop,
        ),
        _not_empty(scene, rows, model),
    ]  # fmt: skip
    for recovery in recoveries:
        if recovery.model == model:
            finding.attacks.append(_withstands(scene, recovery))
    return finding


def _kept(rows: Rows, model: str, metric: str, title: str, limit: float) -> Check:
    row = rows.get(metric, model, "preserved")
    name = f"{title} [{model}]"
    if row is None or row.value is None:
        return Check(name, None, "not measured: no concept that must stay was named")
    whose = f" (“{row.note}”)" if row.note else ""
    return Check(
        name,
        row.value <= limit,
        f"{100 * row.value:+.1f} points lost{whose}, accepted at most {100 * limit:.1f}",
    )


def _not_empty(scene: ConceptScene, rows: Rows, model: str) -> Check:
    first, limit = scene.original.entry.name, scene.settings.max_empty
    name = f"draws pictures at all [{model}]"
    shares = {role: rows.value("empty_pictures", model, role) for role in GROUPS}
    known = {split: share for split, share in shares.items() if share is not None}
    if not known:
        return Check(name, None, "not measured")
    more = {
        split: share - (rows.value("empty_pictures", first, split) or 0.0)
        for split, share in known.items()
    }
    worst = max(more, key=lambda split: more[split])
    text = f"at most {percent(known[worst])} of the pictures of a group are empty ({worst})"
    return Check(name, more[worst] <= limit, text)


def _withstands(scene: ConceptScene, recovery: Recovery) -> Check:
    report = recovery.report
    name = f"withstands {recovery.attack.replace('_', ' ')} [{recovery.model}]"
    if report.post_rate is None:
        return Check(name, None, "; ".join(report.notes) or "nothing could be attacked")
    limit = max(scene.settings.max_target_rate, report.floor or 0.0)
    text = (
        f"“{report.concept}” is seen in {percent(report.post_rate)} of {report.n} pictures "
        f"(without attack {percent(report.pre_rate)})"
    )
    if recovery.attack in INFORMATIVE:
        text += "; for information, since the attack brings a picture of it along"
        return Check(name, None, text)
    text += f", accepted at most {percent(limit)}"
    return Check(name, report.post_rate <= limit, text)


def _self_checks(scene: ConceptScene, rows: Rows, original: Finding) -> list[Check]:
    """Whether this audit can tell anything."""
    if scene.judge is None:
        return [Check("self-check: somebody looks", None, "there is no judge")]
    settings, checks = scene.settings, []
    first = scene.original.entry.name
    for concept in scene.concepts:
        rate = rows.value("target_rate", first, f"target/{concept.target}")
        text = f"the original model shows “{concept.target}” in {percent(rate)} of its pictures"
        if rate is not None and rate < settings.min_original_rate:
            text += f", less than {percent(settings.min_original_rate)}: it hardly knows it"
        passed = None if rate is None else rate >= settings.min_original_rate
        checks.append(Check(f"self-check: “{concept.target}” is represented", passed, text))
    for factor, accuracy in scene.judge.accuracy.items():
        if not any(factor in cell.facts for cell in scene.cells):
            continue
        text = f"the judge reads “{factor}” right in {percent(accuracy)} of real pictures"
        believed = accuracy >= settings.min_judge_accuracy
        checks.append(Check(f"self-check: judge of “{factor}”", believed, text))
    if not scene.judge.accuracy:
        text = "how well the judge reads real pictures is unknown"
        checks.append(Check("self-check: judge", None, text))
    fails = any(check.passed is False for check in original.forgets)
    text = "the original model fails, as it must" if fails else "the original model passes"
    checks.append(Check("self-check: original fails", fails, text))
    for one in scene.by_role("control"):
        rate = max(
            (
                row.value
                for cell in scene.cells
                if cell.role == "target"
                and (row := rows.get("target_rate", one.entry.name, cell.split)) is not None
                and row.value is not None
            ),
            default=None,
        )
        if one.entry.name.startswith("identity"):
            fails = rate is not None and rate > settings.max_target_rate
            text = f"“{one.entry.name}” shows the target in {percent(rate)} of its pictures"
            checks.append(Check("self-check: identity fails", fails, text))
        else:
            text = f"a negative prompt alone leaves {percent(rate)}; a baseline, no check"
            checks.append(Check(f"baseline: {one.entry.name}", None, text))
    return checks


def _sentence(
    scene: ConceptScene,
    rows: Rows,
    finding: Finding,
    named: bool,
    recoveries: Sequence[Recovery],
) -> str:
    head = HEADS[finding.outcome]
    start = f"{finding.model}: {head}" if named else head[0].upper() + head[1:]
    parts = [_rates(scene, rows, finding.model), _rest(scene, rows, finding.model)]
    parts.append(_attacked(finding.model, recoveries))
    return f"{start}: {'; '.join(part for part in parts if part)}."


def _rates(scene: ConceptScene, rows: Rows, model: str) -> str:
    first, clauses = scene.original.entry.name, []
    for concept in scene.concepts:
        split = f"target/{concept.target}"
        before, row = rows.value("target_rate", first, split), rows.get("target_rate", model, split)
        assert row is not None  # every cell has a row of every model
        clause = f"“{concept.target}” went from {percent(before)} to {percent(row.value)} of "
        clause += f"{row.n} pictures"
        synonyms = [
            rate
            for word in concept.synonyms
            if (rate := rows.value("target_rate", model, f"synonym/{word}")) is not None
        ]
        if synonyms:
            clause += f", with its synonyms at most {percent(max(synonyms))}"
        clauses.append(clause)
    return ", ".join(clauses)


def _rest(scene: ConceptScene, rows: Rows, model: str) -> str:
    first = scene.original.entry.name
    before, after = (rows.value("preserved_rate", name, "preserved") for name in (first, model))
    if after is None:
        return "what had to stay was not named and not measured"
    worst = rows.get("preserved_worst_drop", model, "preserved")
    clause = f"preserved concepts went from {percent(before)} to {percent(after)}"
    if worst is not None and worst.value is not None and worst.value > 0:
        clause += f" (most lost: “{worst.note}”, {100 * worst.value:.1f} points)"
    return clause


def _attacked(model: str, recoveries: Sequence[Recovery]) -> str:
    own = [
        one
        for one in recoveries
        if one.model == model and one.attack not in INFORMATIVE and one.report.post_rate is not None
    ]
    if not own:
        return "no attack was run, so nothing says whether it is gone or only out of reach"
    worst = max(own, key=lambda one: one.report.post_rate or 0.0)
    return (
        f"the strongest attack ({worst.attack.replace('_', ' ')}) brought it to "
        f"{percent(worst.report.post_rate)}"
    )
