"""Gradient difference: ascent on the forget set and descent on the retain set at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.methods.answer_losses import SequenceNorm, ascent
from mmforget.methods.answer_unlearning import AnswerUnlearning, DecoupleWeight, Heard
from mmforget.methods.base import OptimizerName
from mmforget.methods.gradient_ascent import check_bound
from mmforget.models.base import Model
from mmforget.models.multimodals.base import Part


class GradDiff(AnswerUnlearning):
    """Minimises ``-forget_weight * CE(forget) + retain_weight * CE(retain)``.

    Both come from one forward pass; the shorter stream is cycled. Published code (MLLMU-Bench)
    passes over the whole forget set first and over the whole retain set then. Reads forget inputs
    and labels and a part of the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, seq_norm: see `AnswerUnlearning`.
        forget_weight: positive.
        max_forget_loss: see `GradientAscent`.
        retain_weight: ``auto`` is 1, and 0.5 with Prompt Decouple, as in the code of SafeEraser.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 0.5.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: a setting out of range.

    Reference:
        B. Liu, Q. Liu, P. Stone: Continual Learning and Private Unlearning, CoLLAs 2022,
        arXiv 2203.12817. For multimodal language models: Z. Liu et al.: Protecting Privacy in
        Multimodal Large Language Models with MLLMU-Bench, NAACL 2025, arXiv 2410.22108.
    """

    published_decouple_weight: ClassVar[float] = 0.5

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
        forget_weight: float = 1.0,
        max_forget_loss: float | None = None,
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        seq_norm: SequenceNorm = "batch_token",
    ) -> None:
        if retain_weight == "auto":
            retain_weight = 0.5 if decouple_weight else 1.0
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
        check_bound(max_forget_loss)
        check_weight(forget_weight)
        self.forget_weight, self.max_forget_loss = forget_weight, max_forget_loss

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The negated loss, bounded if wanted."""
        forget = heard["forget"]
        losses = ascent(forget.found.losses(), self.max_forget_loss)
        return self.forget_weight * self.mean(losses, forget.weight)


def check_weight(forget_weight: float) -> None:
    """Refuse a forget term that does not forget.

    Raises:
        ConfigurationError: names the value.
    """
    if not forget_weight > 0:
        raise ConfigurationError(f"`forget_weight` is {forget_weight}, it must be positive")
