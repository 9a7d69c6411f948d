"""What is left inside: similarity of features, neighbours, linear probe, relearning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.attacks.probe import ProbeResult, linear_probe
from mmforget.attacks.relearning import (
    Curve,
    Labelled,
    Mode,
    Relearning,
    curve_rows,
    draw_shots,
    normalised_area,
    relearn,
    worst_case,
)
from mmforget.audit.answers import proportion
from mmforget.audit.intervals import grouped_jackknife, normal, t_interval
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import Scene, draw
from mmforget.errors import DataError
from mmforget.metrics.representation import knn_predict, linear_cka, procrustes
from mmforget.seeds import generator

logger = logging.getLogger(__name__)

RELEARNED = 0.8
"""Share of the original's accuracy that counts as relearned."""


# ---- representation -----------------------------------------------------------------------------


def measure_representation(scene: Scene, rows: Rows) -> None:
    """Add similarity, k-NN and probe rows of every model."""
    for name in scene.names:
        for split in (scene.seen("forgotten"), "test_retain"):
            _similarity(scene, rows, name, split)
        if scene.by_class:
            _neighbours(scene, rows, name)
            _probe(scene, rows, name)


def _similarity(scene: Scene, rows: Rows, name: str, split: str) -> None:
    targets = {"original": [scene.original] if name != scene.original else []}
    targets["retrained"] = scene.references(name)
    order = torch.randperm(
        len(scene.ids[split]), generator=generator(scene.settings.seed, f"cka-order/{split}")
    )

    def features(model: str) -> Tensor:
        return scene.features(model, split)[order]

    def cka(others: list[str]) -> Measured:
        own = features(name)
        found = [linear_cka(own, features(o), scene.settings.cka_batch_size) for o in others]
        value = float(np.mean([pair[0] for pair in found]))
        error = float(np.mean([pair[1] for pair in found]))  # the same samples: errors add up
        return Measured(value, normal(value, error, "jackknife over samples"), len(own))

    def shape(others: list[str]) -> Measured:
        own, rest = features(name), [features(other) for other in others]
        if any(other.shape != own.shape for other in rest):
            return Measured(None, note="features of different size")

        def mean(mask: np.ndarray) -> float:
            chosen = torch.as_tensor(mask)
            return float(np.mean([procrustes(own[chosen], other[chosen]) for other in rest]))

        interval = grouped_jackknife(mean, len(own), groups=5)
        return Measured(mean(np.ones(len(own), dtype=bool)), interval, len(own))

    for target, others in targets.items():
        if others:
            rows.add(f"cka_to_{target}", name, split, lambda o=others: cka(o))  # type: ignore[misc]
            rows.add(
                f"procrustes_to_{target}",
                name,
                split,
                lambda o=others: shape(o),  # type: ignore[misc]
            )


def _neighbours(scene: Scene, rows: Rows, name: str) -> None:
    @cache
    def predicted() -> tuple[np.ndarray, Tensor]:
        test = scene.outputs(name, "test")
        gallery, query = test.of(scene.attack_ids), test.of(scene.eval_ids)
        scene.features(name, "test")  # says what is missing
        assert gallery.features is not None and query.features is not None
        found = knn_predict(
            gallery.features,
            gallery.label,
            query.features,
            test.logits.shape[1],
            scene.settings.neighbours,
        )
        return (found == query.label).numpy(), query.label

    def part(forgotten: bool) -> Measured:
        hits, label = predicted()
        return proportion(hits[np.isin(label.numpy(), scene.forgotten_classes) == forgotten])

    rows.add("knn_accuracy", name, "test_forgotten", lambda: part(True))
    rows.add("knn_accuracy", name, "test_retain", lambda: part(False), direction="higher")


def _probe(scene: Scene, rows: Rows, name: str) -> None:
    @cache
    def fitted() -> tuple[ProbeResult, Tensor]:
        scene.features(name, "test")  # says what is missing
        test, val = scene.outputs(name, "test"), scene.outputs(name, "val")
        train, evaluation = test.of(scene.attack_ids), test.of(scene.eval_ids)
        assert train.features is not None and evaluation.features is not None
        assert val.features is not None
        found = linear_probe(
            (train.features, train.label), (val.features, val.label), evaluation.features
        )
        return found, evaluation.label

    def part(mask: np.ndarray | None) -> Measured:
        found, label = fitted()
        hits = found.predicted == label.numpy()
        note = "" if found.converged else "the fit did not converge"
        result = proportion(hits if mask is None else hits[mask])
        return Measured(
            result.value,
            result.interval,
            result.n,
            result.per_sample,
            note=note,
            details={"inverse_strength": found.strength},
        )

    label = scene.outputs(name, "test").of(scene.eval_ids).label.numpy()
    gone = np.isin(label, scene.forgotten_classes)
    rows.add("probe_recall", name, "test_forgotten", lambda: part(gone))
    rows.add("probe_accuracy", name, "test", lambda: part(None))


