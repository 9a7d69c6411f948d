"""Relearning attack: how fast does a few-shot fine-tune bring the forgotten knowledge back?

Fast relearning is evidence that knowledge was hidden and not removed. Slow relearning is no
evidence of the contrary: a new head on untouched features and random labels can relearn more slowly
than a retrained model. The value of the retrained model is the target, from both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.errors import ConfigurationError, ModelError, suggest
from mmforget.methods.base import detached_copy
from mmforget.models.base import (
    HasFeatures,
    HasHead,
    HasLogits,
    Model,
    check_capabilities,
    state_hash,
)
from mmforget.seeds import generator

Mode = Literal["full", "head"]


@dataclass(frozen=True)
class RelearningSettings:
    """Budget of the attacker; the same for every model.

    The defaults are a quick look: about one second per model for a ViT with half a million
    parameters on one CPU core.

    Args:
        shots: training samples per class that the attacker has, of all classes: with the forgotten
            ones alone, a network that answers them to everything would count as having relearned.
        learning_rates: tried one after another; the worst case counts.
        steps: gradient steps of SGD with momentum 0.9.
        batch_size: per step; all shots if there are fewer.
        evaluate_every: steps between two evaluations, also the resolution of the result.
        evaluation_images: at most this many forgotten test images are evaluated.
        modes: ``full`` trains all layers, ``head`` the last one on frozen features.
        seeds: number of draws of the shots.

    Raises:
        ConfigurationError: a number below its minimum, or an unknown mode.
    """

    shots: int = 5
    learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    steps: int = 20
    batch_size: int = 25
    evaluate_every: int = 2
    evaluation_images: int = 60
    modes: tuple[Mode, ...] = ("full", "head")
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in ("learning_rates", "modes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = ("shots", "steps", "batch_size", "evaluate_every", "evaluation_images", "seeds")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"`relearning.{name}` is {getattr(self, name)}, it must be at least 1"
                )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigurationError(
                f"`relearning.learning_rates` is {self.learning_rates}; give positive numbers"
            )
        for mode in self.modes:
            if mode not in get_args(Mode):
                raise ConfigurationError(
                    f"`relearning.modes` contains '{mode}', {suggest(mode, get_args(Mode))}"
                )

    @classmethod
    def thorough(cls) -> Self:
        """The budget for published numbers: minutes instead of seconds per model."""
        return cls(
            shots=20,
            batch_size=100,
            learning_rates=(1e-4, 1e-3, 1e-2),
            steps=200,
            evaluate_every=4,
            evaluation_images=1000,
            seeds=3,
        )

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the attack is evaluated; 0 is before the first."""
        steps = list(range(0, self.steps + 1, self.evaluate_every))
        return steps if steps[-1] == self.steps else [*steps, self.steps]


@dataclass(frozen=True)
class Labelled:
    """Images and labels that the attack uses, on the CPU.

    Attributes:
        image: (N, 3, H, W) in [0, 1].
        label: (N,) int64.
    """

    image: Tensor
    label: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> Self:
        """Take what is needed from a batch."""
        return cls(batch["image"], batch["label"])


@dataclass(frozen=True)
class Curve:
    """One run of the attack.

    Attributes:
        mode: what was trained.
        learning_rate: of SGD.
        seed: number of the draw of the shots.
        steps: steps at which the model was evaluated, from 0 on.
        accuracy: on forgotten test images at these steps, in [0, 1].
        retain_accuracy: on retained test images after the last step.
        diverged: the loss ceased to be finite; the accuracy stays where it was.
    """

    mode: Mode
    learning_rate: float
    seed: int
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    retain_accuracy: float
    diverged: bool = False

    def steps_to(self, accuracy: float) -> int | None:
        """First evaluated step with at least this accuracy; None if censored."""
        for step, value in zip(self.steps, self.accuracy, strict=True):
            if value >= accuracy:
                return step
        return None

    @property
    def area(self) -> float:
        """Mean accuracy over the steps (trapezoids), in [0, 1]."""
        return float(np.trapezoid(self.accuracy, self.steps)) / self.steps[-1]


