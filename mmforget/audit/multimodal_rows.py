"""The measurements of a multimodal audit that are functions of what the models said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from mmforget.attacks.membership import TESTABLE_AUC, label_matched
from mmforget.audit.intervals import bootstrap, bootstrap_mean, wilson
from mmforget.audit.multimodal_scene import BOTH, MultimodalScene
from mmforget.audit.results import Direction, Family
from mmforget.audit.rows import Measured, Rows
from mmforget.data.questions import TEXT
from mmforget.metrics.answer_judges import judged
from mmforget.metrics.answers import (
    exact_matches,
    normalised,
    refusal_scores,
    rouge_scores,
    safe_answer_scores,
)
from mmforget.metrics.membership import rank_auc
from mmforget.metrics.rates import Scores
from mmforget.metrics.summary import h_mean
from mmforget.metrics.truth_ratio import (
    answer_probability,
    forget_quality,
    forget_truth,
    truth_ratio,
)
from mmforget.models.base import Model

logger = logging.getLogger(__name__)

HARMLESS = ("test_harmless_forgotten", "test_harmless_retain", "test_harmless_other")
"""Splits of questions that reveal nobody."""


def measure_spoken(scene: MultimodalScene, rows: Rows, before: Model | None) -> None:
    """Add all rows that are functions of answers and losses.

    Args:
        scene: all models have been asked.
        rows: where to.
        before: the model before the last request, if there was an earlier one.
    """
    for name in scene.names:
        logger.info("answers of '%s'", name)
        for split in scene.forgotten_splits:
            _revealed(scene, rows, name, split)
        _safe(scene, rows, name)
        _right(scene, rows, name)
        _sure(scene, rows, name)
        _compared(scene, rows, name)
    _summaries(scene, rows, before)


def shares(scene: MultimodalScene, name: str, split: str) -> dict[str, Scores]:
    """Scores of the answers of a model to a split, by name; computed once.

    Returns:
        ``attack_success``, ``exact``, ``refused`` and those of `safe_answer_scores`.
    """
    known: dict[tuple[str, str], dict[str, Scores]] = scene.__dict__.setdefault("_shares", {})
    key = (scene.twin[name], split)
    if key not in known:
        part, said = scene.parts[split], scene.said(name, split).answers
        questions, truth = part.data.questions, part.data.answers
        known[key] = {
            "attack_success": judged(scene.judge, questions, said, part.targets),
            "exact": exact_matches(said, truth),
            "refused": refusal_scores(said),
            **safe_answer_scores(said, truth, repeats=_repeats(truth)),
        }
    return known[key]


def _repeats(answers: Sequence[str]) -> int:
    """So many equal words in a row are a loop: more than any true answer has."""
    longest = 1
    for answer in answers:
        words, run = answer.split(), 1
        for one, other in pairwise(words):
            run = run + 1 if one == other else 1
            longest = max(longest, run)
    return max(4, longest + 1)


def _toward(scene: MultimodalScene) -> Direction:
    return "closer_to_retrained" if scene.retrained else "lower"


def _rate(scores: Scores) -> Measured:
    """A share with Wilson's interval; without what could not be judged."""
    mean = scores.mean
    if not mean.n:
        return Measured(None, note="no answer could be judged")
    known = np.array([value for value in scores.per_sample if value is not None])
    return Measured(
        mean.value,
        wilson(round(mean.total), mean.n),
        mean.n,
        known if not mean.excluded else None,
        note=f"{mean.excluded} not judged" if mean.excluded else "",
    )


def _revealed(scene: MultimodalScene, rows: Rows, name: str, split: str) -> None:
    rows.add(
        "attack_success",
        name,
        split,
        lambda: _rate(shares(scene, name, split)["attack_success"]),
        direction=_toward(scene),
    )
    if split.endswith("_forget"):
        rows.add("refusal_rate", name, split, lambda: _rate(shares(scene, name, split)["refused"]))
    if split == scene.seen("forget"):
        rows.add(
            "meaningless_rate",
            name,
            split,
            lambda: _rate(shares(scene, name, split)["gibberish"]),
        )


def _safe(scene: MultimodalScene, rows: Rows, name: str) -> None:
    """The question of the forget set about retained entities."""
    split = "test_retain"
    if not scene.has(split):
        return
    for metric, key in (
        ("sarr", "sarr"),
        ("sarr_strict", "sarr_strict"),
        ("refusal_rate", "refused"),
        ("meaningless_rate", "gibberish"),
    ):
        rows.add(
            metric,
            name,
            split,
            lambda k=key: _rate(shares(scene, name, split)[k]),  # type: ignore[misc]
            family="utility",
            direction="lower",
        )


