"""NegGrad+: descend on the retain set and ascend on the forget set in the same step."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.errors import ConfigurationError
from mmforget.methods.base import GradientMethod, OptimizerName, joined
from mmforget.models.base import HasLoss, Model


class NegGradPlus(GradientMethod):
    """Minimises ``alpha * L(retain) - (1 - alpha) * L(forget)`` over all trainable weights.

    Where the loss has parts that are no recognition, such as the boxes of a detector, these are
    learnt on for the forget set too. The forget term has no bound: too small an `alpha` or too many
    epochs destroy the model. Both streams go through one forward pass; the shorter one is cycled.
    (A known implementation leaves out every step in which the two batches differ in size, and
    weighs both terms alike.) Reads forget and retain inputs and labels.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer, freeze_bn: see `GradientMethod`.
        alpha: weight of the retain loss, in (0, 1); 0.95 for small models in the paper's code.

    Reference:
        M. Kurmanji, P. Triantafillou, J. Hayes, E. Triantafillou: Towards Unbounded Machine
        Unlearning, NeurIPS 2023, arXiv 2302.09880 (there as the baseline NegGrad+).
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss,)
    access: ClassVar[DataAccess] = DataAccess()

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        freeze_bn: bool = True,
        alpha: float = 0.95,
    ) -> None:
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
            freeze_bn=freeze_bn,
        )
        if not 0 < alpha < 1:
            raise ConfigurationError(f"`alpha` is {alpha}, it must lie between 0 and 1")
        self.alpha = alpha

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Weighted retain loss and negated forget loss, from one forward pass."""
        both, n_forget = joined(batch)
        loss, weight = self.model.loss_parts(both), both["weight"]
        gone = weight[:n_forget]
        terms = {
            "retain": self.alpha * self.global_mean(loss.total[n_forget:], weight[n_forget:]),
            "forget": (self.alpha - 1) * self.global_mean(loss.recognition[:n_forget], gone),
        }
        if loss.rest is not None:
            terms["forget_rest"] = (1 - self.alpha) * self.global_mean(loss.rest[:n_forget], gone)
        return terms