def relearn(
    model: Model,
    shots: Sequence[Labelled],
    forgotten: Labelled,
    retained: Labelled,
    settings: RelearningSettings,
    seed: int = 0,
) -> list[Curve]:
    """Attack deep copies of a model with every mode, learning rate and draw of shots.

    SGD, momentum 0.9, cross-entropy, eval mode throughout (no dropout, BatchNorm statistics stay),
    no augmentation. Order and shots are the same for every model. An output of the head whose
    weights are all zero is a mask that everybody sees who has the weights; the attacker replaces it
    by the mean of the other outputs before the first step.

    Args:
        model: the victim, left as it is.
        shots: training samples that the attacker has, one draw per seed.
        forgotten: forgotten test images on which the attack is evaluated.
        retained: retained test images.
        settings: the budget.
        seed: base seed of the order.

    Returns:
        One curve per mode, learning rate and seed.

    Raises:
        ModelError: the attack reached through to the model that it was given.
        CapabilityError: the model has no logits, or, for mode ``head``, no features and head.
    """
    needs: tuple[type, ...] = (HasLogits,)
    if "head" in settings.modes:
        needs = (HasLogits, HasFeatures, HasHead)
    check_capabilities("the relearning attack", model, needs)
    before = state_hash(model)
    curves = []
    for mode in settings.modes:
        frozen = _Frozen(model, [*shots, forgotten, retained]) if mode == "head" else None
        for rate in settings.learning_rates:
            for number, given in enumerate(shots):
                orders = _orders(len(given.label), settings, seed, number)
                data = (given, forgotten, retained)
                curves.append(_attack(model, data, frozen, orders, mode, rate, number, settings))
    if state_hash(model) != before:
        raise ModelError(
            f"the relearning attack changed the {type(model).__name__} that it was given; "
            "a deep copy of the model must not share its weights"
        )
    return curves


class _Frozen:
    """Features of the frozen backbone, computed once for all heads."""

    def __init__(self, model: Model, parts: Sequence[Labelled]) -> None:
        assert isinstance(model, HasFeatures)
        victim = detached_copy(model).eval()
        assert isinstance(victim, HasFeatures)
        with torch.no_grad():
            self._features = {
                id(part): torch.cat(
                    [victim.features({"image": i.to(model.device)}) for i in part.image.split(256)]
                )
                for part in parts
            }

    def of(self, part: Labelled) -> Tensor:
        return self._features[id(part)]


def _orders(n: int, settings: RelearningSettings, seed: int, number: int) -> list[Tensor]:
    """Positions of the shots in every step; full batches wherever they fit."""
    size = min(n, settings.batch_size)
    orders: list[Tensor] = []
    for epoch in range(settings.steps):
        chance = generator(seed, "relearning-order", number, epoch)
        orders += [part for part in torch.randperm(n, generator=chance).split(size)]
        if len(orders) >= settings.steps:
            break
    return orders[: settings.steps]


def _attack(
    model: Model,
    data: tuple[Labelled, Labelled, Labelled],
    frozen: _Frozen | None,
    orders: Sequence[Tensor],
    mode: Mode,
    rate: float,
    number: int,
    settings: RelearningSettings,
) -> Curve:
    victim = detached_copy(model).eval()
    given, forgotten, retained = data
    _unmask(victim)
    victim.requires_grad_(mode == "full")
    if mode == "head":
        assert isinstance(victim, HasHead)
        victim.head.requires_grad_(True)
    trained = [parameter for parameter in victim.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)

    def logits(part: Labelled, index: Tensor) -> Tensor:
        assert isinstance(victim, HasLogits)
        batch = {"image": part.image[index].to(victim.device)}
        if frozen is None:
            return victim.logits(batch)
        return victim.logits(batch, features=frozen.of(part)[index])

    @torch.no_grad()
    def accuracy(part: Labelled) -> float:
        pieces = torch.arange(len(part.label)).split(256)
        hits = [(logits(part, i).argmax(1).cpu() == part.label[i]).sum() for i in pieces]
        return float(torch.stack(hits).sum()) / len(part.label)

    checkpoints = settings.evaluations
    found = [accuracy(forgotten)]
    diverged = False
    with torch.enable_grad():
        for step, index in enumerate(orders, start=1):
            if not diverged:
                target = given.label[index].to(victim.device)
                loss = F.cross_entropy(logits(given, index), target)
                diverged = not bool(torch.isfinite(loss))
            if not diverged:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if step in checkpoints:
                found.append(found[-1] if diverged else accuracy(forgotten))
    return Curve(
        mode=mode,
        learning_rate=rate,
        seed=number,
        steps=tuple(checkpoints),
        accuracy=tuple(found),
        retain_accuracy=accuracy(retained),
        diverged=diverged,
    )