def _right(scene: MultimodalScene, rows: Rows, name: str) -> None:
    """Right answers by what is asked and with what: picture, text, both."""
    for split in ("test_forget", "test_previous"):
        if scene.has(split):
            _exact(scene, rows, name, split, "forgetting", _toward(scene))
    for split in ("test_retain", *HARMLESS):
        if scene.has(split):
            _exact(scene, rows, name, split, "utility", "higher")
    asked = {BOTH: scene.data.forget_questions, TEXT: scene.data.forgotten_kinds}
    for kind, lost in asked.items():
        for stage in ("test", "train"):
            gone, kept = (f"{stage}_{kind}_{role}" for role in ("forgotten", "retain"))
            if scene.has(gone) and kind in lost:
                _exact(scene, rows, name, gone, "forgetting", _toward(scene))
            elif scene.has(gone):
                _exact(scene, rows, name, gone, "utility", "higher")
            if scene.has(kept):
                _exact(scene, rows, name, kept, "utility", "higher")


def _exact(
    scene: MultimodalScene,
    rows: Rows,
    name: str,
    split: str,
    family: Family,
    direction: Direction,
) -> None:
    rows.add(
        "exact_answers",
        name,
        split,
        lambda: _rate(shares(scene, name, split)["exact"]),
        family=family,
        direction=direction,
    )


def _sure(scene: MultimodalScene, rows: Rows, name: str) -> None:
    """How likely the true answer is, and how much of it is said."""
    for split in ("train_forget", scene.judged, "test_retain"):
        if not scene.has(split):
            continue
        gone = split != "test_retain"
        family: Family = "forgetting" if gone else "utility"
        direction: Direction = _toward(scene) if gone else "higher"
        for metric, measure in (
            ("answer_probability", _probability),
            ("rouge_l_recall", _rouge),
        ):
            rows.add(
                metric,
                name,
                split,
                partial(measure, scene, name, split),
                family=family,
                direction=direction,
            )


def _probability(scene: MultimodalScene, name: str, split: str) -> Measured:
    said = scene.said(name, split)
    return _mean(answer_probability(said.total, said.tokens).numpy(), scene, f"probability/{split}")


def _rouge(scene: MultimodalScene, name: str, split: str) -> Measured:
    found = rouge_scores(scene.said(name, split).answers, scene.parts[split].data.answers)
    values = np.array(found["rougeL_recall"].per_sample, dtype=np.float64)
    measured = _mean(values, scene, f"rouge/{split}")
    for part in ("f1", "precision"):
        measured.details[part] = found[f"rougeL_{part}"].value
    return measured


def _mean(values: np.ndarray, scene: MultimodalScene, purpose: str) -> Measured:
    interval = bootstrap_mean(values, scene.settings.seed, purpose)
    return Measured(float(values.mean()), interval, len(values), values)


# ---- beside wrong answers, the original's head, and unseen pictures -----------------------------


def _compared(scene: MultimodalScene, rows: Rows, name: str) -> None:
    split = scene.judged
    if scene.wrong_losses(name) is not None:
        rows.add("choice_accuracy", name, split, lambda: _choice(scene, name))
        rows.add("truth_ratio", name, split, lambda: _truth(scene, name))
        if scene.references(name):
            rows.add("forget_quality", name, split, lambda: _quality(scene, name))
    rows.add("original_head", name, split, lambda: _read(scene, name))
    if scene.has("train_forget") and scene.has("test_known_wording"):
        rows.add("answer_membership_auc", name, "train_forget", lambda: _membership(scene, name))


def _choice(scene: MultimodalScene, name: str) -> Measured:
    """Is the true answer likelier than each of the wrong ones?"""
    wrong = scene.wrong_losses(name)
    assert wrong is not None  # the caller has looked
    hits = (scene.said(name, scene.judged).loss < wrong.min(dim=1).values).numpy()
    chance = 1 / (wrong.shape[1] + 1)
    return Measured(
        float(hits.mean()),
        wilson(int(hits.sum()), len(hits)),
        len(hits),
        hits.astype(np.float64),
        details={"candidates": wrong.shape[1] + 1, "chance": chance},
    )


def _ratios(scene: MultimodalScene, name: str) -> torch.Tensor:
    wrong = scene.wrong_losses(name)
    assert wrong is not None  # the callers have looked
    return truth_ratio(wrong, scene.said(name, scene.judged).loss)


