"""Relearning of multimodal language models: do a few questions bring an entity back?

Fast relearning is evidence that knowledge was hidden and not removed; slow relearning is no
evidence of the contrary. What a retrained model relearns from the same records is the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mmforget.data.questions import QuestionDataset
from mmforget.errors import CapabilityError, ConfigurationError, DataError, ModelError, suggest
from mmforget.methods.base import detached_copy
from mmforget.models.base import Model, state_hash
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import Part
from mmforget.seeds import derive, generator

Judge = Callable[[Model], float]
"""Share of answers in [0, 1]; leaves the model as it is."""

BANS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Fields of a generation configuration by which tokens are never said, whatever their logits."""


@dataclass(frozen=True)
class AnswerRelearningSettings:
    """Budget of the attacker; the same for every model.

    Args:
        shots: training records per forgotten entity.
        others: training records per retained entity, asked in the same way. Without any, a model
            that answers one forgotten name to everything would count as having relearned it.
        steps: of AdamW; 0 leaves the attack out of an audit.
        learning_rates: tried one after another; the run that brings most back counts.
        parts: of the network that are trained, whatever the method trained.
        batch_size: records per step, all of them if there are fewer.
        evaluate_every: steps between two evaluations, also the resolution of the result.
        evaluation_records: at most this many unseen pictures of forgotten entities are asked about,
            and at most as many of retained ones.
        regained: share of the original's success at which an entity counts as back.

    Raises:
        ConfigurationError: a number out of range, or an unknown part.
    """

    shots: int = 4
    others: int = 2
    steps: int = 20
    learning_rates: tuple[float, ...] = (1e-4, 5e-4)
    parts: tuple[Part, ...] = ("projector", "language", "head")
    batch_size: int = 16
    evaluate_every: int = 5
    evaluation_records: int = 60
    regained: float = 0.9

    def __post_init__(self) -> None:
        for name in ("learning_rates", "parts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = ("shots", "others", "steps", "batch_size", "evaluate_every", "evaluation_records")
        for name in counts:
            least = 0 if name in ("others", "steps") else 1
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"`relearning.{name}` is {getattr(self, name)}, it must be at least {least}"
                )
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigurationError(
                f"`relearning.learning_rates` is {self.learning_rates}; give positive numbers"
            )
        if not 0 < self.regained <= 1:
            raise ConfigurationError(
                f"`relearning.regained` is {self.regained}, it must be above 0 and at most 1"
            )
        for part in self.parts:
            if part not in get_args(Part):
                raise ConfigurationError(
                    f"`relearning.parts` has '{part}', {suggest(part, get_args(Part))}"
                )
        if not self.parts:
            raise ConfigurationError("`relearning.parts` is empty; name what is to be trained")

    @property
    def evaluations(self) -> list[int]:
        """The steps after which the attack is evaluated; 0 is before the first."""
        return [*range(0, self.steps, self.evaluate_every), self.steps]


@dataclass(frozen=True)
class AnswerCurve:
    """One run of the attack.

    Attributes:
        learning_rate: of AdamW.
        steps: at which the model was evaluated, from 0 on.
        success: share of answers that reveal a forgotten entity at these steps.
        retained: share of right answers about retained entities after the last step.
        diverged: the loss ceased to be finite; the success stays where it was.
    """

    learning_rate: float
    steps: tuple[int, ...]
    success: tuple[float, ...]
    retained: float
    diverged: bool = False

    def reached(self, level: float) -> int | None:
        """The first evaluated step with so much success, None if there is none."""
        pairs = zip(self.steps, self.success, strict=True)
        return next((step for step, value in pairs if value >= level), None)


