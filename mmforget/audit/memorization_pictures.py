"""What the pictures say: copies, specificity, detection, and what happened to everything else."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmforget.audit.drawing import IDENTITY, clip_scores, drawer, empty_pictures
from mmforget.audit.intervals import Interval, bootstrap_mean, normal, wilson
from mmforget.audit.rows import Measured, Rows
from mmforget.models.base import frozen
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.seeds import derive, generator

if TYPE_CHECKING:
    from mmforget.audit.memorization import MemorizationScene, Part
    from mmforget.detection.report import DetectionReport

THUMBNAIL = 16
"""Side of the reduced pictures on which the kernel distance without CLIP model is measured."""


def measure(scene: MemorizationScene, rows: Rows) -> None:
    """All rows but those of attacks and cost."""
    for one in scene.models:
        name = one.entry.name
        for part in scene.parts:
            _copies(scene, rows, part, name)
        _rest(scene, rows, name)
    for one in scene.models:
        if one.entry.role in ("unlearned", "control"):
            _changes(scene, rows, one.entry.name)
    _losses(scene, rows)
    if scene.settings.detection:
        _detection(scene, rows)


# ---- copies --------------------------------------------------------------------------------------


def _copies(scene: MemorizationScene, rows: Rows, part: Part, name: str) -> None:
    from mmforget.metrics.copying import ReplicationRate

    found: dict[str, Any] = {}

    def replicated() -> Measured:
        values = scene.likeness(name, part)
        metric, count = ReplicationRate(), values.shape[1]
        limits = scene.thresholds[part.split]
        metric.update(
            values.flatten(),
            limits.repeat_interleave(count),
            torch.arange(len(values)).repeat_interleave(count),
        )
        found.update(metric.compute())
        shares, prompts = found["shares"], part.memorized.texts
        hits, n = int((shares > 0).sum()), len(shares)
        per_prompt = {
            prompts[row]: {
                "best": round(float(best), 4),
                "median": round(float(middle), 4),
                "share": round(float(share), 4),
                "threshold": round(float(limits[row]), 4),
            }
            for row, best, middle, share in zip(
                found["ids"].tolist(), found["best"], found["medians"], shares, strict=True
            )
        }
        return Measured(
            hits / n, wilson(hits, n), n, per_sample=(shares > 0).double().numpy(),
            details={"per_prompt": per_prompt, "left_out": int(found["left_out"])},
        )  # fmt: skip

    def pictures() -> Measured:
        shares = found["shares"].numpy()
        interval = bootstrap_mean(shares, scene.settings.seed, "replicated_pictures")
        return Measured(float(shares.mean()), interval, int(found["pictures"]), per_sample=shares)

    def typical() -> Measured:
        middles = found["medians"].numpy()
        facts: dict[str, Any] = {
            "median_absolute_deviation": float(found["mad"]),
            "mean": float(found["mean"]),
            "best_median": float(found["best"].median()),
        }
        interval = bootstrap_mean(middles, scene.settings.seed, "copy_similarity")
        facts |= {"mean_interval": [interval.low, interval.high]}
        return Measured(float(found["median"]), n=len(middles), details=facts)

    rows.add("replication_rate", name, part.split, replicated)
    rows.add("replicated_pictures", name, part.split, pictures)
    rows.add("copy_similarity", name, part.split, typical)
    if scene.settings.pictures > 1:
        rows.add("seed_similarity", name, part.split, lambda: _diversity(scene, name, part))
    rows.add("empty_pictures", name, part.split, lambda: empty_pictures(scene.of(name, part.split)))


def _diversity(scene: MemorizationScene, name: str, part: Part) -> Measured:
    """Median over prompts of how alike the pictures of one prompt are, pair by pair."""
    count = scene.settings.pictures
    upper = torch.ones(count, count, dtype=torch.bool).triu(1)
    values = torch.stack(
        [
            scene.similarity.matrix(own, own)[upper].median()
            for own in scene.of(name, part.split).split(count)
        ]
    )
    return Measured(float(values.median()), n=len(values))


# ---- changes against the original ---------------------------------------------------------------


def _changes(scene: MemorizationScene, rows: Rows, name: str) -> None:
    first = scene.original.entry.name
    for part in scene.parts:
        rows.add("copy_drop", name, part.split, partial(_drop, scene, first, name, part))
    if name == IDENTITY:
        return
    for split in (*(part.split for part in scene.parts), "ordinary"):
        rows.add(
            "similarity_to_original",
            name,
            split,
            partial(_to_original, scene, first, name, split),
            direction="higher" if split == "ordinary" else None,
        )
    for part in scene.parts:
        if part.group == "located":
            rows.add("specificity", name, part.split, partial(_specificity, rows, name, part))


def _drop(scene: MemorizationScene, first: str, name: str, part: Part) -> Measured:
    """Likeness to the training picture that was lost, paired by prompt and seed."""
    lost = (scene.likeness(first, part) - scene.likeness(name, part)).double().mean(1)
    return _mean(lost[~lost.isnan()], "normal, paired by prompt and seed")


def _mean(values: Tensor, how: str) -> Measured:
    n = len(values)
    error = float(values.std()) / n**0.5 if n > 1 else 0.0
    mean = float(values.mean())
    return Measured(mean, normal(mean, error, how), n, per_sample=values.numpy())


def _to_original(scene: MemorizationScene, first: str, name: str, split: str) -> Measured:
    values = scene.similarity(scene.of(name, split), scene.of(first, split)).double()
    return _mean(values, "normal")


def _specificity(rows: Rows, name: str, part: Part) -> Measured:
    """What the memorized prompts lost beyond what every other prompt lost.

    A copy is lost against the training picture; an ordinary picture against the one that the
    original draws from the same noise, to which it has the similarity 1.
    """
    own = rows.per_sample[("copy_drop", name, part.split)]
    others = 1 - rows.per_sample[("similarity_to_original", name, "ordinary")]
    value = float(own.mean() - others.mean())
    variance = sum(
        float(values.var(ddof=1)) / len(values) for values in (own, others) if len(values) > 1
    )
    interval = normal(value, variance**0.5, "normal, two samples")
    details = {"own_drop": float(own.mean()), "others_drop": float(others.mean())}
    return Measured(value, interval, len(own), details=details)


def paired_difference(rows: Rows, metric: str, split: str, one: str, other: str) -> Interval | None:
    """The mean difference of two models over the same prompts; None if it is not known."""
    mine, theirs = (rows.per_sample.get((metric, name, split)) for name in (one, other))
    if mine is None or theirs is None:
        return None
    difference = mine - theirs
    n = len(difference)
    error = float(difference.std(ddof=1)) / n**0.5 if n > 1 else 0.0
    return normal(float(difference.mean()), error, "normal, paired by prompt")


# ---- ordinary pictures ---------------------------------------------------------------------------


def _rest(scene: MemorizationScene, rows: Rows, name: str) -> None:
    pictures = scene.of(name, "ordinary")
    rows.add("empty_pictures", name, "ordinary", lambda: empty_pictures(pictures))
    rows.add("false_copies", name, "ordinary", lambda: _false_copies(scene, pictures))
    real = scene.memorized.test.images
    if real is not None and len(real) > 1:
        rows.add("kid_to_real", name, "ordinary", lambda: _kernel(scene, pictures, real))
    if scene.clip is not None:
        prompts = [prompt for prompt, _ in scene.ordinary]
        rows.add(
            "clip_score", name, "ordinary",
            lambda: clip_scores(scene.clip, pictures, prompts, scene.settings.seed),
        )  # fmt: skip


def _false_copies(scene: MemorizationScene, pictures: Tensor) -> Measured:
    """Share of ordinary pictures that would count as a copy of some training picture."""
    hits = {part.split: torch.zeros(len(pictures), dtype=torch.bool) for part in scene.parts}
    for part in scene.parts:
        for row, one in enumerate(part.memorized.prompts):
            for image in one.images:
                region = part.memorized.regions.get(image)
                likeness = scene.similarity.matrix(
                    pictures,
                    part.memorized.images[image][None],
                    None if region is None else region[None],
                )
                hits[part.split] |= likeness[:, 0] >= scene.thresholds[part.split][row]
    of_any = torch.stack(list(hits.values())).any(0)
    count, n = int(of_any.sum()), len(of_any)
    return Measured(
        count / n, wilson(count, n), n, per_sample=of_any.double().numpy(),
        details={"copies_of": {split: float(own.double().mean()) for split, own in hits.items()}},
    )  # fmt: skip


def thumbnails(images: Tensor) -> Tensor:
    """Reduced pictures as vectors: (B, 3, H, W) in [0, 1] to (B, d)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)


