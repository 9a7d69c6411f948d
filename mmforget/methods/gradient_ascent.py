"""Gradient ascent: raise the loss of what is to be forgotten, and do nothing for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.errors import ConfigurationError
from mmforget.methods.answer_losses import SequenceNorm, ascent
from mmforget.methods.answer_unlearning import AnswerUnlearning, DecoupleWeight, Heard
from mmforget.methods.base import OptimizerName
from mmforget.models.base import Model
from mmforget.models.multimodals.base import Part


class GradientAscent(AnswerUnlearning):
    """Maximises the loss of the answers that are to be forgotten, ``-CE(forget)``.

    The loss has no bound, and nothing holds the rest: the model is soon destroyed. A baseline, and
    the first part of other methods. Reads forget inputs and labels; with Prompt Decouple a part of
    the retain data too.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, seq_norm: see `AnswerUnlearning`.
        max_forget_loss: loss per token, in nats, from which on an answer has no gradient any more;
            None: no bound. ``ln V`` is that of a guess among V tokens.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 0.5.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: a setting out of range.

    Reference:
        J. Jang et al.: Knowledge Unlearning for Mitigating Privacy Risks in Language Models,
        ACL 2023, arXiv 2210.01504. As a baseline: P. Maini et al.: TOFU: A Task of Fictitious
        Unlearning for LLMs, COLM 2024, arXiv 2401.06121.
    """

    access: ClassVar[DataAccess] = DataAccess(retain="none")
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
        max_forget_loss: float | None = None,
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
            retain="none",
            decouple_weight=decouple_weight,
            seq_norm=seq_norm,
        )
        check_bound(max_forget_loss)
        self.max_forget_loss = max_forget_loss

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The negated loss, bounded if wanted."""
        forget = heard["forget"]
        return self.mean(ascent(forget.found.losses(), self.max_forget_loss), forget.weight)


def check_bound(max_forget_loss: float | None) -> None:
    """Refuse a bound that is never open.

    Raises:
        ConfigurationError: names the value.
    """
    if max_forget_loss is not None and not max_forget_loss > 0:
        raise ConfigurationError(
            f"`max_forget_loss` is {max_forget_loss}, it must be positive or None"
        )
