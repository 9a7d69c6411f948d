"""SimNPO: NPO without a reference, on the loss per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from mmforget.methods.answer_losses import sim_npo_loss
from mmforget.methods.answer_unlearning import (
    AnswerUnlearning,
    DecoupleWeight,
    Heard,
    RetainTerm,
)
from mmforget.methods.base import OptimizerName
from mmforget.methods.grad_diff import check_weight
from mmforget.methods.npo import check_beta
from mmforget.methods.reference import ReferenceKind
from mmforget.models.base import Model
from mmforget.models.multimodals.base import Part


class SimNPO(AnswerUnlearning):
    r"""Simplified negative preference optimisation: long answers weigh no more than short ones.

    ::

        L = forget_weight * mean [-(2 / beta) log sigmoid(beta (ce - delta))]
            + retain_weight * retain term

    with ``ce`` the loss per token of an answer. No reference model is needed. Reads forget inputs
    and labels and a part of the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, retain: see `AnswerUnlearning`.
        beta: positive (released code: 4.5).
        delta: loss per token that is aimed at (released code: 0).
        forget_weight: positive (released code: 0.125).
        retain_weight: ``auto`` is 1.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.
        reference: only of the retain term ``kl``; see `Reference`.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: a setting out of range.

    Reference:
        C. Fan et al.: Simplicity Prevails: Rethinking Negative Preference Optimization for LLM
        Unlearning, 2024, arXiv 2410.07163.
    """

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
        beta: float = 4.5,
        delta: float = 0.0,
        forget_weight: float = 0.125,
        retain: RetainTerm = "ce",
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        reference: ReferenceKind = "auto",
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
            retain=retain,
            retain_weight=retain_weight,
            decouple_weight=decouple_weight,
            reference=reference,
        )
        check_beta(beta)
        check_weight(forget_weight)
        self.beta, self.delta, self.forget_weight = beta, delta, forget_weight

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The loss of the rejected answers; positive."""
        forget = heard["forget"]
        each = sim_npo_loss(forget.found.losses().mean, self.beta, self.delta)
        return self.forget_weight * self.global_mean(each, forget.weight)
