"""Relearning of detectors: do a few boxes bring forgotten classes back?

Fast relearning is evidence that knowledge was hidden and not removed; slow relearning is no
evidence of the contrary. What a retrained model relearns from the same boxes is the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmforget.errors import CapabilityError, ConfigurationError, DataError, ModelError, suggest
from mmforget.methods.base import detached_copy
from mmforget.models.base import Batch, Model, state_hash
from mmforget.models.detector import Detector
from mmforget.seeds import derive, generator

Layers = Literal["all", "head"]
ShownBoxes = Literal["all", "forgotten"]

Judge = Callable[[Model], float]
"""Average precision of a model, in [0, 1]; leaves the model as it is."""


@dataclass(frozen=True)
class DetectorRelearningSettings:
    """Budget of the attacker; the same for every model.

    Args:
        shots: training images per forgotten class.
        boxes: of these images: ``all`` objects, or only the ``forgotten`` ones, where all others
            count as background. That destroys what the model knows of them, and a network in which
            the class was only masked then relearns hardly faster than a retrained one.
        steps: of AdamW on all weights; 0 leaves the attack out of an audit.
        learning_rates: of all weights, tried one after another.
        head_learning_rates: of the final class layer alone, all below it frozen. Where the features
            still tell the class apart, this brings it back at once; in a retrained detector it
            does not. Of all runs the one that brings most back counts.
        batch_size: images per step, all shots if there are fewer.
        evaluate_every: steps between two evaluations.
        evaluation_images: at most this many test images with forgotten objects are evaluated, and
            at most as many with retained ones.

    Raises:
        ConfigurationError: a number below its minimum, or an unknown choice.
    """

    shots: int = 4
    boxes: ShownBoxes = "all"
    steps: int = 40
    learning_rates: tuple[float, ...] = (3e-4,)
    head_learning_rates: tuple[float, ...] = (1e-2,)
    batch_size: int = 8
    evaluate_every: int = 10
    evaluation_images: int = 80

    def __post_init__(self) -> None:
        for name in ("learning_rates", "head_learning_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("shots", "steps", "batch_size", "evaluate_every", "evaluation_images"):
            least = 0 if name == "steps" else 1
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"`relearning.{name}` is {getattr(self, name)}, it must be at least {least}"
                )
        if self.boxes not in get_args(ShownBoxes):
            raise ConfigurationError(
                f"`relearning.boxes` is '{self.boxes}', {suggest(self.boxes, get_args(ShownBoxes))}"
            )
        if not (self.learning_rates or self.head_learning_rates):
            raise ConfigurationError(
                "`relearning.learning_rates` and `head_learning_rates` are both empty; give one, "
                "or 0 `steps`"
            )
        for name in ("learning_rates", "head_learning_rates"):
            if any(rate <= 0 for rate in getattr(self, name)):
                raise ConfigurationError(
                    f"`relearning.{name}` is {getattr(self, name)}; give positive numbers"
                )

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the attack is evaluated; 0 is before the first."""
        return [*range(0, self.steps, self.evaluate_every), self.steps]


@dataclass(frozen=True)
class DetectorCurve:
    """One run of the attack.

    Attributes:
        learning_rate: of AdamW.
        layers: what was trained, ``all`` or the ``head``.
        steps: at which the model was evaluated, from 0 on.
        precision: average precision of the forgotten classes at these steps, in [0, 1].
        retained: average precision of the retained classes after the last step.
        diverged: the loss ceased to be finite; the precision stays where it was.
    """

    learning_rate: float
    steps: tuple[int, ...]
    precision: tuple[float, ...]
    retained: float
    diverged: bool = False
    layers: Layers = "all"


def relearn_detector(
    model: Model,
    shots: Batch,
    forgotten: Judge,
    retained: Judge,
    settings: DetectorRelearningSettings,
    seed: int = 0,
) -> list[DetectorCurve]:
    """Fine-tune deep copies of a detector on a few images, one per set of layers and rate.

    AdamW without weight decay on all weights or on the final class layer, in eval mode (no dropout;
    the statistics of batch normalisation stay). The loss of the first is the one that training from
    scratch minimises, with those of earlier decoder layers, since an attacker takes what works
    fastest; objects are not denoised, which needs training mode. Order and draws are the same for
    every model. Rows of the class layers whose weights are all zero are a mask that everybody sees
    who has the weights; the attacker replaces them by the mean of the others before the first step.

    Args:
        model: the victim, left as it is.
        shots: a batch of labelled training images.
        forgotten: average precision of the forgotten classes.
        retained: average precision of the retained classes.
        settings: the budget.
        seed: base seed of the order.

    Raises:
        CapabilityError: the model is no detector.
        DataError: the shots hold no box.
        ModelError: the attack reached through to the model that it was given.
    """
    if not isinstance(model, Detector):
        raise CapabilityError(
            f"relearning from boxes needs a Detector, but this is a {type(model).__name__}"
        )
    if not bool((shots["label"] >= 0).any()):
        raise DataError("the shots of the relearning attack hold no box; give images with some")
    before = state_hash(model)
    runs: list[tuple[Layers, float]] = [("all", rate) for rate in settings.learning_rates]
    runs += [("head", rate) for rate in settings.head_learning_rates]
    curves = [
        _attack(model, shots, forgotten, retained, layers, rate, settings, seed)
        for layers, rate in runs
    ]
    if state_hash(model) != before:
        raise ModelError(
            f"the relearning attack changed the {type(model).__name__} that it was given; "
            "a deep copy of the model must not share its weights"
        )
    return curves


