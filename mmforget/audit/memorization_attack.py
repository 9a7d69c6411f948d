"""The attack of a memorization audit: run on every model with its controls, and what it proves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmforget.audit.drawing import as_bytes, drawer, strip
from mmforget.audit.intervals import wilson
from mmforget.audit.rows import Measured, Rows
from mmforget.errors import MMForgetError
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive

if TYPE_CHECKING:
    from mmforget.audit.memorization import (
        MemorizationAuditSettings,
        MemorizationScene,
        Remember,
    )

logger = logging.getLogger(__name__)

INITS = ("random", "trigger", "ordinary")

GROUPS = {"located": "memorized", "held_out": "held_out"}
"""Group of memorized prompts: what the attack calls their pictures."""

KEPT_BYTES = 2**30
"""Memory that pictures drawn by an attack may take, so that the report can show a few of them."""


class AttackFailedError(RuntimeError):
    """An attack that could not be run to its end; becomes the error of a row."""


@dataclass(frozen=True)
class AttackFinding:
    """What the attack found on one model.

    Attributes:
        model: its name.
        curve: rows of `EmbeddingAttackReport.curve`, of all starts.
        settings: of the attack.
        queries, seconds: its cost.
        pictures: per prompt of the examples a strip of pictures drawn from what was found.
        notes: what was left out, and why.
        error: why it could not be run to its end.
    """

    model: str
    curve: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    queries: int = 0
    seconds: float = 0.0
    pictures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""

    def of(self, group: str, kind: str | None = None) -> list[Mapping[str, Any]]:
        """The rows of a group of pictures, of one kind or of all."""
        return [
            row for row in self.curve if row["group"] == group and kind in (None, row.get("kind"))
        ]

    @property
    def inits(self) -> list[str]:
        """Where it started."""
        return list(dict.fromkeys(row["init"] for row in self.of("memorized")))

    def valid_steps(self, limit: float) -> int | None:
        """Steps up to which pictures that nobody was trained on stay hidden, from every start.

        Args:
            limit: share of them that may come out.

        Returns:
            None if there were no such pictures; 0 if they come out at once.
        """
        controls = self.of("control")
        if not controls or any(row.get("rate") is None for row in controls):
            return None
        if not set(self.inits) <= {row["init"] for row in controls}:
            return None
        valid = 0
        for budget in sorted({row["budget"] for row in self.curve}):
            own = [row for row in controls if row["budget"] == budget]
            # a search that broke off from one start says nothing beyond that
            complete = set(self.inits) <= {row["init"] for row in own}
            if not complete or max(row["rate"] for row in own) > limit:
                break
            valid = budget
        return valid

    def cap(self, settings: MemorizationAuditSettings) -> int | None:
        """Most steps that count; None for all.

        Where the attack means too little at any budget, no success is discounted: the highest rate
        of all is an upper bound.
        """
        valid = self.valid_steps(settings.max_control_rate)
        return None if valid is None or valid < settings.min_attack_steps else valid

    def strongest(
        self, group: str, kind: str | None = None, most: int | None = None
    ) -> Mapping[str, Any] | None:
        """The row with the highest rate among those of at most so many steps; an attacker chooses.

        Of equal rates that of the fewest steps counts.
        """
        rows = [
            row
            for row in self.of(group, kind)
            if row.get("rate") is not None and (most is None or row["budget"] <= most)
        ]
        return max(rows, key=lambda row: (row["rate"], -row["budget"]), default=None)


def attack_all(
    scene: MemorizationScene, rows: Rows, remember: Remember
) -> dict[str, AttackFinding]:
    """Attack original, unlearned and retrained models, each together with its controls.

    Args:
        scene: models, prompts and pictures.
        rows: the results are added here.
        remember: see `audit_memorization`.
    """
    found = {}
    attacked = [scene.original, *scene.by_role("unlearned"), *scene.by_role("retrained")]
    for one in attacked:
        name = one.entry.name
        found[name] = _attacked(scene, name, drawer(one), remember)
    for finding in found.values():
        _rows(scene, rows, finding)
    return found


def _attacked(
    scene: MemorizationScene, name: str, model: DiffusionGenerator, remember: Remember
) -> AttackFinding:
    parts, error = [], ""
    for init in scene.settings.attack_inits:
        try:
            parts.append(remember(f"attack-{name}-{init}", partial(_run, scene, model, init)))
        except MMForgetError as problem:  # what was measured before must not be lost
            logger.warning("the attack on %s from %s failed", name, init, exc_info=True)
            error = f"{type(problem).__name__}: {problem}"
    finding = AttackFinding(
        name,
        tuple(row for part in parts for row in part["curve"]),
        parts[0]["settings"] if parts else {},
        sum(part["queries"] for part in parts),
        sum(part["seconds"] for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part["notes"])),
        error=error,
    )
    drawn = {key: image for part in parts for key, image in part["strips"].items()}
    return replace(finding, pictures=_shown(scene, finding, drawn))


def _run(scene: MemorizationScene, model: DiffusionGenerator, init: str) -> dict[str, Any]:
    """Attack from one start; plain data, with the pictures of a few prompts."""
    from mmforget.attacks.embedding_inversion import embedding_attack
    from mmforget.models.embedding_search import EmbeddingSearch

    settings = scene.settings
    shown = _names(scene)
    report = embedding_attack(
        model,
        scene.memorized,
        scene.similarity,
        held_out=scene.held_out,
        ordinary=settings.attack_ordinary,
        background=scene.background,
        inits=(init,),  # type: ignore[arg-type]
        budgets=settings.attack_budgets,
        settings=EmbeddingSearch(batch_size=settings.attack_batch_size),
        pictures=settings.attack_pictures,
        guidance=scene.sampling["guidance"],
        steps=scene.sampling["steps"],
        seed=derive(settings.seed, "attacking memories"),
        control_limit=settings.max_control_rate,
        keep=bool(shown) and _size(scene) <= KEPT_BYTES,
        progress=scene.progress,
    )
    strips = {}
    for row in report.curve:
        drawn = report.pictures.get((row["group"], init, row["budget"]))
        if drawn is None or row["group"] not in GROUPS.values():
            continue
        # the pictures of a group lie kind by kind, as its rows do
        names = [n for r in report.rows(row["group"], budget=row["budget"]) for n in r["names"]]
        for name in set(row["names"]) & shown:
            first = names.index(name) * settings.attack_pictures
            own = drawn[first : first + settings.attack_pictures]
            strips[f"{init}/{row['budget']}/{name}"] = strip(as_bytes(own))
    return report.to_dict() | {"strips": strips}


def _size(scene: MemorizationScene) -> int:
    """Bytes of all pictures that the attack draws."""
    settings, some = scene.settings, scene.pictures[scene.original.entry.name][0]
    controls = scene.memorized.controls
    count = sum(len(part.memorized.images) for part in scene.parts)
    count += 0 if controls is None else len(controls)
    return 4 * some.numel() * count * settings.attack_pictures * len(settings.attack_budgets)


def _names(scene: MemorizationScene) -> set[str]:
    """Names of the pictures whose return the report shows."""
    return {
        part.memorized.prompts[row].images[0]
        for part in scene.parts
        for row in scene.shown_prompts(part)
    }


def _shown(
    scene: MemorizationScene, finding: AttackFinding, drawn: Mapping[str, str]
) -> dict[str, str]:
    """Per prompt the pictures of the start and budget that bring most back."""
    found = {}
    cap = finding.cap(scene.settings)
    for part in scene.parts:
        best = finding.strongest(GROUPS[part.group], part.kind, cap)
        # a search that brings nothing back is shown after all of its steps
        if best is not None and best["rate"] == 0:
            rows = finding.of(GROUPS[part.group], part.kind)
            best = max(rows, key=lambda row: row["budget"])
        for row in scene.shown_prompts(part):
            one = part.memorized.prompts[row]
            key = f"{best['init']}/{best['budget']}/{one.images[0]}" if best else ""
            if key in drawn:
                found[one.prompt] = drawn[key]
    return found


def _rows(scene: MemorizationScene, rows: Rows, finding: AttackFinding) -> None:
    name = finding.model
    for part in scene.parts:
        rows.add(
            "attack_embedding", name, part.split,
            partial(_strongest, scene, finding, GROUPS[part.group], part.kind),
        )  # fmt: skip
    if finding.of("control"):
        rows.add(
            "attack_embedding_controls", name, "never_trained",
            partial(_strongest, scene, finding, "control", None),
        )  # fmt: skip
        rows.add("attack_valid_steps", name, "never_trained", partial(_valid, scene, finding))


def _valid(scene: MemorizationScene, finding: AttackFinding) -> Measured:
    valid = finding.valid_steps(scene.settings.max_control_rate)
    last = max(row["budget"] for row in finding.of("control"))
    if valid is None:
        return Measured(None, note="the controls were not attacked from every start")
    note = "no longer search was run" if valid == last else ""
    return Measured(float(valid), note=note)


def _strongest(
    scene: MemorizationScene, finding: AttackFinding, group: str, kind: str | None
) -> Measured:
    if finding.error:
        raise AttackFailedError(finding.error)
    cap = finding.cap(scene.settings)
    row = finding.strongest(group, kind, cap)
    if row is None:
        return Measured(None, note="not attacked")
    n, hits = int(row["n"]), round(row["rate"] * row["n"])
    details = {
        "init": row["init"],
        "steps": row["budget"],
        "counted_up_to": cap,
        "mean_similarity": row.get("mean_similarity"),
        "queries": finding.queries,
        "attack_seconds": finding.seconds,
        "notes": list(finding.notes),
        "settings": dict(finding.settings),
    }
    note = "" if cap is not None else "no step count at which the attack means something"
    return Measured(row["rate"], wilson(hits, n), n, note=note, details=details)