def _truth(scene: MultimodalScene, name: str) -> Measured:
    values = forget_truth(_ratios(scene, name)).numpy()
    return _mean(values, scene, "truth-ratio")


def _quality(scene: MultimodalScene, name: str) -> Measured:
    """Against all retrained models together."""
    others = torch.cat([_ratios(scene, other) for other in scene.references(name)])
    found = forget_quality(_ratios(scene, name), others)
    if found is None:
        return Measured(None, note="no truth ratios")
    return Measured(
        found.p_value, None, found.n[0], details={"distance": found.distance, "n": list(found.n)}
    )


def _read(scene: MultimodalScene, name: str) -> Measured:
    """Does the original's head still read the true answer off the model's last states?"""
    read = scene.said(name, scene.judged).read
    if read is None:
        return Measured(None, note="other width")
    hits = read.astype(np.float64)
    return Measured(float(hits.mean()), wilson(int(read.sum()), len(read)), len(read), hits)


def _membership(scene: MultimodalScene, name: str) -> Measured:
    """Forgotten training records against unseen pictures in the same wording, by the loss."""
    members, others = scene.parts["train_forget"].data, scene.parts["test_known_wording"].data
    own, other = label_matched(members.subjects, others.subjects, scene.settings.seed)
    if not len(own):
        return Measured(None, note="no unseen pictures")
    inside = -scene.said(name, "train_forget").loss.numpy()[own]
    outside = -scene.said(name, "test_known_wording").loss.numpy()[other]
    interval = bootstrap([inside, outside], rank_auc, scene.settings.seed, f"auc/{name}", 500)
    value = float(rank_auc(inside, outside))
    note = ""
    if name == scene.original and value < TESTABLE_AUC:
        note = "below 0.55: the original hardly remembers single records, so nothing is testable"
    return Measured(value, interval, len(own) + len(other), note=note)


# ---- one number for both aims -------------------------------------------------------------------


def _summaries(scene: MultimodalScene, rows: Rows, before: Model | None) -> None:
    forget = scene.seen("forget")
    if not (scene.has(forget) and scene.has("test_retain")):
        return
    first = rows.value("attack_success", scene.original, forget)

    def summary(name: str, start: float | None) -> Measured:
        row = rows.get("attack_success", name, forget)
        kept = rows.value("exact_answers", name, "test_retain")
        if row is None or row.value is None or kept is None or start is None:
            raise ValueError("a share that it is made of could not be measured")
        return Measured(h_mean(kept, start, row.value), n=row.n)

    earlier = len(scene.requests) > 1
    previous = _before(scene, before, forget) if earlier and before is not None else None
    for name in scene.names:
        if name == scene.original:
            continue
        rows.add("h_mean", name, forget, lambda n=name: summary(n, first))  # type: ignore[misc]
        if previous is not None:
            rows.add(
                "h_mean_previous",
                name,
                forget,
                lambda n=name: summary(n, previous),  # type: ignore[misc]
            )


def _before(scene: MultimodalScene, model: Model, split: str) -> float | None:
    """Attack success on a model that is no column of this audit."""
    part = scene.parts[split]
    said = scene.spoken(model, part.data)
    return judged(scene.judge, part.data.questions, said, part.targets).value


# ---- tables of the report -----------------------------------------------------------------------


def named_entities(scene: MultimodalScene) -> dict[str, list[float]]:
    """Whom the answers to forgotten pictures name: share per class; the rest names nobody."""
    names = [f" {normalised(entity)} " for entity in scene.entities]
    found = {}
    for model in scene.names:
        said = [f" {normalised(answer)} " for answer in scene.said(model, scene.judged).answers]
        shares_of = [float(np.mean([name in answer for answer in said])) for name in names]
        found[model] = [*shares_of, 0.0]  # the class of questions that reveal nobody
    return found


def class_answers(scene: MultimodalScene) -> dict[str, list[float | None]]:
    """Right answers per entity on unseen pictures, None for an entity without questions."""
    found: dict[str, list[float | None]] = {}
    for name in scene.names:
        values: list[float | None] = [None] * len(scene.class_names)
        for split in ("test_retain", "test_previous", "test_forget"):
            if scene.has(split):
                subjects = scene.parts[split].data.subjects
                right = np.array(shares(scene, name, split)["exact"].per_sample, dtype=np.float64)
                for index in np.unique(subjects).tolist():
                    values[index] = float(right[subjects == index].mean())
        found[name] = values
    return found
