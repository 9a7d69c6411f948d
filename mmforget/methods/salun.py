"""SalUn: random labels, learned only by the weights that are salient for the forget set."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.methods.base import OptimizerName, samples
from mmforget.methods.random_labels import RandomLabels
from mmforget.methods.saliency import (
    Freeze,
    MaskedTraining,
    check_mask,
    flat_gradients,
    most_salient,
)
from mmforget.models.base import HasLogits, HasLoss, Model


class SalUn(MaskedTraining, RandomLabels):
    """`RandomLabels` in which the less salient weights stay as they are.

    Saliency is ``|sum_i grad L(x_i, y_i)|`` over the forget set at the original weights in eval
    mode: absolute value *after* the sum, and a sum over samples, so that it does not depend on the
    batch size. The share `mask_fraction` of all weights with the largest saliency is trained.
    Reads forget and retain inputs and labels; the pass for the mask is counted in the cost.

    Until 2026-02-28 the released code masked gradients only, so that weight decay and momentum
    still moved the "frozen" weights. ``freeze="strict"`` restores them after every step and clears
    their optimizer state; ``grad_only`` reproduces the old behaviour.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer, freeze_bn: see `GradientMethod`.
        exclude_true, resample, forget_weight: see `RandomLabels`.
        mask_fraction: share of the weights that is trained, in (0, 1]; 0.5 in the paper.
        freeze: see above.

    Raises:
        NoOpError: no weight is salient.

    Reference:
        C. Fan, J. Liu, Y. Zhang, E. Wong, D. Wei, S. Liu: SalUn: Empowering Machine Unlearning via
        Gradient-based Weight Saliency, ICLR 2024, arXiv 2310.12508.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasLogits)
    access: ClassVar[DataAccess] = DataAccess()

    mask: Tensor

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 3e-4,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
        freeze_bn: bool = True,
        exclude_true: bool = True,
        resample: bool = True,
        forget_weight: float = 0.1,
        mask_fraction: float = 0.5,
        freeze: Freeze = "strict",
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
            exclude_true=exclude_true,
            resample=resample,
            forget_weight=forget_weight,
        )
        check_mask(mask_fraction, freeze)
        self.mask_fraction, self.freeze_mode = mask_fraction, freeze
        size = sum(p.numel() for p in self._trained())
        # A buffer, so that a resumed run has it; all False means that it is not made yet.
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool))

    def on_train_start(self) -> None:
        """Make the mask, once, at the original weights."""
        if not self.mask.any():
            self.mask.copy_(self._salient())

    def _salient(self) -> Tensor:
        """The mask as one vector: the largest absolute sums of gradients over the forget set."""
        self.model.eval()
        trained = self._trained()
        total = torch.zeros(len(self.mask), device=self.mask.device)
        data = self.data
        for batch in data.loader(data.subset("train", "forget")):
            moved = {k: v.to(self.device) for k, v in batch.items()}
            loss = (self.model.loss(moved) * moved["weight"]).sum()
            total += flat_gradients(loss, trained)
            self.spend(forget=samples(moved), backward=True)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return most_salient(total, self.mask_fraction, "SalUn")

    def statistics(self) -> dict[str, Any]:
        """Share of the weights that were trained."""
        return {"mask_fraction": float(self.mask.double().mean()), "freeze": self.freeze_mode}
