"""What the pictures of generators are measured by: what they show, keep, spread over, and lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmforget.audit.drawing import empty_pictures, pixel_change
from mmforget.audit.intervals import bootstrap_mean, wilson
from mmforget.audit.rows import Measured, Rows

if TYPE_CHECKING:
    from mmforget.audit.generators import GANScene

ENOUGH = 20
"""Pictures of the original below which the rate of a value says nothing about what was kept."""

LISTED = 60
"""Values that get a row of their own each; of more, only those that were asked to stay."""

SATURATED = 1 / 255
DESTINATION = 0.05
"""Share of the former pictures of a concept that makes a value one of their destinations."""

PAIRS = 1000


def measure(scene: GANScene, rows: Rows) -> None:
    """All rows but those of attacks and cost."""
    from mmforget.audit.generators import OTHER_LATENTS, is_filter

    first = scene.original.entry.name
    features = _features(scene)
    # Every model is compared with the same pictures.
    before = cache(lambda: features(scene.of(first, scene.free(first))))
    real = cache(lambda: features(scene.real))
    for one in scene.models:
        name = one.entry.name
        _rates(scene, rows, name)
        _quality(scene, rows, name)
        if name != first:
            _sets(scene, rows, name, features, before)
        if scene.real is not None:
            rows.add("kid_to_real", name, "native", partial(_to_real, scene, features, real, name))
        aligned = one.entry.role in ("original", "unlearned") and not is_filter(one)
        if aligned:
            _same_latents(scene, rows, name, features)
        if name != OTHER_LATENTS and not is_filter(one):
            _edits(scene, rows, name)


def share(hits: Tensor, **details: Any) -> Measured:
    """A share of pictures, (n,) bool, with its interval."""
    count, n = int(hits.sum()), len(hits)
    if not n:
        return Measured(None, note="there are no such pictures", n=0, details=details)
    return Measured(
        count / n, wilson(count, n), n, per_sample=hits.double().numpy(), details=details
    )


# ---- what is drawn -------------------------------------------------------------------------------


def _rates(scene: GANScene, rows: Rows, name: str) -> None:
    """How often a model draws the concepts, and every other value of the judge's factors."""
    first, seen = scene.original.entry.name, scene.seen[name]
    for target, facts in scene.facts.items():
        hits = seen.shows(facts)
        rows.add("native_rate", name, f"native/{target}", partial(share, hits))
        before = float(scene.first.shows(facts).double().mean())
        if name != first and before > 0:
            gone = 1 - float(hits.double().mean()) / before
            rows.add("forgotten_share", name, f"native/{target}", partial(Measured, gone))
    ratios: dict[str, float] = {}
    free = scene.free(name)
    for factor, value in scene.kept:
        hits = seen.shows({factor: value})
        # What shows the concept as well has to become something else, in this too.
        base = scene.first.shows({factor: value}) & scene.free(first)
        details: dict[str, Any] = {"factor": factor}
        if name != first and int(base.sum()) >= ENOUGH:
            ratios[value] = float((hits & free).sum()) / float(base.sum())
            details["ratio_to_original"] = ratios[value]
        if value in _listed(scene):
            rows.add("kept_rate", name, f"kept/{value}", partial(share, hits, **details))
    if ratios:
        worst = min(ratios, key=lambda value: ratios[value])
        rows.add(
            "kept_worst", name, "kept",
            lambda: Measured(ratios[worst], note=worst, details={"ratios": ratios}),
        )  # fmt: skip


def _listed(scene: GANScene) -> set[str]:
    """Values with rows of their own: all, or those that were named if there are very many."""
    every = {value for _, value in scene.kept}
    named = {word for concept in scene.concepts for word in concept.preserve}
    return every if len(every) <= LISTED else every & named


def _quality(scene: GANScene, rows: Rows, name: str) -> None:
    pictures, limit = scene.of(name), scene.settings.unsure
    rows.add("unclear_pictures", name, "native", lambda: share(scene.seen[name].unsure(limit)))
    rows.add("empty_pictures", name, "native", lambda: empty_pictures(pictures))

    def saturated() -> Measured:
        found = ((pictures < SATURATED) | (pictures > 1 - SATURATED)).double().flatten(1).mean(1)
        return _mean(scene, found, "saturation")

    rows.add("saturation", name, "native", saturated)


