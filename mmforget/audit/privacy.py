"""Membership inference, level 1: is it visible in the outputs that the data was used?"""

from __future__ import annotations

import numpy as np

from mmforget.attacks.membership import (
    MIN_OTHERS,
    TESTABLE_AUC,
    label_matched,
    transfer,
    true_positives,
)
from mmforget.audit.intervals import bootstrap, bootstrap_mean, clopper_pearson
from mmforget.audit.outputs import Outputs
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import Scene
from mmforget.metrics.membership import SCORES, rank_auc, scaled_confidence

RATES = {"membership_tpr_at_1_percent": 0.01, "membership_tpr_at_0.1_percent": 0.001}


def measure_privacy(scene: Scene, rows: Rows) -> None:
    """Add the rows of the population attacks, and whether they can tell anything at all."""
    for name in scene.names:
        rows.add(
            "membership_auc",
            name,
            "train_forgotten",
            lambda name=name: _auc(scene, name),  # type: ignore[misc]
        )
        rows.add(
            "membership_transfer",
            name,
            "train_forgotten",
            lambda name=name: _transfer(scene, name),  # type: ignore[misc]
        )
        members, others = _matched(scene, name)
        if len(others) >= MIN_OTHERS:
            for metric, rate in RATES.items():

                def found(
                    rate: float = rate, m: Outputs = members, o: Outputs = others
                ) -> Measured:
                    hits = true_positives(_scores(m), _scores(o), rate)
                    return Measured(hits / len(m), clopper_pearson(hits, len(m)), len(m))

                rows.add(metric, name, "train_forgotten", found)
    rows.add("membership_validity", scene.original, "train_retain", lambda: _validity(scene))


def testable(rows: Rows, original: str) -> bool | None:
    """Whether the original model memorises enough for the attack to see; None if not known."""
    value = rows.value("membership_validity", original, "train_retain")
    return None if value is None else value >= TESTABLE_AUC


def _scores(outputs: Outputs) -> np.ndarray:
    return scaled_confidence(outputs.logits, outputs.label).numpy()


def _matched(scene: Scene, name: str) -> tuple[Outputs, Outputs]:
    """Forget set and test images, equally many of every label."""
    members, others = scene.outputs(name, "train_forgotten"), scene.outputs(name, "test")
    own, other = label_matched(members.label.numpy(), others.label.numpy(), scene.settings.seed)
    return _at(members, own), _at(others, other)


def _at(outputs: Outputs, positions: np.ndarray) -> Outputs:
    mask = np.zeros(len(outputs), dtype=bool)
    mask[positions] = True
    return outputs.select(mask)


def _auc(scene: Scene, name: str) -> Measured:
    members, others = _matched(scene, name)
    if not len(others):
        return Measured(None, note="no test image has a label of the forget set")
    own, other = _scores(members), _scores(others)
    settings = scene.settings
    interval = bootstrap(
        [own, other], rank_auc, settings.seed, f"auc/{name}", min(settings.replicates, 500)
    )
    by_score = {
        score: float(
            rank_auc(
                function(members.logits, members.label).numpy(),
                function(others.logits, others.label).numpy(),
            )
        )
        for score, function in SCORES.items()
    }
    return Measured(
        float(rank_auc(own, other)),
        interval,
        len(members) + len(others),
        details={"auc_by_score": by_score},
    )


def _transfer(scene: Scene, name: str) -> Measured:
    retained, test = scene.outputs(name, "train_retain"), scene.outputs(name, "test")
    forget = scene.outputs(name, "train_forgotten")
    known, unseen = test.of(scene.attack_ids), test.of(scene.eval_ids)
    if scene.by_class:
        # labels match on both sides: retained classes in the fit, forgotten ones in the score
        gone = np.array(scene.forgotten_classes)
        known = known.select(~np.isin(known.label.numpy(), gone))
        unseen = unseen.select(np.isin(unseen.label.numpy(), gone))
    if np.intersect1d(known.id.numpy(), unseen.id.numpy()).size:
        raise ValueError("the attack was fitted on samples that it is scored on")
    found = transfer(_scores(retained), _scores(known), _scores(forget), _scores(unseen))
    settings = scene.settings
    return Measured(
        float(found.forget.mean()),
        bootstrap_mean(found.forget, settings.seed, f"transfer/{name}", settings.replicates),
        len(found.forget),
        found.forget,
        details={"same_on_unseen": float(found.others.mean())},
    )


def _validity(scene: Scene) -> Measured:
    retained = scene.outputs(scene.original, "train_retain")
    unseen = scene.outputs(scene.original, "test").of(scene.eval_ids)
    if scene.by_class:
        unseen = unseen.select(~np.isin(unseen.label.numpy(), scene.forgotten_classes))
    own, other = _scores(retained), _scores(unseen)
    value = float(rank_auc(own, other))
    note = "" if value >= TESTABLE_AUC else "below 0.55: privacy is not testable on this model"
    interval = bootstrap([own, other], rank_auc, scene.settings.seed, "validity", 200)
    return Measured(value, interval, len(own) + len(other), note=note)
