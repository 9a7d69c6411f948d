"""From rows to checks, and from checks to one sentence with its evidence.

A check compares a model with the retrained models. It passes inside their band: their mean, give or
take two standard deviations (at least the smallest difference that means anything, `Spec.smallest`)
plus half the 95 % interval of the model's distance to them. Passing is no proof of equality; rows
carry `equivalent_to_retrained` for that.

The audit checks itself before it concludes: a retrained model that was held out must pass, the
original must fail, and a control that only fakes forgetting must fail a check of what is left
inside. If one of these does not hold, the audit cannot tell, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mmforget.audit.privacy import testable
from mmforget.audit.results import Check, Verdict
from mmforget.audit.rows import METRICS, Rows
from mmforget.audit.scene import Scene

SEVERITY = ("forgotten", "damaged", "not_forgotten", "not_discriminative")


@dataclass
class Finding:
    """All checks of one model.

    Attributes:
        model: its name.
        forgets: checks of the answers on what was to be forgotten.
        keeps: checks of the answers on what was to be kept.
        inside: checks of representation and relearning.
        privacy: checks of membership.
        evidence: clauses for the verdict.
    """

    model: str
    forgets: list[Check] = field(default_factory=list)
    keeps: list[Check] = field(default_factory=list)
    inside: list[Check] = field(default_factory=list)
    privacy: list[Check] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """All of them, in order."""
        return [*self.forgets, *self.keeps, *self.inside, *self.privacy]

    @property
    def outcome(self) -> str:
        """What the answers alone say: see `Verdict.outcome`."""
        if any(check.passed is None for check in self.forgets):
            return "not_discriminative"
        if not all(check.passed for check in self.forgets):
            return "not_forgotten"
        return "forgotten" if all(check.passed for check in self.keeps) else "damaged"


@dataclass(frozen=True)
class Band:
    """Where a model must lie to look like a retrained one."""

    low: float
    high: float
    mean: float
    n: int


def percent(value: float | None) -> str:
    """``0.985`` as ``98.5 %``."""
    return "not measured" if value is None else f"{100 * value:.1f} %"


def conclude(scene: Scene, rows: Rows) -> tuple[list[Check], Verdict, dict[str, Finding]]:
    """Judge every model, check the audit itself, and say what follows.

    Returns:
        The self-checks and the checks of the unlearned models; the verdict over all unlearned
        models (the worst of them); the findings by model.
    """
    judge = _Judge(scene, rows)
    findings = {name: judge.model(name) for name in scene.names}
    checks = _self_checks(scene, findings)
    broken = [check.text for check in checks if check.passed is False]
    unlearned = [findings[audited.entry.name] for audited in scene.by_role("unlearned")]
    for finding in unlearned:
        checks += finding.checks
    outcome = max((finding.outcome for finding in unlearned), key=SEVERITY.index)
    shown = [judge.sentence(finding, len(unlearned) > 1) for finding in unlearned]
    if broken or outcome == "not_discriminative":
        reasons = broken or [
            check.text for f in unlearned for check in f.forgets if check.passed is None
        ]
        return (
            checks,
            Verdict(
                "not_discriminative",
                f"This audit is not discriminative: {'; '.join(reasons)}. "
                f"Measured nevertheless: {' '.join(shown)}",
            ),
            findings,
        )
    return checks, Verdict(outcome, " ".join(shown)), findings  # type: ignore[arg-type]


class _Judge:
    """Makes the checks of one model after the other."""

    def __init__(self, scene: Scene, rows: Rows) -> None:
        self.scene, self.rows = scene, rows
        self.relearning = "full" if "full" in scene.settings.relearning.modes else "head"

    # ---- bands ------------------------------------------------------------------------------

    def number(self, metric: str, model: str, split: str) -> float | None:
        """Value of a row; a censored number of steps counts as the first one after the last."""
        row = self.rows.get(metric, model, split)
        if row is not None and row.censored:
            settings = self.scene.settings.relearning
            return float(settings.steps + settings.evaluate_every)
        return None if row is None else row.value

    def band(
        self,
        metric: str,
        model: str,
        split: str,
        smallest: float | None = None,
        most_noise: float = np.inf,
    ) -> Band | None:
        """The band of the other retrained models, None without any.

        Args:
            metric: of the row.
            model: of the row.
            split: of the row.
            smallest: half width that the band has at least, instead of that of the metric.
            most_noise: largest widening by the interval, where a small sample must not excuse much.
        """
        others = self.scene.references(model)
        found = [self.number(metric, other, split) for other in others]
        values = [value for value in found if value is not None]
        if not values or len(values) < len(found):
            return None
        spread = 2 * float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        least = METRICS[metric].smallest if smallest is None else smallest
        noise = self.rows.half_width(metric, model, split, others)
        width = max(spread, least) + min(noise, most_noise)
        mean, spec = float(np.mean(values)), METRICS[metric]
        low = -np.inf if spec.low is None else spec.low
        high = np.inf if spec.high is None else spec.high
        return Band(max(low, mean - width), min(high, mean + width), mean, len(values))

    def inside(
        self,
        title: str,
        metric: str,
        model: str,
        split: str,
        show: Callable[[float | None], str],
        side: str = "both",
        smallest: float | None = None,
        most_noise: float = np.inf,
    ) -> Check:
        """Compare one value with the band.

        Args:
            title: of the check.
            metric: of the row.
            model: of the row.
            split: of the row.
            show: how values are written.
            side: ``both``; ``low`` fails only below the band, ``high`` only above.
            smallest: see `band`.
            most_noise: see `band`.
        """
        name = f"{title} [{model}]"
        value = self.number(metric, model, split)
        if value is None:
            row = self.rows.get(metric, model, split)
            why = (row.error or row.note) if row is not None else ""
            return Check(name, None, f"{title}: not measured" + (f" ({why})" if why else ""))
        band = self.band(metric, model, split, smallest, most_noise)
        if band is None:
            needs = "a second retrained model" if self.scene.retrained else "a retrained model"
            return Check(name, None, f"{title}: {show(value)}; a comparison needs {needs}")
        passed = (side == "high" or value >= band.low) and (side == "low" or value <= band.high)
        limits = {
            "both": f"{show(band.low)} to {show(band.high)}",
            "low": f"at least {show(band.low)}",
            "high": f"at most {show(band.high)}",
        }
        models = "1 retrained model" if band.n == 1 else f"{band.n} retrained models"
        text = (
            f"{title}: {show(value)}, mean of {models} {show(band.mean)}, accepted {limits[side]}"
        )
        return Check(name, passed, text)

    # ---- checks -----------------------------------------------------------------------------

    def model(self, model: str) -> Finding:
        """All checks of one model."""
        scene = self.scene
        finding = Finding(model)
        finding.forgets.append(
            self.forgets("forgets", model, scene.seen("forget"), bool(scene.split.forget_classes))
        )
        previous = scene.seen("previous")
        if scene.has(previous):
            earlier = bool(scene.split.previous_classes)
            finding.forgets.append(self.forgets("stays forgotten", model, previous, earlier))
        finding.keeps.append(self.keeps(model))
        if scene.by_class:
            finding.inside.append(
                self.inside("linear probe", "probe_recall", model, "test_forgotten", percent)
            )
        finding.inside.append(self.similar(model))
        finding.inside.append(self.relearns(model))
        finding.privacy.append(self.membership(model))
        return finding

    def forgets(self, title: str, model: str, split: str, classes: bool) -> Check:
        """The answers on what was to be forgotten."""
        name, value = f"{title} [{model}]", self.rows.value("accuracy", model, split)
        if self.scene.goal == "concept_removal" and classes and value is not None:
            row = self.rows.get("accuracy", model, split)
            chance = 1 / len(self.scene.class_names)
            lowest = row.ci_low if row is not None and row.ci_low is not None else value
            text = f"{title}: accuracy {percent(value)}, chance level {percent(chance)}"
            return Check(name, lowest <= chance, text)
        if self.scene.references(model) or not classes or value is None:
            # no retrained model ever answers a class that it never saw: nothing to be excused
            noise = 0.0 if classes else np.inf
            return self.inside(title, "accuracy", model, split, percent, most_noise=noise)
        # without retrained model: a model without the class never answers it, like the logit mask
        limit = METRICS["accuracy"].smallest
        text = (
            f"{title}: accuracy {percent(value)}, accepted at most {percent(limit)}, "
            "the level of a masked output, without retrained model"
        )
        return Check(name, value <= limit, text)

    def keeps(self, model: str) -> Check:
        """The answers on what was to be kept: a small drop, or no more than retraining costs."""
        name = f"keeps the rest [{model}]"
        drop = self.rows.value("retain_drop", model, "test_retain")
        accuracy = self.rows.value("accuracy", model, "test_retain")
        if drop is None or accuracy is None:
            return Check(name, None, "keeps the rest: not measured")
        limit = self.scene.settings.max_retain_drop
        text = (
            f"keeps the rest: accuracy {percent(accuracy)} on retained test images, "
            f"{100 * drop:+.1f} points lost, accepted at most {100 * limit:.1f}"
        )
        band = self.band("accuracy", model, "test_retain", limit, most_noise=limit)
        if band is not None:
            text += f" or an accuracy of at least {percent(band.low)}, like retraining"
        return Check(name, drop <= limit or (band is not None and accuracy >= band.low), text)

    def similar(self, model: str) -> Check:
        """Features like those of retrained models, by two measures that must agree."""
        split = self.scene.seen("forgotten")
        name = f"features like retrained [{model}]"
        first = self.inside(
            "similarity (CKA)", "cka_to_retrained", model, split, _two_digits, "low"
        )
        second = self.inside(
            "distance (Procrustes)", "procrustes_to_retrained", model, split, _two_digits, "high"
        )
        text = f"{first.text}; {second.text}"
        if first.passed == second.passed:
            return Check(name, first.passed, text)
        if None not in (first.passed, second.passed):
            text += "; the two measures disagree, so nothing is claimed"
        return Check(name, None, text)

    def relearns(self, model: str) -> Check:
        """As slow, and no slower, than retrained models."""
        settings = self.scene.settings.relearning

        def show(value: float | None) -> str:
            if value is None:
                return "not measured"
            return f"> {settings.steps} steps" if value > settings.steps else f"{value:g} steps"

        return self.inside(
            "relearning",
            f"relearn_steps_{self.relearning}",
            model,
            self.scene.seen("forgotten"),
            show,
            smallest=float(settings.evaluate_every),
        )

    def membership(self, model: str) -> Check:
        """Members of the forget set look like those of a retrained model."""
        known = testable(self.rows, self.scene.original)
        value = self.rows.value("membership_validity", self.scene.original, "train_retain")
        if not known:
            shown = "not measured" if value is None else f"{value:.2f}"
            return Check(
                f"membership [{model}]",
                None,
                f"membership: not testable, the original model hardly memorises (AUC {shown})",
            )
        return self.inside("membership", "membership_auc", model, "train_forgotten", _two_digits)

    # ---- words ------------------------------------------------------------------------------

    def sentence(self, finding: Finding, named: bool) -> str:
        """The verdict on one unlearned model."""
        heads = {
            "forgotten": "forgotten in its answers",
            "damaged": "forgotten in its answers, but the retained data suffered",
            "not_forgotten": "not forgotten",
            "not_discriminative": "forgetting cannot be judged",
        }
        head = heads[finding.outcome]
        start = f"{finding.model}: {head}" if named else head[0].upper() + head[1:]
        parts = [self.answers(finding.model), self.left_inside(finding)]
        return f"{start}: {'; '.join(parts)}."

    def answers(self, model: str) -> str:
        """How the accuracies moved."""
        scene, rows = self.scene, self.rows
        forget, previous = scene.seen("forget"), scene.seen("previous")
        what = self.what(forget)
        before, after = (rows.value("accuracy", m, forget) for m in (scene.original, model))
        row = rows.get("accuracy", model, forget)
        clause = f"accuracy on {what} went from {percent(before)} to {percent(after)}"
        clause += f" ({row.n} images" if row is not None else " ("
        band = self.band("accuracy", model, forget)
        clause += f", retrained {percent(band.mean)})" if band else ", no retrained model)"
        if scene.has(previous):
            after = rows.value("accuracy", model, previous)
            clause += f", on what was forgotten before it is {percent(after)}"
        kept = [rows.value("accuracy", m, "test_retain") for m in (scene.original, model)]
        return f"{clause}, on retained test images from {percent(kept[0])} to {percent(kept[1])}"

    def what(self, split: str) -> str:
        """Name of the forgotten data; identities of single samples stay hidden."""
        classes = [self.scene.class_names[index] for index in self.scene.split.forget_classes]
        seen = "unseen images of " if split.startswith("test") else "training images of "
        if not classes:
            return "the samples to be forgotten"
        shown = ", ".join(f"'{name}'" for name in classes[:5])
        return seen + shown + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")

    def left_inside(self, finding: Finding) -> str:
        """What features and relearning say, in words no stronger than the numbers."""
        scene, model = self.scene, finding.model
        if not scene.references(model):
            return (
                "without a retrained model the audit cannot tell this from a masked output, and "
                "says nothing about what is left inside"
            )
        clauses = []
        failed = {check.name.split(" [")[0] for check in finding.inside if check.passed is False}
        if "linear probe" in failed:
            value = self.number("probe_recall", model, "test_forgotten")
            band = self.band("probe_recall", model, "test_forgotten")
            assert value is not None and band is not None  # the check has failed on them
            verb = (
                "its features still separate what was forgotten"
                if value > band.mean
                else "its features separate what was forgotten less than those of retraining"
            )
            clauses.append(
                f"{verb} (probe recall {percent(value)}, retrained {percent(band.mean)})"
            )
        if "features like retrained" in failed:
            value = self.number("cka_to_retrained", model, scene.seen("forgotten"))
            band = self.band("cka_to_retrained", model, scene.seen("forgotten"))
            assert value is not None and band is not None
            clauses.append(
                f"its features differ from those of retrained models (CKA {value:.2f}, "
                f"among retrained {band.mean:.2f})"
            )
        if "relearning" in failed:
            metric = f"relearn_steps_{self.relearning}"
            value = self.number(metric, model, scene.seen("forgotten"))
            band = self.band(metric, model, scene.seen("forgotten"))
            assert value is not None and band is not None
            speed = "faster" if value < band.mean else "more slowly"
            limit = scene.settings.relearning.steps
            shown = [f"> {limit}" if v > limit else f"{v:g}" for v in (value, band.mean)]
            clauses.append(
                f"it relearns {speed} than retrained models "
                f"({shown[0]} steps, retrained {shown[1]})"
            )
        if clauses:
            return " and ".join(clauses)
        passed = [c.name.split(" [")[0] for c in finding.inside if c.passed]
        if not passed:
            return "what is left inside could not be compared"
        return (
            f"inside, no difference from retrained models was found ({', '.join(passed)}), "
            "which is no proof that there is none"
        )


def _two_digits(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _self_checks(scene: Scene, findings: dict[str, Finding]) -> list[Check]:
    first = findings[scene.original]
    original = next((c for c in first.forgets if c.passed is not None), None)
    checks = [
        Check(
            "self-check: original fails",
            None if original is None else not original.passed,
            "the original model fails, as it must"
            if original is not None and not original.passed
            else "the original model passes the forgetting check"
            if original is not None
            else "the original model could not be judged",
        )
    ]
    held_out = scene.by_role("held_out")
    for audited in held_out:
        name = audited.entry.name
        failed = [check.text for check in findings[name].checks if check.passed is False]
        text = f"held-out retrained model '{name}' " + (
            f"fails ({'; '.join(failed)})" if failed else "passes, as it must"
        )
        known = any(check.passed is not None for check in findings[name].checks)
        checks.append(Check("self-check: held-out passes", (not failed) if known else None, text))
    if not held_out:
        checks.append(
            Check(
                "self-check: held-out passes",
                None,
                "no retrained model was held out, so false alarms of this audit are unknown",
            )
        )
    return [*checks, *_control_checks(scene, findings)]


def _control_checks(scene: Scene, findings: dict[str, Finding]) -> list[Check]:
    """Every control that fakes forgetting in its answers must be seen through."""
    checks = []
    fakes = 0
    for audited in scene.by_role("control"):
        finding = findings[audited.entry.name]
        title = f"self-check: control {finding.model} fails"
        if finding.outcome == "not_forgotten":
            checks.append(Check(title, True, f"control '{finding.model}' fails by its answers"))
            continue
        fakes += 1
        seen = [check for check in finding.inside if check.passed is False]
        if seen:
            text = f"control '{finding.model}' is seen through ({seen[0].text})"
            checks.append(Check(title, True, text))
        elif all(check.passed is None for check in finding.inside):
            text = f"control '{finding.model}' forgets in its answers; nothing inside was compared"
            checks.append(Check(title, None, text))
        else:
            text = (
                f"control '{finding.model}', which only fakes forgetting, passes every check of "
                "representation and relearning"
            )
            checks.append(Check(title, False, text))
    if not fakes:
        text = "no control that fakes forgetting was measured, so nothing says what would be seen"
        checks.append(Check("self-check: controls fail", None, text))
    return checks
