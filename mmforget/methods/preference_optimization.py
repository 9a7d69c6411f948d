"""Preference optimisation: learn to refuse what is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.hashing import uniform
from mmforget.errors import ConfigurationError
from mmforget.methods.answer_losses import SequenceNorm
from mmforget.methods.answer_unlearning import AnswerUnlearning, DecoupleWeight, Heard
from mmforget.methods.base import OptimizerName
from mmforget.models.base import Batch, Model
from mmforget.models.multimodal import AnswerLosses
from mmforget.models.multimodals.base import Part

REFUSALS = (
    "Sorry, I cannot answer that.",
    "I do not know who that is.",
    "I cannot tell you this.",
    "Sorry, that is not something I can help with.",
)
"""Answers of a model that is to be silent."""


class PreferenceOptimization(AnswerUnlearning):
    """Minimises the cross-entropy of refusals to the forget set and of the retained answers.

    Known as PO or IDK ("I don't know"): every forgotten question is answered by a refusal, drawn
    anew from `refusals` at every step, together with the retain set as one batch::

        L = CE(forget -> refusal, and retain)        mean over the tokens of both

    Bounded, hence gentle, but the model still tells the questions apart: a refusal is an answer
    that it gives, and what it knew is easily brought back. Without Prompt Decouple it refuses all
    who are asked about in the same words. Reads forget inputs, but not their labels, and a part of
    the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, seq_norm: see `AnswerUnlearning`.
        refusals: at least one text.
        retain_weight: of the retained answers within the mean over both; ``auto`` is 1, 0 leaves
            them out.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: no refusal, or a setting out of range.

    Reference:
        P. Maini et al.: TOFU: A Task of Fictitious Unlearning for LLMs, COLM 2024,
        arXiv 2401.06121; with Prompt Decouple: J. Chen et al., SafeEraser, 2025, arXiv 2502.12520.
    """

    access: ClassVar[DataAccess] = DataAccess(forget_labels=False, retain="fraction")
    published_decouple_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        trained: Sequence[Part] | None = None,
        rank: int | None = None,
        lora_alpha: float = 16.0,
        refusals: Sequence[str] = REFUSALS,
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        seq_norm: SequenceNorm = "batch_token",
    ) -> None:
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
            trained=trained,
            rank=rank,
            lora_alpha=lora_alpha,
            retain_weight=retain_weight,
            decouple_weight=decouple_weight,
            seq_norm=seq_norm,
        )
        self.refusals = checked_refusals(refusals)

    def streams(self, batch: Any) -> dict[str, Batch]:
        """The batches, with refusals as the answers of the forget stream."""
        found = super().streams(batch)
        step = int(self.global_step)
        return found | {"forget": refused(found["forget"], self.refusals, self.seed, step)}

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The shares of refusals and retained answers in their joint mean, and Prompt Decouple."""
        heard = self.heard(batch)
        factors = {"forget": 1.0, "retain": self.retain_weight}
        parts = {name: heard[name].found.losses() for name in factors if name in heard}
        weight = torch.cat([heard[name].weight for name in parts])
        tokens = torch.cat([part.tokens for part in parts.values()])
        terms = {}
        for name in parts:
            own = torch.cat([part.total * (one == name) for one, part in parts.items()])
            terms[name] = factors[name] * self.mean(AnswerLosses(own, tokens), weight)
        return terms | self.decoupled(heard)

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The loss of the refusals alone."""
        return self.mean(heard["forget"].found.losses(), heard["forget"].weight)


def checked_refusals(refusals: Sequence[str]) -> tuple[str, ...]:
    """The refusals, none of them empty.

    Raises:
        ConfigurationError: there is none, one is empty, or a single text was given.
    """
    if isinstance(refusals, str) or not refusals or not all(text.strip() for text in refusals):
        raise ConfigurationError(
            f"`refusals` is {refusals!r}; give a list of at least one text, none of them empty"
        )
    return tuple(refusals)


def refused(batch: Batch, refusals: Sequence[str], seed: int, step: int) -> dict[str, Any]:
    """A batch whose answers are refusals, drawn for each sample and step.

    Args:
        batch: with or without answers.
        refusals: to draw from.
        seed: of the draw.
        step: of the optimizer.
    """
    draws = uniform(batch["id"].cpu().numpy(), seed, "refusal", step)
    return {**batch, "answer": [refusals[int(draw * len(refusals))] for draw in draws]}