def _mean(scene: GANScene, values: Tensor, purpose: str, **details: Any) -> Measured:
    if not len(values):
        return Measured(None, note="there are no such pictures", n=0)
    found = values.double().numpy()
    interval = bootstrap_mean(found, scene.settings.seed, purpose)
    return Measured(float(found.mean()), interval, len(found), per_sample=found, details=details)


# ---- as sets -------------------------------------------------------------------------------------


def _features(scene: GANScene) -> Any:
    """What turns pictures into vectors: the judge's network, else the guide, else thumbnails."""
    from mmforget.audit.memorization_pictures import THUMBNAIL, thumbnails
    from mmforget.metrics.distribution import FeatureNetwork
    from mmforget.metrics.judge import ClassifierJudge, ClipJudge

    if isinstance(scene.judge, ClassifierJudge):
        return FeatureNetwork(scene.judge.classifier, "judge")
    if isinstance(scene.judge, ClipJudge):
        return FeatureNetwork(scene.judge.model, "CLIP of the judge")
    return FeatureNetwork(thumbnails, f"pixels of {THUMBNAIL}x{THUMBNAIL} thumbnails")


def _sets(
    scene: GANScene, rows: Rows, name: str, features: Any, before: Callable[[], Tensor]
) -> None:
    """Pictures without the concepts against those of the original, as sets."""
    from mmforget.metrics.distribution import frechet_distance, kernel_distance

    first = scene.original.entry.name
    kept, own = scene.free(first), scene.free(name)

    @cache
    def both() -> tuple[Tensor, Tensor]:
        return before(), features(scene.of(name, own))

    def enough() -> bool:
        return min(int(kept.sum()), int(own.sum())) >= 2

    def frechet() -> Measured:
        if not enough():
            return Measured(None, note="fewer than two pictures without it")
        # The bias depends on the number of pictures: both sides take equally many.
        count = min(len(part) for part in both())
        parts = [part[:count] for part in both()]
        value = frechet_distance(
            parts[0].mean(0), parts[0].T.cov(), parts[1].mean(0), parts[1].T.cov()
        )
        return Measured(float(value), n=count, details={"features": features.name})

    def kernel() -> Measured:
        if not enough():
            return Measured(None, note="fewer than two pictures without it")
        value = kernel_distance(*both())
        return Measured(float(value), n=int(own.sum()), details={"features": features.name})

    rows.add("fid_to_original", name, "clear", frechet)
    rows.add("kid_to_original", name, "clear", kernel)
    if enough():
        _coverage(rows, name, both)
    for factor in scene.judge.factors:
        rows.add("mass_shift", name, f"clear/{factor}", partial(_shift, scene, name, factor))


def _coverage(rows: Rows, name: str, both: Callable[[], tuple[Tensor, Tensor]]) -> None:
    from mmforget.metrics.coverage import density_coverage, precision_recall

    for metrics, compute in (
        (("precision", "recall"), precision_recall),
        (("density", "coverage"), density_coverage),
    ):
        pair = cache(lambda c=compute: c(*both()))
        for place, metric in enumerate(metrics):
            rows.add(
                metric, name, "clear",
                lambda p=place, v=pair: Measured(  # type: ignore[misc]
                    float(v()[p]), n=len(both()[1])
                ),
            )  # fmt: skip


def _shift(scene: GANScene, name: str, factor: str) -> Measured:
    """Total variation of the histograms of a factor, over pictures without the concepts."""
    parts, size = [], len(scene.judge.factors[factor])
    for model in (scene.original.entry.name, name):
        mask = scene.free(model)
        if not mask.any():
            return Measured(None, note="no picture is without it")
        counts = scene.seen[model].of(factor)[mask].bincount(minlength=size).double()
        parts.append(counts / counts.sum())
    value = float((parts[0] - parts[1]).abs().sum()) / 2
    shown = {
        one: round(float(change), 4)
        for one, change in zip(scene.judge.factors[factor], parts[1] - parts[0], strict=True)
    }
    return Measured(value, n=int(scene.free(name).sum()), details={"changes": shown})


def _to_real(scene: GANScene, features: Any, real: Callable[[], Tensor], name: str) -> Measured:
    from mmforget.metrics.distribution import kernel_distance

    value = kernel_distance(real(), features(scene.of(name)))
    return Measured(float(value), n=len(scene.pictures[name]), details={"real": len(real())})


# ---- at the same latents -------------------------------------------------------------------------