def _kernel(scene: MemorizationScene, pictures: Tensor, real: Tensor) -> Measured:
    from mmforget.metrics.distribution import FeatureNetwork, kernel_distance

    if scene.clip is not None:
        features = FeatureNetwork(scene.clip, "CLIP")
    else:
        features = FeatureNetwork(thumbnails, f"pixels of {THUMBNAIL}x{THUMBNAIL} thumbnails")
    value = kernel_distance(features(real), features(pictures))
    details = {
        "features": features.name,
        "features_hash": features.hash or "none",
        "real": len(real),
    }
    return Measured(float(value), n=len(pictures), details=details)


def _losses(scene: MemorizationScene, rows: Rows) -> None:
    """Denoising loss on real ordinary pictures, with the same noise and times for all models."""
    test = scene.memorized.test
    if test.images is None or not len(test.images):
        return
    count = min(len(test), scene.settings.loss_pictures)
    images, prompts = test.images[:count], test.prompts[:count]
    first = scene.original.entry.name
    for one in scene.models:
        name = one.entry.name
        if one.model is drawer(scene.original) and name != first:
            continue  # the same weights with other seeds, of which nothing here depends

        def loss(model: DiffusionGenerator) -> Measured:
            values = denoising_losses(
                model, images, prompts, scene.settings.seed, scene.settings.batch_size
            )
            return _mean(values, "normal")

        rows.add("denoising_loss", name, "ordinary", partial(loss, drawer(one)))
        if name != first:
            rows.add("denoising_loss_rise", name, "ordinary", partial(_rise, rows, first, name))


