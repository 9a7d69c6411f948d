"""From the rows of a detector's audit to checks, and from checks to one sentence.

A model has forgotten when its average precision on the forgotten classes is close to nothing, or no
higher than that of a model that never saw their boxes, and when hardly one of their objects is
still found. A model that only starts from other weights, as a retrained one does, is excused for
retained classes on which retrained models are no better; an edited one is not.

The audit checks itself as that of classifiers does: the original must find the class and must fail,
a held-out retrained model must pass, and a control that only hides its answers must relearn too
much.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmforget.audit.detector_rows import class_drops
from mmforget.audit.detector_scene import DetectorScene
from mmforget.audit.results import Check, Verdict
from mmforget.audit.rows import METRICS, Rows
from mmforget.audit.verdict import SEVERITY, Finding, percent


def conclude(scene: DetectorScene, rows: Rows) -> tuple[list[Check], Verdict, dict[str, Finding]]:
    """Judge every model, check the audit itself, and say what follows.

    Returns:
        The self-checks and the checks of the unlearned models; the verdict over all unlearned
        models (the worst of them); the findings by model.
    """
    judge = _Judge(scene, rows)
    findings = {name: judge.model(name) for name in scene.names}
    checks = [
        *judge.original_checks(findings),
        *judge.held_out_checks(findings),
        *judge.control_checks(findings),
    ]
    broken = [check.text for check in checks if check.passed is False]
    unlearned = [findings[one.entry.name] for one in scene.by_role("unlearned")]
    for finding in unlearned:
        checks += finding.checks
    outcome = max((finding.outcome for finding in unlearned), key=SEVERITY.index)
    shown = [judge.sentence(finding, len(unlearned) > 1) for finding in unlearned]
    if broken or outcome == "not_discriminative":
        reasons = broken or [
            check.text for f in unlearned for check in f.forgets if check.passed is None
        ]
        text = (
            f"This audit is not discriminative: {'; '.join(reasons)}. "
            f"Measured nevertheless: {' '.join(shown)}"
        )
        return checks, Verdict("not_discriminative", text), findings
    return checks, Verdict(outcome, " ".join(shown)), findings  # type: ignore[arg-type]


class _Judge:
    """Makes the checks of one model after the other."""

    def __init__(self, scene: DetectorScene, rows: Rows) -> None:
        self.scene, self.rows, self.settings = scene, rows, scene.settings
        self.forget, self.gone = scene.seen("forget"), scene.seen("forgotten")

    def retrained(self, metric: str, model: str, split: str) -> list[float]:
        """Values of the other retrained models."""
        found = [self.rows.value(metric, one, split) for one in self.scene.references(model)]
        return [value for value in found if value is not None]

    def missing(self, title: str, metric: str, model: str, split: str) -> Check:
        """The check of a value that is not there."""
        row = self.rows.get(metric, model, split)
        why = (row.error or row.note) if row is not None else "no such objects"
        return Check(f"{title} [{model}]", None, f"{title}: not measured ({why})")

    # ---- checks of one model ------------------------------------------------------------------

    def model(self, model: str) -> Finding:
        """All checks of one model."""
        scene, finding = self.scene, Finding(model)
        limit = self.settings.max_average_precision
        finding.forgets.append(self.low("forgets", "average_precision", model, self.forget, limit))
        if scene.has("test_previous"):
            finding.forgets.append(
                self.low("stays forgotten", "average_precision", model, "test_previous", limit)
            )
        finding.forgets.append(
            self.low("is not found", "found_rate", model, self.gone, self.settings.max_found_rate)
        )
        finding.keeps += [self.keeps(model), self.keeps_classes(model)]
        if scene.forgotten_classes:
            finding.inside.append(self.relearns(model))
        return finding

    def low(self, title: str, metric: str, model: str, split: str, limit: float) -> Check:
        """At most a limit, or what a retrained model has."""
        name = f"{title} [{model}]"
        value = self.rows.value(metric, model, split)
        if value is None:
            return self.missing(title, metric, model, split)
        what = {
            "average_precision": "average precision",
            "found_rate": f"objects found with a score of {self.settings.score:g} or more",
        }[metric]
        others = self.retrained(metric, model, split)
        if not self.scene.forgotten_classes and not others:
            # what was forgotten are single images, whose objects any good detector still finds
            text = f"{title}: {what} {percent(value)}; a comparison needs a retrained model"
            return Check(name, None, text)
        if not self.scene.forgotten_classes:
            limit = METRICS[metric].smallest + max(others)
        accepted = max([limit, *others])
        text = f"{title}: {what} {percent(value)}, accepted at most {percent(accepted)}"
        if others:
            text += f", retrained {percent(float(np.mean(others)))}"
        return Check(name, value <= accepted, text)

    def keeps(self, model: str) -> Check:
        """Average precision on everything that was to be kept."""
        title, split = "keeps the rest", "test_retain"
        value = self.rows.value("average_precision", model, split)
        drop = self.rows.value("average_precision_drop", model, split)
        if drop is None or value is None:
            return self.missing(title, "average_precision_drop", model, split)
        limit = self.settings.max_retain_drop
        text = (
            f"{title}: average precision {percent(value)} on retained classes, "
            f"{100 * drop:+.1f} points lost, accepted at most {100 * limit:.1f}"
        )
        passed = drop <= limit
        others = self.retrained("average_precision", model, split)
        if self.from_other_weights(model) and others:
            least = float(np.mean(others)) - limit
            text += f", or at least {percent(least)}, like other retrained models"
            passed = passed or value >= least
        return Check(f"{title} [{model}]", passed, text)

    def keeps_classes(self, model: str) -> Check:
        """No single retained class may be ruined: an average hides a neighbour."""
        title, scene = "keeps every class", self.scene
        worst = self.rows.get("worst_class_precision_drop", model, "test_retain")
        if worst is None or worst.value is None:
            return self.missing(title, "worst_class_precision_drop", model, "test_retain")
        limit = self.settings.max_class_drop
        lost = class_drops(scene, model, scene.original)
        text = (
            f"{title}: '{worst.note}' lost {100 * worst.value:+.1f} points of average precision "
            f"({worst.n} objects), accepted at most {100 * limit:.1f}"
        )
        if self.from_other_weights(model):
            for other in scene.references(model):
                lost = {
                    index: min(lost[index], drop)
                    for index, drop in class_drops(scene, model, other).items()
                }
            text += ", against the original or other retrained models"
        passed = all(drop <= limit for drop in lost.values())
        return Check(f"{title} [{model}]", passed, text)

    def from_other_weights(self, model: str) -> bool:
        """Whether a model was trained from scratch, so that its classes differ by chance."""
        entry = next(one.entry for one in self.scene.models if one.entry.name == model)
        return entry.role in ("retrained", "held_out")

    def relearns(self, model: str) -> Check:
        """A few boxes must not bring back more than in a retrained model; less proves nothing."""
        title, metric = "relearning", "relearn_average_precision"
        name = f"{title} [{model}]"
        row = self.rows.get(metric, model, "test_forgotten")
        if row is None:
            return Check(name, None, f"{title}: not run, nothing inside was looked at")
        if row.value is None:
            return self.missing(title, metric, model, "test_forgotten")
        others = self.retrained(metric, model, "test_forgotten")
        text = (
            f"{title}: average precision {percent(row.value)} on forgotten classes after "
            f"{row.details['steps']} steps on {row.details['shots']} images"
        )
        if not others:
            needs = "a second retrained model" if self.scene.retrained else "a retrained model"
            return Check(name, None, f"{text}; a comparison needs {needs}")
        accepted = max(others) + METRICS[metric].smallest
        text += f", retrained {percent(float(np.mean(others)))}, accepted at most "
        return Check(name, row.value <= accepted, text + percent(accepted))

    # ---- checks of the audit ------------------------------------------------------------------

    def original_checks(self, findings: dict[str, Finding]) -> list[Check]:
        """The original must find what is to be forgotten, and so must not pass."""
        scene, limit = self.scene, self.settings.min_original
        value = self.rows.value("average_precision", scene.original, self.forget)
        text = (
            "the original's average precision on what is to be forgotten is "
            f"{percent(value)}, needed at least {percent(limit)}"
        )
        known = None if value is None else value >= limit
        outcome = findings[scene.original].outcome
        fails = None if outcome == "not_discriminative" else outcome == "not_forgotten"
        said = {
            None: "the original model could not be judged",
            True: "the original model fails, as it must",
            False: "the original model passes the checks of forgetting",
        }[fails]
        return [
            Check("self-check: original finds the class", known, text),
            Check("self-check: original fails", fails, said),
        ]

    def held_out_checks(self, findings: dict[str, Finding]) -> list[Check]:
        """A retrained model that is judged like a candidate must pass."""
        title = "self-check: held-out passes"
        checks = []
        for one in self.scene.by_role("held_out"):
            name = one.entry.name
            failed = [check.text for check in findings[name].checks if check.passed is False]
            text = f"held-out retrained model '{name}' " + (
                f"fails ({'; '.join(failed)})" if failed else "passes, as it must"
            )
            known = any(check.passed is not None for check in findings[name].checks)
            checks.append(Check(title, (not failed) if known else None, text))
        missing = "no retrained model was held out, so false alarms of this audit are unknown"
        return checks or [Check(title, None, missing)]

    def control_checks(self, findings: dict[str, Finding]) -> list[Check]:
        """Every control that fakes forgetting in its boxes must be seen through."""
        checks, fakes = [], 0
        for one in self.scene.by_role("control"):
            finding = findings[one.entry.name]
            title = f"self-check: control {finding.model} fails"
            if finding.outcome == "not_forgotten":
                text = f"control '{finding.model}' fails by its boxes"
                checks.append(Check(title, True, text))
                continue
            fakes += 1
            seen = [check for check in finding.inside if check.passed is False]
            if self.scene.twin[finding.model] == self.scene.original:
                text = f"control '{finding.model}' is the original model and passes"
                checks.append(Check(title, False, text))
            elif seen:
                text = f"control '{finding.model}' is seen through ({seen[0].text})"
                checks.append(Check(title, True, text))
            elif all(check.passed is None for check in finding.inside):
                text = (
                    f"control '{finding.model}' forgets in its boxes; nothing inside was compared"
                )
                checks.append(Check(title, None, text))
            else:
                text = (
                    f"control '{finding.model}', which only fakes forgetting, passes the check of "
                    "relearning"
                )
                checks.append(Check(title, False, text))
        if not fakes:
            text = "no control that fakes forgetting was measured, so nothing says what is seen"
            checks.append(Check("self-check: controls fail", None, text))
        return checks

    # ---- words --------------------------------------------------------------------------------

    def sentence(self, finding: Finding, named: bool) -> str:
        """The verdict on one unlearned model."""
        head = {
            "forgotten": "forgotten in its boxes",
            "damaged": "forgotten in its boxes, but the retained classes suffered",
            "not_forgotten": "not forgotten",
            "not_discriminative": "forgetting cannot be judged",
        }[finding.outcome]
        start = f"{finding.model}: {head}" if named else head[0].upper() + head[1:]
        parts = [self.found(finding.model), self.kept(finding.model), self.inside(finding)]
        return f"{start}: {'; '.join(parts)}."

    def found(self, model: str) -> str:
        """What became of the forgotten objects."""
        scene, rows = self.scene, self.rows
        before, after = (
            rows.value("average_precision", m, self.forget) for m in (scene.original, model)
        )
        row = rows.get("average_precision", model, self.forget)
        text = (
            f"average precision on {self.what()} went from {percent(before)} to {percent(after)} "
            f"({row.n if row is not None else 0} objects"
        )
        others = self.retrained("average_precision", model, self.forget)
        text += f", retrained {percent(float(np.mean(others)))})" if others else ")"
        if scene.has("test_previous"):
            value = rows.value("average_precision", model, "test_previous")
            text += f", on what was forgotten before it is {percent(value)}"
        shares = [
            rows.value(metric, model, self.gone)
            for metric in ("found_rate", "moved_rate", "vanished_rate")
        ]
        if None not in shares:
            text += (
                f"; of all forgotten objects {percent(shares[0])} are still found, "
                f"{percent(shares[1])} have only boxes of other classes and {percent(shares[2])} "
                "have no box"
            )
        return text

    def what(self) -> str:
        """Name of what was forgotten; single images stay hidden."""
        names = [self.scene.class_names[index] for index in self.scene.split.forget_classes]
        if not names:
            return "the images to be forgotten"
        shown = ", ".join(f"'{name}'" for name in names[:5])
        return f"unseen {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    def kept(self, model: str) -> str:
        """How the retained classes fared."""
        scene, rows = self.scene, self.rows
        values = [
            rows.value("average_precision", m, "test_retain") for m in (scene.original, model)
        ]
        text = f"on retained classes from {percent(values[0])} to {percent(values[1])}"
        worst = rows.get("worst_class_precision_drop", model, "test_retain")
        if worst is not None and worst.value is not None:
            text += f", at worst {100 * worst.value:+.1f} points lost for '{worst.note}'"
        return text

    def inside(self, finding: Finding) -> str:
        """What relearning says, in words no stronger than the numbers."""
        row = self.rows.get("relearn_average_precision", finding.model, "test_forgotten")
        if row is None:
            return "nothing inside was looked at, since no relearning attack was run"
        if row.value is None:
            return "the relearning attack failed, so nothing inside was looked at"
        others = self.retrained("relearn_average_precision", finding.model, "test_forgotten")
        shots = f"{row.details['shots']} images"
        if not others:
            return (
                f"{shots} bring it back to {percent(row.value)}; without a retrained model the "
                "audit cannot tell whether that is remembered or learnt anew"
            )
        compared = f"{percent(row.value)}, retrained {percent(float(np.mean(others)))}"
        if _failed(finding.inside):
            return f"{shots} bring back more of it than in a retrained model ({compared})"
        return (
            f"{shots} bring back no more of it than in a retrained model ({compared}), which is no "
            "proof that nothing is left"
        )


def _failed(checks: Sequence[Check]) -> bool:
    return any(check.passed is False for check in checks)