def _same_latents(scene: GANScene, rows: Rows, name: str, features: Any) -> None:
    first = scene.original.entry.name
    for target, mask in scene.bearing.items():
        split = f"bearing/{target}"
        rows.add("spread", name, split, partial(_spread, scene, features, name, mask))
        if name == first:
            continue
        rows.add(
            "destinations", name, split,
            lambda t=target, m=mask: _destinations(scene, name, t, m),  # type: ignore[misc]
        )  # fmt: skip
        rows.add(
            "degree_native", name, split,
            lambda t=target, m=mask: _degree_native(scene, name, t, m),  # type: ignore[misc]
            target=1.0,
        )  # fmt: skip
    if name == first:
        return
    for factor in scene.judge.factors:
        same = (scene.first.of(factor) == scene.seen[name].of(factor))[scene.clear]
        rows.add("same_latent_keep", name, f"clear/{factor}", partial(share, same))
    change = pixel_change(scene.of(first, scene.clear), scene.of(name, scene.clear))
    rows.add("drift", name, "clear", lambda: _mean(scene, change, "drift"))


def _spread(scene: GANScene, features: Any, name: str, mask: Tensor) -> Measured:
    """Mean distance of the features of different pictures."""
    from mmforget.metrics.coverage import pairwise_diversity

    if int(mask.sum()) < 2:
        return Measured(None, note="fewer than two pictures")
    found = features(scene.of(name, mask))[:PAIRS]
    return Measured(float(pairwise_diversity(found)), n=len(found))


def _destinations(scene: GANScene, name: str, target: str, mask: Tensor) -> Measured:
    """How many values the latents of a concept show now, each in a share that counts."""
    facts = scene.facts[target]
    if not mask.any():
        return Measured(None, note="there are no such pictures")
    factor, value = next(iter(facts.items()))
    values = scene.judge.factors[factor]
    shares = scene.seen[name].of(factor)[mask].bincount(minlength=len(values)) / int(mask.sum())
    found = {one: round(float(s), 4) for one, s in zip(values, shares, strict=True)}
    known = [one for one, s in found.items() if s >= DESTINATION and one != value]
    return Measured(float(len(known)), n=int(mask.sum()), details={"shares": found})


def _degree_native(scene: GANScene, name: str, target: str, mask: Tensor) -> Measured:
    """Degree of unlearning at latents that showed the concept."""
    facts = scene.facts[target]
    before, after = scene.first.score(facts), scene.seen[name].score(facts)
    return _degree(before[mask], before[~mask], after[mask])


def _degree(edited: Tensor, natural: Tensor, after: Tensor) -> Measured:
    from mmforget.metrics.unlearning_degree import unlearning_degree

    if not min(len(edited), len(natural), len(after)):
        return Measured(None, note="there are no such pictures")
    found = unlearning_degree(edited, natural, after)
    details = {
        "distance_moved": found.moved,
        "distance_possible": found.possible,
        "mean_before": found.before,
        "mean_without": found.without,
        "mean_after": found.after,
        "share_before": float((edited > 0.5).double().mean()),
        "share_after": float((after > 0.5).double().mean()),
    }
    if found.value is None:
        return Measured(None, n=len(after), note=f"undefined: {found.reason}", details=details)
    return Measured(found.value, n=len(after), details=details)


# ---- under the original's edit -------------------------------------------------------------------


def _edits(scene: GANScene, rows: Rows, name: str) -> None:
    from mmforget.audit.generators import Seen

    first = scene.original.entry.name
    for target, facts in scene.facts.items():
        if (name, target) not in scene.edited:
            continue
        split = f"edited/{target}"
        seen = Seen(scene.judge, scene.edited[name, target], scene.settings.batch_size)
        hits = seen.shows(facts)
        rows.add(
            "elicited_rate", name, split,
            lambda h=hits, t=target: share(h, mapper=scene.mappers[t]),  # type: ignore[misc]
        )  # fmt: skip
        if name == first:
            continue

        def degree(target: str = target, facts: Any = facts, seen: Any = seen) -> Measured:
            before = Seen(scene.judge, scene.edited[first, target], scene.settings.batch_size)
            natural = scene.first.score(facts)[scene.edited_rows[target]]
            return _degree(before.score(facts), natural, seen.score(facts))

        rows.add("degree_edited", name, split, degree, target=1.0)