def _rise(rows: Rows, first: str, name: str) -> Measured:
    before = rows.per_sample[("denoising_loss", first, "ordinary")]
    after = rows.per_sample[("denoising_loss", name, "ordinary")]
    rise = torch.from_numpy((after - before) / before.mean())
    return _mean(rise, "normal, paired by picture and noise")


@torch.no_grad()
def denoising_losses(
    model: DiffusionGenerator,
    images: Tensor,
    prompts: tuple[str, ...],
    seed: int,
    batch_size: int = 64,
) -> Tensor:
    """Squared error of the prediction for real pictures.

    Noise and time of each picture depend on the seed alone, so that models can be compared picture
    by picture.

    Args:
        model: the model.
        images: (B, 3, H, W) float in [0, 1].
        prompts: B captions.
        seed: of noise and times.
        batch_size: pictures at a time.

    Returns:
        (B,) losses, float64 on the CPU.
    """
    draw = generator(seed, "held-out loss")
    noise = torch.randn(len(images), *model.latent_shape, generator=draw)
    times = model.draw_times(len(images), draw)
    device = next(model.network.parameters()).device
    found = []
    with frozen(model):
        for start in range(0, len(images), batch_size):
            place = slice(start, start + batch_size)
            latents = model.to_latents(images[place].to(device))
            part, time = noise[place].to(latents), times[place].to(device)
            predicted = model.predict(
                model.noised(latents, part, time), time, model.encode(prompts[place])
            )
            error = predicted.float() - model.target(latents, part, time).float()
            found.append(error.square().flatten(1).mean(1).double().cpu())
    return torch.cat(found)


# ---- detection -----------------------------------------------------------------------------------


class Pull:
    """How strongly each prompt pulls in one model; measured when it is first asked for.

    Args:
        scene: what is measured.
        model: in what.
        ordinary: prompts that are not memorized.
    """

    def __init__(
        self, scene: MemorizationScene, model: DiffusionGenerator, ordinary: list[str]
    ) -> None:
        self.scene, self.model, self.ordinary = scene, model, ordinary

    @cached_property
    def report(self) -> DetectionReport:
        """The scores of all prompts."""
        from mmforget.detection.noise_magnitude import noise_magnitude

        scene = self.scene
        named = [text for part in scene.parts for text in part.memorized.texts]
        return noise_magnitude(
            self.model,
            [*named, *self.ordinary],
            n=scene.settings.detection,
            sampling_steps=scene.sampling["steps"],
            guidance=scene.sampling["guidance"],
            seed=derive(scene.settings.seed, "detection"),
            batch_size=scene.settings.batch_size,
        )

    def mean(self, prompts: list[str]) -> Measured:
        """Over some prompts."""
        return _mean(self.report.of(prompts), "normal")

    def told_apart(self, memorized: list[str]) -> Measured:
        """Whether the pull gives memorized prompts away."""
        found = self.report.quality(memorized, self.ordinary)
        details = {key: value for key, value in found.items() if key != "auc"}
        return Measured(float(found["auc"]), n=len(memorized), details=details)


def _detection(scene: MemorizationScene, rows: Rows) -> None:
    ordinary = list(dict.fromkeys(prompt for prompt, _ in scene.ordinary if prompt))
    ordinary = ordinary[: scene.settings.detection_prompts]
    if not ordinary:
        return
    for one in scene.models:
        if one.entry.role == "control":
            continue
        name, pull = one.entry.name, Pull(scene, drawer(one), ordinary)
        rows.add("noise_magnitude", name, "ordinary", partial(pull.mean, ordinary))
        for part in scene.parts:
            texts = part.memorized.texts
            rows.add("noise_magnitude", name, part.split, partial(pull.mean, texts))
            rows.add("detection_auc", name, part.split, partial(pull.told_apart, texts), target=0.5)