def _attack(
    model: Model,
    shots: Batch,
    forgotten: Judge,
    retained: Judge,
    layers: Layers,
    rate: float,
    settings: DetectorRelearningSettings,
    seed: int,
) -> DetectorCurve:
    victim: Any = detached_copy(model).eval()
    _unmask(victim)
    victim.requires_grad_(False)
    trained = victim if layers == "all" else victim.head
    trained.requires_grad_(True)
    weights = list(trained.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    checkpoints = settings.evaluations
    found, diverged = [forgotten(victim)], False
    devices = [victim.device] if victim.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(derive(seed, "detector-relearning"))
        for step, rows in enumerate(_orders(len(shots["image"]), settings, seed), start=1):
            batch = {key: value[rows].to(victim.device) for key, value in shots.items()}
            if not diverged:
                losses = victim.training_loss if layers == "all" else victim.loss
                loss: Tensor = losses(batch).mean()
                diverged = not bool(torch.isfinite(loss))
            if not diverged:
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
            if step in checkpoints:
                found.append(found[-1] if diverged else forgotten(victim))
    kept = retained(victim)
    return DetectorCurve(rate, tuple(checkpoints), tuple(found), kept, diverged, layers)


def _orders(n: int, settings: DetectorRelearningSettings, seed: int) -> list[Tensor]:
    """Rows of the shots in every step; full batches only."""
    size = min(n, settings.batch_size)
    orders: list[Tensor] = []
    while len(orders) < settings.steps:
        chance = generator(seed, "detector-relearning-order", len(orders))
        orders += [p for p in torch.randperm(n, generator=chance).split(size) if len(p) == size]
    return orders[: settings.steps]


@torch.no_grad()
def _unmask(victim: Detector) -> None:
    """Replace class rows that are all zero by the mean of those of the other classes."""
    layers: dict[int, tuple[Any, list[list[int]]]] = {}
    for index in range(victim.num_classes):
        for layer, rows in victim.class_rows((index,)):
            layers.setdefault(id(layer), (layer, []))[1].append(rows)
    for layer, by_class in layers.values():
        masked = [rows for rows in by_class if bool((layer.weight[rows] == 0).all())]
        others = [rows for rows in by_class if rows not in masked]
        for rows in masked if others else []:
            layer.weight[rows] = torch.stack([layer.weight[own] for own in others]).mean(0)
            if layer.bias is not None:
                layer.bias[rows] = torch.stack([layer.bias[own] for own in others]).mean(0)


def draw_box_shots(held: np.ndarray, classes: Sequence[int], shots: int, seed: int) -> np.ndarray:
    """Positions of the images that the attacker has: at most `shots` per forgotten class.

    Args:
        held: (N, C) bool, the classes that an image holds.
        classes: the forgotten ones.
        shots: per class; an image with objects of two classes may be drawn for both.
        seed: base seed.
    """
    chosen: list[np.ndarray] = []
    for label in classes:
        own = np.flatnonzero(held[:, label])
        chance = generator(seed, "detector-relearning-shots", label)
        chosen.append(own[torch.randperm(len(own), generator=chance)[:shots].numpy()])
    return np.unique(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def strongest(curves: Sequence[DetectorCurve]) -> DetectorCurve:
    """The run that brings most back: the attacker chooses layers and learning rate."""
    return max(curves, key=lambda curve: curve.precision[-1])


def detector_curve_rows(curves: Sequence[DetectorCurve], model: str) -> list[dict[str, Any]]:
    """Rows for `Results.curves`; the charts read average precision under ``accuracy``."""
    return [
        {
            "model": model,
            "learning_rate": curve.learning_rate,
            "seed": 0,
            "step": step,
            "accuracy": value,
        }
        for curve in curves
        for step, value in zip(curve.steps, curve.precision, strict=True)
    ]
