"""KL minimisation: ascent on the forget set, and the rest answered as the original does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mmforget.methods.answer_losses import SequenceNorm, ascent
from mmforget.methods.answer_unlearning import AnswerUnlearning, DecoupleWeight, Heard
from mmforget.methods.base import OptimizerName
from mmforget.methods.gradient_ascent import check_bound
from mmforget.methods.reference import ReferenceKind
from mmforget.models.base import Model
from mmforget.models.multimodals.base import Part


class KLMinimization(AnswerUnlearning):
    """Minimises ``-CE(forget) + retain_weight * KL(original || model)`` on the retain set.

    The divergence is that of the whole vocabulary at every labelled token of the true answers, and
    its mean is over these tokens only. (Public code averages over all positions, or sums over them,
    so that placeholders of pictures and padding count.) Reads forget inputs and labels and a part
    of the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, seq_norm, reference: see `AnswerUnlearning`.
        max_forget_loss: see `GradientAscent`.
        retain_weight: of the divergence; ``auto`` is 1.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: a setting out of range.

    Reference:
        P. Maini et al.: TOFU: A Task of Fictitious Unlearning for LLMs, COLM 2024,
        arXiv 2401.06121 (there as KL minimization).
    """

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
        max_forget_loss: float | None = None,
        retain_weight: float | Literal["auto"] = "auto",
        decouple_weight: DecoupleWeight = None,
        seq_norm: SequenceNorm = "batch_token",
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
            retain="kl",
            retain_weight=retain_weight,
            decouple_weight=decouple_weight,
            seq_norm=seq_norm,
            reference=reference,
        )
        check_bound(max_forget_loss)
        self.max_forget_loss = max_forget_loss

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The negated loss, bounded if wanted."""
        forget = heard["forget"]
        return self.mean(ascent(forget.found.losses(), self.max_forget_loss), forget.weight)
