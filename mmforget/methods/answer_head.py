"""AnswerHead: edit the layer that scores tokens and nothing below it, a control."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import Answers, HasHead, HasLoss, Model, frozen
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.seeds import generator

BATCH = 32


class _States(NamedTuple):
    """What enters the head where the tokens of N answers are predicted.

    Attributes:
        hidden: (T, D) states.
        labels: (T,) tokens.
        answer: (T,) numbers of the answers.
    """

    hidden: Tensor
    labels: Tensor
    answer: Tensor


class AnswerHead(ForgettingMethod):
    """Trains the last layer of a language model until forgotten answers are unlikely.

    Minimises ``loss(retain) + mean max(0, bound - loss(forget))``, losses per token of an answer,
    over the weights of the head alone. What enters the head is computed once. The spoken answers
    forget, the states below still hold everything: the original's head reads the true answers off
    them as before, and an audit that ranks this high listens to answers only. `HeadOnly` is the
    same idea where the head has a row per class. If a network uses one matrix for embedding and
    head, both are edited. Reads some records of both sets with their answers. There is no training
    with a trainer: ``method.bind(datamodule)``, then ``method.finalize()``.

    Args:
        model, copy, seed: see `ForgettingMethod`.
        records: of each set, drawn at random.
        steps: of AdamW over all of them.
        lr: of AdamW.
        bound: loss per token at which a forgotten answer is left alone; None takes the model's.

    Raises:
        CapabilityError: the model answers no questions, or its head has no weights.
        ConfigurationError: a number that is not positive.
    """

    requires: ClassVar[tuple[type, ...]] = (Answers, HasLoss, HasHead)
    access: ClassVar[DataAccess] = DataAccess(retain="fraction")
    view: ClassVar[View | None] = None
    control: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        records: int = 256,
        steps: int = 100,
        lr: float = 1e-2,
        bound: float | None = None,
    ) -> None:
        super().__init__(model, copy=copy, seed=seed)
        for name, value in (("records", records), ("steps", steps), ("lr", lr), ("bound", bound)):
            if value is not None and not value > 0:
                raise ConfigurationError(f"`{name}` is {value}, it must be positive")
        self.records, self.steps, self.lr = records, steps, lr
        self.bound = float(self.model.forget_bound if bound is None else bound)
        if not list(self.model.head.parameters()):
            raise CapabilityError(
                f"AnswerHead needs a head with weights, which that of {type(model).__name__} lacks"
            )

    def edit(self) -> None:
        """Train the head on states that are computed once."""
        forget, retain = self._states("forget"), self._states("retain")
        weights = list(self.model.head.parameters())
        optimizer = torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0)
        needed = [weight.requires_grad for weight in weights]
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            for _ in range(self.steps):
                optimizer.zero_grad()
                self.loss(forget, retain).backward()
                optimizer.step()
        for weight, need in zip(weights, needed, strict=True):
            weight.requires_grad_(need)

    def loss(self, forget: _States, retain: _States) -> Tensor:
        """What is minimised."""
        missing = (self.bound - self._losses(forget)).clamp(min=0)
        return self._losses(retain).mean() + missing.mean()

    def _losses(self, states: _States) -> Tensor:
        """(N,) losses per token of the answers."""
        each = F.cross_entropy(
            self.model.head(states.hidden).float(), states.labels, reduction="none"
        )
        number = int(states.answer.max()) + 1
        total = torch.zeros(number, device=each.device).index_add(0, states.answer, each)
        tokens = torch.bincount(states.answer, minlength=number).clamp(min=1)
        return total / tokens

    def _states(self, role: Literal["forget", "retain"]) -> _States:
        data: Any = self.data.subset("train", role)
        chance = generator(self.seed, f"answer-head/{role}")
        chosen = torch.randperm(len(data), generator=chance)[: self.records].sort().values
        parts: list[_States] = []
        done = 0
        with frozen(self.model), torch.no_grad():
            for rows in chosen.split(BATCH):
                found = self.model.answer_logits(data[rows.tolist()])
                spoken = found.labels != IGNORED
                number = torch.arange(done, done + len(rows), device=spoken.device)
                parts.append(
                    _States(
                        found.hidden[spoken].detach(),
                        found.labels[spoken],
                        number[:, None].expand_as(spoken)[spoken],
                    )
                )
                done += len(rows)
        self.spend(forget=done if role == "forget" else 0, retain=done if role == "retain" else 0)
        return _States(*(torch.cat(column) for column in zip(*parts, strict=True)))
