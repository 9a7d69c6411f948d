"""How the pictures themselves changed: scores, distances, and whether they show anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmforget.audit.drawing import PIXELS, clip_scores, empty_pictures, floats, pixel_change
from mmforget.audit.intervals import bootstrap_mean
from mmforget.audit.rows import Measured, Rows

if TYPE_CHECKING:
    from mmforget.audit.concepts import ConceptScene


def measure_distances(scene: ConceptScene, rows: Rows) -> None:
    """CLIP score, kernel distance and paired change per group, and empty pictures per cell."""
    first = scene.original.entry.name
    everything = _groups(scene)
    groups = {role: everything[role] for role in ("target", "preserved") if role in everything}
    distance, how = _paired(scene)
    features = _features(scene)
    for one in scene.models:
        name = one.entry.name
        for role, places in groups.items():
            if scene.clip is not None:
                rows.add(
                    "clip_score", name, role,
                    lambda p=places, n=name: _clip(scene, n, p),  # type: ignore[misc]
                    direction="lower" if role == "target" else "higher",
                )  # fmt: skip
            if name == first:
                continue
            rows.add(
                "paired_change", name, role,
                lambda p=places, n=name: _change(scene, distance, how, n, p),  # type: ignore[misc]
                direction="higher" if role == "target" else "lower",
            )  # fmt: skip
            if features is not None:
                rows.add(
                    "kid_to_original", name, role,
                    lambda p=places, n=name: _kernel(scene, features, n, p),  # type: ignore[misc]
                    direction="none" if role == "target" else "lower",
                )  # fmt: skip
        for group, places in everything.items():
            rows.add(
                "empty_pictures", name, group,
                lambda n=name, p=places: empty_pictures(_at(scene, n, p)),  # type: ignore[misc]
            )  # fmt: skip


def _groups(scene: ConceptScene) -> dict[str, list[int]]:
    """Places of the pictures with what was erased, with what must stay, and without a prompt."""
    found: dict[str, list[int]] = {}
    for cell in scene.cells:
        role = "target" if cell.role in ("synonym", "together") else cell.role
        place = scene.places[cell.split]
        found.setdefault(role, []).extend(range(place.start, place.stop))
    return found


def _at(scene: ConceptScene, model: str, places: list[int]) -> Tensor:
    return floats(scene.pictures[model][places])


def _clip(scene: ConceptScene, model: str, places: list[int]) -> Measured:
    prompts = [scene.rows[place][0] for place in places]
    return clip_scores(scene.clip, _at(scene, model, places), prompts, scene.settings.seed)


def _change(
    scene: ConceptScene, distance: Any, how: str, model: str, places: list[int]
) -> Measured:
    first = scene.original.entry.name
    values = distance(_at(scene, first, places), _at(scene, model, places)).cpu().numpy()
    interval = bootstrap_mean(values, scene.settings.seed, "paired_change")
    return Measured(
        float(values.mean()), interval, len(values), per_sample=values, details={"distance": how}
    )


def _kernel(scene: ConceptScene, features: Any, model: str, places: list[int]) -> Measured:
    from mmforget.metrics.distribution import kernel_distance

    if len(places) < 2:
        return Measured(None, note="needs at least two pictures")
    # The estimate is unbiased for independent samples only, which pictures of the same seeds are
    # not: they would make it negative for every edit that changes little.
    other = next((name for name in scene.pictures if name.startswith("identity")), None)
    if other is None:
        return Measured(None, note="needs the control with other seeds (`identity`)")
    if model == other:
        other = scene.original.entry.name
    value = kernel_distance(
        features(_at(scene, other, places)), features(_at(scene, model, places))
    )
    details = {
        "features": features.name,
        "features_hash": features.hash or "unknown",
        "reference": "the original's pictures of other seeds",
    }
    return Measured(float(value), n=len(places), details=details)


def _features(scene: ConceptScene) -> Any:
    """What turns pictures into vectors: the CLIP model, else the judge's network."""
    from mmforget.metrics.distribution import FeatureNetwork
    from mmforget.metrics.judge import ClassifierJudge

    if scene.clip is not None:
        return FeatureNetwork(scene.clip, "CLIP")
    if isinstance(scene.judge, ClassifierJudge):
        return FeatureNetwork(scene.judge.classifier, "judge")
    return None


def _paired(scene: ConceptScene) -> tuple[Any, str]:
    """The distance of two pictures: by layers of a judge like the shipped one, else by pixels."""
    from mmforget.metrics.judge import ClassifierJudge
    from mmforget.metrics.perceptual import JUDGE_STAGES, LayerDistance

    if isinstance(scene.judge, ClassifierJudge):
        known = dict(scene.judge.classifier.named_modules())
        if all(stage in known for stage in JUDGE_STAGES):
            return LayerDistance(
                scene.judge.classifier, JUDGE_STAGES, "judge"
            ), "layers of the judge"
    return pixel_change, PIXELS
