"""Utility and forgetting as seen in the answers of the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from mmforget.audit.intervals import bootstrap, bootstrap_mean, grouped_jackknife, normal, wilson
from mmforget.audit.outputs import Outputs, collect
from mmforget.audit.results import Direction, Family
from mmforget.audit.rows import Measured, Rows
from mmforget.audit.scene import AuditedModel, Scene
from mmforget.metrics.membership import rank_auc, scaled_confidence
from mmforget.metrics.output import (
    activation_distance,
    agreement,
    class_accuracy,
    js_divergence,
    kl_divergence,
    probabilities,
    zrf,
)
from mmforget.metrics.summary import adaptive_unlearning_score, average_gap, h_mean, tug_of_war
from mmforget.models.base import HasLogits, Model
from mmforget.seeds import derive

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js_to_retrained": js_divergence,
    "kl_to_retrained": kl_divergence,
    "activation_distance": activation_distance,
    "agreement": agreement,
}


def proportion(hits: np.ndarray) -> Measured:
    """Share of hits (n,) with its Wilson interval."""
    return Measured(
        float(hits.mean()), wilson(int(hits.sum()), len(hits)), len(hits), hits.astype(float)
    )


def measure_answers(scene: Scene, rows: Rows, before: Model | None) -> None:
    """Add all rows that are functions of logits and labels.

    Args:
        scene: evaluated.
        rows: where to.
        before: the model before the last request, if there was an earlier one.
    """
    for name in scene.names:
        _accuracies(scene, rows, name)
        _utility(scene, rows, name)
        for split in (scene.seen("forgotten"), "test_retain"):
            _distances(scene, rows, name, split)
        _summaries(scene, rows, name)
    _previous(scene, rows, before)
    _zero_retrain(scene, rows)


def _hits(scene: Scene, model: str, split: str) -> np.ndarray:
    return scene.outputs(model, split).correct.numpy()


def _accuracies(scene: Scene, rows: Rows, name: str) -> None:
    splits = [split for split in scene.ids if "forgotten" not in split and scene.has(split)]
    for split in splits:
        family: Family = "utility"
        direction: Direction = "higher"
        target = None
        if split.endswith(("_forget", "_previous")):
            family, direction = "forgetting", "closer_to_retrained"
            if scene.goal == "concept_removal":
                direction, target = "closer_to_value", 0.0
        rows.add(
            "accuracy",
            name,
            split,
            lambda split=split: proportion(_hits(scene, name, split)),  # type: ignore[misc]
            direction=direction,
            target=target,
            family=family,
        )


def _utility(scene: Scene, rows: Rows, name: str) -> None:
    seed, replicates = scene.settings.seed, scene.settings.replicates

    def drop() -> Measured:
        lost = _hits(scene, scene.original, "test_retain").astype(float)
        lost -= _hits(scene, name, "test_retain")
        error = float(lost.std(ddof=1)) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
        value = float(lost.mean())
        return Measured(value, normal(value, error, "normal, paired"), len(lost), lost)

    def worst() -> Measured:
        own, first = (
            class_accuracy(found.logits, found.label)
            for found in (scene.outputs(m, "test_retain") for m in (name, scene.original))
        )
        lost = (first - own).nan_to_num(-torch.inf)
        index = int(lost.argmax())
        outputs = scene.outputs(name, "test_retain")
        mask = (outputs.label == index).numpy()
        paired = (_hits(scene, scene.original, "test_retain")[mask]).astype(float)
        paired -= _hits(scene, name, "test_retain")[mask]
        return Measured(
            float(lost[index]),
            bootstrap_mean(paired, seed, f"worst/{name}", replicates),
            int(mask.sum()),
            note="interval of the class that was worst, not of the maximum",
            details={"class": scene.class_names[index]},
        )

    def calibration() -> Measured:
        outputs = scene.outputs(name, "test_retain")
        shares = probabilities(outputs.logits)

        def error(mask: np.ndarray) -> float:
            chosen = torch.as_tensor(mask)
            return float(
                multiclass_calibration_error(
                    shares[chosen], outputs.label[chosen], outputs.logits.shape[1], n_bins=15
                )
            )

        everything = np.ones(len(outputs), dtype=bool)
        return Measured(error(everything), grouped_jackknife(error, len(outputs)), len(outputs))

    rows.add("retain_drop", name, "test_retain", drop)
    rows.add("worst_class_drop", name, "test_retain", worst)
    rows.add("calibration_error", name, "test_retain", calibration)
    for split in (scene.seen("forgotten"), "test_retain"):

        def loss(split: str = split) -> Measured:
            outputs = scene.outputs(name, split)
            values = F.cross_entropy(outputs.logits.double(), outputs.label, reduction="none")
            return _mean(values.numpy(), scene, f"loss/{name}/{split}")

        rows.add("loss", name, split, loss)


def _mean(values: np.ndarray, scene: Scene, purpose: str) -> Measured:
    interval = bootstrap_mean(values, scene.settings.seed, purpose, scene.settings.replicates)
    return Measured(float(values.mean()), interval, len(values), values)


def _distances(scene: Scene, rows: Rows, name: str, split: str) -> None:
    others = scene.references(name)
    if not others:
        return
    for metric, function in DISTANCES.items():

        def distance(
            function: Callable[[Tensor, Tensor], Tensor] = function, metric: str = metric
        ) -> Measured:
            own = scene.outputs(name, split).logits
            values = [function(own, scene.outputs(o, split).logits).numpy() for o in others]
            return _mean(np.mean(values, axis=0), scene, f"{metric}/{name}/{split}")

        rows.add(metric, name, split, distance)


def _summaries(scene: Scene, rows: Rows, name: str) -> None:
    if name == scene.original or name in scene.retrained:
        return
    seed, replicates = scene.settings.seed, scene.settings.replicates
    forget = scene.seen("forget")

    def gained(first: Outputs) -> Measured:
        return _h_mean(scene, name, first, forget)

    def aus() -> Measured:
        retained = _hits(scene, name, "test_retain").astype(float)
        lost = _hits(scene, scene.original, "test_retain") - retained
        answered = _hits(scene, name, forget).astype(float)

        def score(lost: np.ndarray, answered: np.ndarray) -> np.ndarray:
            return (1 - lost.mean(-1)) / (1 + answered.mean(-1))

        value = adaptive_unlearning_score(float(lost.mean()), 0.0, float(answered.mean()))
        interval = bootstrap([lost, answered], score, seed, f"aus/{name}", replicates)
        return Measured(value, interval, len(answered))

    rows.add("h_mean", name, forget, lambda: gained(scene.outputs(scene.original, forget)))
    if scene.by_class:  # for random samples the formula has another second term
        rows.add("adaptive_unlearning_score", name, forget, aus)
    if not scene.retrained:
        return
    splits = list(dict.fromkeys((forget, "train_retain", "test_retain")))

    def gaps(split: str) -> np.ndarray:
        rest = np.mean([_hits(scene, other, split) for other in scene.retrained], axis=0)
        return _hits(scene, name, split) - rest

    def tug() -> Measured:
        own = [float(_hits(scene, name, split).mean()) for split in splits]
        rest = [
            float(np.mean([_hits(scene, other, split).mean() for other in scene.retrained]))
            for split in splits
        ]

        def product(*drawn: np.ndarray) -> np.ndarray:
            return np.prod([1 - np.abs(values.mean(-1)) for values in drawn], axis=0)

        found = [gaps(split) for split in splits]
        interval = bootstrap(found, product, seed, f"tow/{name}", replicates)
        return Measured(
            tug_of_war(own, rest), interval, len(found[0]), details={"components": splits}
        )

    def gap() -> Measured:
        own = [float(_hits(scene, name, split).mean()) for split in splits]
        rest = [
            float(np.mean([_hits(scene, other, split).mean() for other in scene.retrained]))
            for split in splits
        ]
        attack = _raw_membership(scene, name)
        attack_rest = float(np.mean([_raw_membership(scene, o) for o in scene.retrained]))

        def mean(*drawn: np.ndarray) -> np.ndarray:
            shares = [np.abs(values.mean(-1)) for values in drawn]
            return (np.sum(shares, axis=0) + abs(attack - attack_rest)) / (len(drawn) + 1)

        found = [gaps(split) for split in splits]
        return Measured(
            average_gap([*own, attack], [*rest, attack_rest]),
            bootstrap(found, mean, seed, f"gap/{name}", replicates),
            len(found[0]),
            details={"components": [*splits, "membership_auc"]},
        )

    rows.add("tug_of_war", name, forget, tug)
    rows.add("average_gap", name, forget, gap)


def _raw_membership(scene: Scene, name: str) -> float:
    """Membership AUC without matching and interval, as one of the components of `average_gap`."""
    member = scene.outputs(name, "train_forgotten")
    other = scene.outputs(name, scene.seen("forgotten") if scene.by_class else "test_retain")
    scores = [scaled_confidence(found.logits, found.label).numpy() for found in (member, other)]
    return float(rank_auc(*scores))


def _h_mean(scene: Scene, name: str, first: Outputs, forget: str) -> Measured:
    drop = first.correct.numpy().astype(float) - _hits(scene, name, forget)
    retained = _hits(scene, name, "test_retain").astype(float)

    def score(drop: np.ndarray, retained: np.ndarray) -> np.ndarray:
        d, r = drop.mean(-1), retained.mean(-1)
        total = np.where((d > 0) & (r + d > 0), r + d, 1.0)
        return np.where(d > 0, 2 * r * d / total, 0.0)

    settings = scene.settings
    return Measured(
        h_mean(
            float(retained.mean()),
            float(first.correct.double().mean()),
            float(_hits(scene, name, forget).mean()),
        ),
        bootstrap([drop, retained], score, settings.seed, f"h_mean/{name}", settings.replicates),
        len(drop),
        details={"before": float(first.correct.double().mean())},
    )


def _previous(scene: Scene, rows: Rows, before: Model | None) -> None:
    """H-mean against the model before the last request, where that is not the original."""
    if before is None or len(scene.requests) < 2:
        return
    forget = scene.seen("forget")
    stage = "test" if forget.startswith("test") else "train"
    data = scene.dataset(stage)  # type: ignore[arg-type]
    part = data.subset(np.flatnonzero(np.isin(data.ids, scene.ids[forget])))
    first = collect(before, part, scene.settings.batch_size)
    for audited in scene.by_role("unlearned"):
        name = audited.entry.name
        rows.add(
            "h_mean_previous",
            name,
            forget,
            lambda name=name: _h_mean(scene, name, first, forget),  # type: ignore[misc]
        )


def random_models(original: AuditedModel, count: int, seed: int) -> Sequence[Model]:
    """Networks of the same architecture with fresh weights.

    Raises:
        ModelError: the network was given as an object, so nobody knows how it is built.
    """
    device = original.model.device
    return [
        original.model.fresh(derive(seed, "random-init", number)).to(device)
        for number in range(count)
    ]


def _zero_retrain(scene: Scene, rows: Rows) -> None:
    split = scene.seen("forgotten")
    data = scene.dataset("test" if split.startswith("test") else "train")
    part = data.subset(np.flatnonzero(np.isin(data.ids, scene.ids[split])))
    found: list[Tensor] = []
    problem: Exception | None = None
    try:
        models = random_models(
            scene.by_role("original")[0], scene.settings.random_inits, scene.settings.seed
        )
        for model in models:
            assert isinstance(model, HasLogits)
            found.append(collect(model, part, scene.settings.batch_size).logits)
    except Exception as error:  # becomes the error of every row below
        problem = error

    def measure(name: str) -> Measured:
        if problem is not None:
            raise problem
        own = scene.outputs(name, split).logits
        values = np.mean([zrf(own, other).numpy() for other in found], axis=0)
        return _mean(values, scene, f"zrf/{name}")

    for name in scene.names:
        rows.add("zrf", name, split, lambda name=name: measure(name))  # type: ignore[misc]