# ---- relearning ---------------------------------------------------------------------------------


def measure_relearning(scene: Scene, rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Attack every model and add the rows.

    Returns:
        Curves for `Results.curves`: ``relearning`` of the mode ``full``, ``relearning_head`` of the
        mode ``head``.
    """
    settings, seed = scene.settings.relearning, scene.settings.seed
    shots, used = _shots(scene)
    split = scene.seen("forgotten")
    forgotten = _some(scene, split, settings.evaluation_images, used)
    retained = _some(scene, "test_retain", settings.evaluation_images, used)

    found: dict[str, list[Curve]] = {}
    problems: dict[str, Exception] = {}
    for audited in scene.distinct:
        name = audited.entry.name
        logger.info("relearning attack on %s", name)
        try:
            found[name] = relearn(audited.model, shots, forgotten, retained, settings, seed)
        except Exception as problem:  # becomes the error of every relearning row of this model
            problems[name] = problem

    @cache
    def outcome(name: str, mode: Mode) -> Relearning:
        own, first = scene.twin[name], scene.twin[scene.original]
        for needed in (own, first):
            if needed in problems:
                raise problems[needed]
        return worst_case(found[own], mode, RELEARNED * found[first][0].accuracy[0])

    for mode in settings.modes:
        for name in scene.names:
            _relearning_rows(scene, rows, name, mode, outcome, len(forgotten.label), split)
    keys: tuple[tuple[Mode, str], ...] = (("full", "relearning"), ("head", "relearning_head"))
    return {
        key: [
            row
            for name in scene.names
            for row in curve_rows(found.get(scene.twin[name], []), name, mode)
        ]
        for mode, key in keys
        if mode in settings.modes
    }


def _shots(scene: Scene) -> tuple[list[Labelled], np.ndarray]:
    """What the attacker has, one draw per seed, and all ids among it."""
    settings = scene.settings.relearning
    train = scene.data.dataset("train")
    train = train.subset(np.argsort(train.ids))
    gone = np.isin(train.ids, scene.all_forgotten)
    assert train.labels is not None  # checked when the outputs were collected
    shots, used = [], []
    for number in range(settings.seeds):
        drawn = draw_shots(train.labels, gone, settings.shots, scene.settings.seed, number)
        shots.append(Labelled.of(train[drawn.tolist()]))
        used.append(train.ids[drawn])
    return shots, np.concatenate(used)


def _some(scene: Scene, split: str, count: int, used: np.ndarray) -> Labelled:
    """At most `count` images of a split, none of them among those that the attacker has."""
    data = scene.dataset("test" if split.startswith("test") else "train")
    rest = np.setdiff1d(scene.ids[split], used)
    positions = np.flatnonzero(np.isin(data.ids, rest))
    if not len(positions):
        raise DataError(
            "`relearning.shots` leaves no forgotten sample on which the attack could be "
            "evaluated; give fewer shots"
        )
    chosen = draw(len(positions), count, scene.settings.seed, f"relearning-evaluation/{split}")
    return Labelled.of(data[positions[chosen].tolist()])


def _relearning_rows(
    scene: Scene,
    rows: Rows,
    name: str,
    mode: Mode,
    outcome: Callable[[str, Mode], Relearning],
    n: int,
    split: str,
) -> None:
    settings = scene.settings.relearning

    def steps() -> Measured:
        value = outcome(name, mode).steps
        return Measured(
            value,
            n=n,
            note=f"> {settings.steps}" if value is None else "",
            details={"resolution": settings.evaluate_every, "seeds": settings.seeds},
            censored=value is None,
        )

    def area() -> Measured:
        result, first = outcome(name, mode), outcome(scene.original, mode)
        anchors = [audited.entry.name for audited in scene.by_role("random_init")]
        if not anchors:
            return Measured(None, note="no randomly initialised model as anchor")
        low = float(np.mean([outcome(anchor, mode).area for anchor in anchors]))
        values = [normalised_area(found, first.area, low) for found in result.areas]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return Measured(None, note="original and random initialisation relearn equally fast")
        interval = t_interval(known) if len(known) > 2 else None
        return Measured(
            float(np.mean(known)),
            interval,
            n,
            note="" if interval else "one attack seed: no interval",
            details={"learning_rate": result.best_rate, "area": result.area},
        )

    def retained() -> Measured:
        return Measured(outcome(name, mode).retain_accuracy, n=settings.evaluation_images)

    rows.add(f"relearn_steps_{mode}", name, split, steps)
    rows.add(f"relearn_area_{mode}", name, split, area)
    rows.add(f"relearn_retain_{mode}", name, "test_retain", retained)