def relearn_answers(
    model: Model,
    shots: QuestionDataset,
    forgotten: Judge,
    retained: Judge,
    settings: AnswerRelearningSettings,
    seed: int = 0,
) -> list[AnswerCurve]:
    """Fine-tune deep copies of a model on a few records, one per learning rate.

    AdamW without weight decay, in eval mode (no dropout), on the loss per token of the true
    answers. Order and draws are the same for every model. Tokens that a model never says because
    of its generation configuration are no obstacle: who has the weights deletes the entry.

    Args:
        model: the victim, left as it is.
        shots: training records with answers.
        forgotten: share of answers that reveal a forgotten entity.
        retained: share of right answers about retained entities.
        settings: the budget.
        seed: base seed of the order.

    Raises:
        CapabilityError: the model answers no questions.
        DataError: no shots.
        ConfigurationError: the network has no weights in the parts that are to be trained.
        ModelError: the attack reached through to the model that it was given.
    """
    if not isinstance(model, MultimodalLM):
        raise CapabilityError(
            f"relearning of answers needs a MultimodalLM, but this is a {type(model).__name__}"
        )
    if not len(shots):
        raise DataError("the relearning attack has no records; give some with answers")
    before = state_hash(model)
    curves = [
        _attack(model, shots, forgotten, retained, rate, settings, seed)
        for rate in settings.learning_rates
    ]
    if state_hash(model) != before:
        raise ModelError(
            f"the relearning attack changed the {type(model).__name__} that it was given; "
            "a deep copy of the model must not share its weights"
        )
    return curves


def _attack(
    model: MultimodalLM,
    shots: QuestionDataset,
    forgotten: Judge,
    retained: Judge,
    rate: float,
    settings: AnswerRelearningSettings,
    seed: int,
) -> AnswerCurve:
    victim: Any = detached_copy(model).eval()
    lift_bans(victim)
    weights = _trained(victim, settings.parts)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    found, diverged = [forgotten(victim)], False
    devices = [victim.device] if victim.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(derive(seed, "answer-relearning"))
        for step, rows in enumerate(_orders(len(shots), settings, seed), start=1):
            if not diverged:
                batch = shots[rows.tolist()]
                loss: Tensor = victim.loss(batch).mean()
                diverged = not bool(torch.isfinite(loss))
            if not diverged:
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
            if step in settings.evaluations:
                found.append(found[-1] if diverged else forgotten(victim))
    kept = retained(victim)
    return AnswerCurve(rate, tuple(settings.evaluations), tuple(found), kept, diverged)


def lift_bans(model: MultimodalLM) -> None:
    """Let a model say everything that its weights say, in place."""
    configuration = getattr(model.network, "generation_config", None)
    for name in BANS if configuration is not None else ():
        setattr(configuration, name, None)


def _trained(victim: MultimodalLM, parts: Sequence[str]) -> list[Tensor]:
    weights = []
    for name, parameter in victim.network.named_parameters():
        chosen = victim.family.part(name) in parts
        parameter.requires_grad_(chosen)
        weights += [parameter] if chosen else []
    if not weights:
        raise ConfigurationError(
            f"`relearning.parts` is {list(parts)}, but {type(victim.network).__name__} has no "
            "weights there"
        )
    return weights


def _orders(n: int, settings: AnswerRelearningSettings, seed: int) -> list[Tensor]:
    """Rows of the shots in every step; full batches only."""
    size = min(n, settings.batch_size)
    orders: list[Tensor] = []
    while len(orders) < settings.steps:
        chance = generator(seed, "answer-relearning-order", len(orders))
        orders += [p for p in torch.randperm(n, generator=chance).split(size) if len(p) == size]
    return orders[: settings.steps]


def draw_records(subjects: np.ndarray, classes: Sequence[int], each: int, seed: int) -> np.ndarray:
    """Positions of at most `each` records per entity, drawn at random, in ascending order.

    Args:
        subjects: (N,) entities of the records.
        classes: entities that are drawn for.
        each: records per entity.
        seed: base seed.
    """
    chosen: list[np.ndarray] = []
    for label in classes:
        own = np.flatnonzero(subjects == label)
        chance = generator(seed, "answer-relearning-shots", int(label))
        chosen.append(own[torch.randperm(len(own), generator=chance)[:each].numpy()])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def strongest(curves: Sequence[AnswerCurve]) -> AnswerCurve:
    """The run that brings most back over all steps: the attacker chooses the learning rate."""
    return max(curves, key=lambda curve: sum(curve.success))


def answer_curve_rows(curves: Sequence[AnswerCurve], model: str) -> list[dict[str, Any]]:
    """Rows for `Results.curves`; the charts read the success under ``accuracy``."""
    return [
        {
            "model": model,
            "learning_rate": curve.learning_rate,
            "seed": 0,
            "step": step,
            "accuracy": value,
        }
        for curve in curves
        for step, value in zip(curve.steps, curve.success, strict=True)
    ]
