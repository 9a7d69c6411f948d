"""The relearning attack of a multimodal audit: rows and curves."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mmforget.attacks.answer_relearning import (
    AnswerCurve,
    answer_curve_rows,
    draw_records,
    relearn_answers,
    strongest,
)
from mmforget.audit.multimodal_answers import targets_of
from mmforget.audit.multimodal_scene import MultimodalScene
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import draw
from mmforget.data.questions import QuestionDataset
from mmforget.metrics.answer_judges import judged
from mmforget.metrics.answers import exact_matches
from mmforget.models.base import Model

logger = logging.getLogger(__name__)


def measure_answer_relearning(
    scene: MultimodalScene, rows: Rows
) -> dict[str, list[dict[str, Any]]]:
    """Attack every model and add the rows ``relearn_success`` and ``relearn_answer_steps``.

    Returns:
        Curves for `Results.curves`.
    """
    settings, seed = scene.settings.relearning, scene.settings.seed
    if not settings.steps or not scene.has("train_forget"):
        return {}
    shots, gone = _shots(scene)
    asked, kept = (_some(scene, split) for split in (scene.judged, "test_retain"))
    assert asked is not None  # the split by which forgetting is judged has records
    targets = targets_of(asked)

    def forgotten(model: Model) -> float:
        said = scene.spoken(model, asked)
        return judged(scene.judge, asked.questions, said, targets).value or 0.0

    def retained(model: Model) -> float:
        if kept is None:
            return float("nan")
        said = scene.spoken(model, kept)
        return exact_matches(said, kept.answers).value or 0.0

    found: dict[str, list[AnswerCurve]] = {}
    problems: dict[str, Exception] = {}
    for one in scene.distinct:
        name = one.entry.name
        logger.info("relearning attack on '%s'", name)
        try:
            found[name] = relearn_answers(one.model, shots, forgotten, retained, settings, seed)
        except Exception as problem:  # becomes the error of this model's rows
            problems[name] = problem

    def best(name: str) -> AnswerCurve:
        if scene.twin[name] in problems:
            raise problems[scene.twin[name]]
        return strongest(found[scene.twin[name]])

    def success(name: str) -> Measured:
        curve = best(name)
        note = f"retained {100 * curve.retained:.0f} %"  # short enough for a column
        return Measured(
            curve.success[-1],
            n=len(asked),
            note=note + ("; diverged" if curve.diverged else ""),
            details={
                "steps": settings.steps,
                "records": gone,
                "other_records": len(shots) - gone,
                "learning_rate": curve.learning_rate,
                "start": curve.success[0],
                "retained": curve.retained,
            },
        )

    def steps(name: str) -> Measured:
        level = settings.regained * best(scene.original).success[0]
        reached = [step for c in found[scene.twin[name]] if (step := c.reached(level)) is not None]
        details = {"level": level, "evaluated_every": settings.evaluate_every}
        if not reached:
            note = f"> {settings.steps} steps"
            return Measured(None, note=note, details=details, censored=True)
        return Measured(float(min(reached)), n=len(asked), details=details)

    for name in scene.names:
        rows.add("relearn_success", name, scene.judged, lambda n=name: success(n))  # type: ignore[misc]
        rows.add("relearn_answer_steps", name, scene.judged, lambda n=name: steps(n))  # type: ignore[misc]
    curves = [
        row
        for name in scene.names
        for row in answer_curve_rows(found.get(scene.twin[name], []), name)
    ]
    return {"relearning": curves} if curves else {}


def _shots(scene: MultimodalScene) -> tuple[QuestionDataset, int]:
    """Training records of the attacker, and how many of them are about forgotten entities."""
    settings, seed = scene.settings.relearning, scene.settings.seed
    every = scene.data.questions("train")
    every = every.subset(np.argsort(every.ids))
    every = every.subset(np.flatnonzero(every.kinds == scene.kind))
    gone = np.isin(every.ids, scene.data.probe("train", scene.kind, "forget").ids)
    gone |= np.isin(every.ids, scene.data.probe("train", scene.kind, "previous").ids)
    subjects = every.subjects
    taken = np.flatnonzero(gone)
    own = taken[draw_records(subjects[gone], _entities(subjects[gone]), settings.shots, seed)]
    rest = np.flatnonzero(~gone)
    kept = subjects[~gone]
    others = rest[draw_records(kept, _entities(kept), settings.others, seed)]
    return every.subset(np.sort(np.concatenate([own, others]))), len(own)


def _entities(subjects: np.ndarray) -> list[int]:
    return [int(one) for one in np.unique(subjects)]


def _some(scene: MultimodalScene, split: str) -> QuestionDataset | None:
    """A random part of the records of a split, which takes less time."""
    if not scene.has(split):
        return None
    data, most = scene.parts[split].data, scene.settings.relearning.evaluation_records
    return data.subset(draw(len(data), most, scene.settings.seed, f"relearning/{split}"))
