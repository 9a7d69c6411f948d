"""DPO: prefer refusals to the answers that are to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

from torch import Tensor

from mmforget.methods.answer_losses import dpo_loss
from mmforget.methods.answer_unlearning import (
    AnswerUnlearning,
    DecoupleWeight,
    Heard,
    RetainTerm,
)
from mmforget.methods.base import OptimizerName
from mmforget.methods.grad_diff import check_weight
from mmforget.methods.npo import check_beta
from mmforget.methods.preference_optimization import REFUSALS, checked_refusals, refused
from mmforget.methods.reference import ReferenceKind
from mmforget.models.base import Batch, Model
from mmforget.models.multimodal import AnswerLogits
from mmforget.models.multimodals.base import Part


class DPO(AnswerUnlearning):
    r"""Direct preference optimisation with refusals as the preferred answers.

    ::

        L = forget_weight * mean [-(2 / beta) log sigmoid(beta (r(refusal) - r(answer)))]
            + retain_weight * retain term

    with ``r = nll_original - nll`` the log ratio to the original model, sums over the tokens of an
    answer. Every forgotten sample goes through both models twice. Reads forget inputs and labels
    and a part of the retain data.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.
        trained, rank, lora_alpha, retain, reference: see `AnswerUnlearning`.
        refusals: at least one text; drawn anew at every step.
        beta: positive (TOFU: 0.1).
        forget_weight: positive.
        retain_weight: ``auto`` is 1.
        decouple_weight: see `AnswerUnlearning`; ``auto`` is 1.

    Raises:
        CapabilityError: the model answers no questions.
        ConfigurationError: no refusal, or a setting out of range.

    Reference:
        R. Rafailov et al.: Direct Preference Optimization: Your Language Model is Secretly a Reward
        Model, NeurIPS 2023, arXiv 2305.18290; for unlearning: R. Zhang et al., COLM 2024,
        arXiv 2404.05868.
    """

    needs_reference: ClassVar[frozenset[str]] = frozenset({"forget", "refusal"})

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
        beta: float = 0.1,
        forget_weight: float = 1.0,
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
        self.refusals = checked_refusals(refusals)
        self.beta, self.forget_weight = beta, forget_weight

    def streams(self, batch: Any) -> dict[str, Batch]:
        """The batches, and the forget stream once more with refusals as answers."""
        found = super().streams(batch)
        step = int(self.global_step)
        return found | {"refusal": refused(found["forget"], self.refusals, self.seed, step)}

    def forget_term(self, heard: Mapping[str, Heard]) -> Tensor:
        """The loss of refusals against answers; positive."""
        refusal, forget = (heard[name] for name in ("refusal", "forget"))
        before = [cast(AnswerLogits, one.before).losses().total for one in (refusal, forget)]
        each = dpo_loss(
            refusal.found.losses().total,
            forget.found.losses().total,
            (before[0], before[1]),
            self.beta,
        )
        return self.forget_weight * self.global_mean(each, forget.weight)