@torch.no_grad()
def _unmask(victim: Model) -> None:
    if not (isinstance(victim, HasHead) and isinstance(victim, HasLogits)):
        return
    for layer in victim.head.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == victim.num_classes:
            masked = (layer.weight == 0).all(dim=1)
            if masked.any() and not masked.all():
                layer.weight[masked] = layer.weight[~masked].mean(0)
                if layer.bias is not None:
                    layer.bias[masked] = layer.bias[~masked].mean()


@dataclass(frozen=True)
class Relearning:
    """The worst case over learning rates, summed up over seeds.

    Attributes:
        steps: median over seeds of the first evaluated step that reaches the target; None if
            censored.
        areas: per seed the largest area under the curve.
        retain_accuracy: mean over seeds, after the attack with the largest area.
        best_rate: learning rate of the attack with the largest mean area.
    """

    steps: float | None
    areas: tuple[float, ...]
    retain_accuracy: float
    best_rate: float

    @property
    def area(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.areas))


def worst_case(curves: Sequence[Curve], mode: Mode, target: float) -> Relearning:
    """Let the attacker choose the learning rate.

    Args:
        curves: of one model.
        mode: which of them count.
        target: accuracy that counts as relearned, usually 0.8 times that of the original model.
    """
    chosen: dict[int, list[Curve]] = {}
    for curve in curves:
        if curve.mode == mode:
            chosen.setdefault(curve.seed, []).append(curve)
    first: list[float] = []
    best = [max(group, key=lambda curve: curve.area) for group in chosen.values()]
    for group in chosen.values():
        reached = [step for curve in group if (step := curve.steps_to(target)) is not None]
        first.append(min(reached) if reached else np.inf)
    # the median of an even number of seeds must not average a number with infinity away
    middle = float(np.sort(first)[len(first) // 2])
    rates = [curve.learning_rate for curve in best]
    return Relearning(
        steps=middle if np.isfinite(middle) else None,
        areas=tuple(curve.area for curve in best),
        retain_accuracy=float(np.mean([curve.retain_accuracy for curve in best])),
        best_rate=max(set(rates), key=rates.count),
    )


def normalised_area(area: float, original: float, random_init: float) -> float | None:
    """(area - random) / (original - random): 1 as if never forgotten, 0 as if never learned.

    Returns:
        None if the two anchors differ by less than 0.05, so that the ratio has no meaning.
    """
    span = original - random_init
    return None if abs(span) < 0.05 else (area - random_init) / span


def draw_shots(
    labels: np.ndarray, forgotten: np.ndarray, shots: int, seed: int, number: int
) -> np.ndarray:
    """Positions of the samples that the attacker has: at most `shots` of every label.

    Args:
        labels: (N,) labels of training samples.
        forgotten: (N,) bool. A label that has forgotten samples gives only these.
        shots: per label.
        seed: base seed.
        number: number of the draw.
    """
    kept = []
    for label in np.unique(labels):
        own = labels == label
        found = np.flatnonzero(own & forgotten if (own & forgotten).any() else own)
        chance = generator(seed, "relearning-shots", number, int(label))
        kept.append(found[torch.randperm(len(found), generator=chance)[:shots].numpy()])
    return np.sort(np.concatenate(kept))


def curve_rows(curves: Sequence[Curve], model: str, mode: Mode) -> list[dict[str, Any]]:
    """Rows for `Results.curves`."""
    return [
        {
            "model": model,
            "learning_rate": curve.learning_rate,
            "seed": curve.seed,
            "step": step,
            "accuracy": value,
        }
        for curve in curves
        if curve.mode == mode
        for step, value in zip(curve.steps, curve.accuracy, strict=True)
    ]
