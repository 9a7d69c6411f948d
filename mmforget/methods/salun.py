"""SalUn: random labels, learned only by the weights that are salient for the forget set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.errors import ConfigurationError, NoOpError, suggest
from mmforget.methods.base import OptimizerName, samples
from mmforget.methods.random_labels import RandomLabels
from mmforget.models.base import HasLogits, HasLoss, Model


class SalUn(RandomLabels):
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
        freeze: Literal["strict", "grad_only"] = "strict",
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
        if not 0 < mask_fraction <= 1:
            raise ConfigurationError(
                f"`mask_fraction` is {mask_fraction}, it must be above 0 and at most 1"
            )
        if freeze not in ("strict", "grad_only"):
            raise ConfigurationError(
                f"`freeze` is '{freeze}', {suggest(freeze, ('strict', 'grad_only'))}"
            )
        self.mask_fraction, self.freeze_mode = mask_fraction, freeze
        size = sum(p.numel() for p in self._trained())
        # A buffer, so that a resumed run has it; all False means that it is not made yet.
        self.register_buffer("mask", torch.zeros(size, dtype=torch.bool))

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _masked(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every trained parameter with its part of the mask, in its shape."""
        trained = self._trained()
        parts = self.mask.split([p.numel() for p in trained])
        return [(p, part.view_as(p)) for p, part in zip(trained, parts, strict=True)]

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
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            total += torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1).float()
                    for p, g in zip(trained, found, strict=True)
                ]
            )
            self.spend(forget=samples(moved), backward=True)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        saliency = total.abs()
        if not saliency.any():
            raise NoOpError(
                "SalUn would change nothing: no weight has a gradient on the forget set; "
                "check the forget set and which parameters are trainable"
            )
        below = len(saliency) - max(1, round(self.mask_fraction * len(saliency)))
        if below == 0:
            return torch.ones_like(self.mask)
        return saliency > saliency.kthvalue(below).values

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the gradients."""
        for parameter, part in self._masked():
            if parameter.grad is not None:
                parameter.grad.mul_(part)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step; then, if strict, put frozen weights back and clear their optimizer state."""
        kept = [p.detach().clone() for p in self._trained()]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.freeze_mode == "grad_only":
            return
        with torch.no_grad():
            for (parameter, part), old in zip(self._masked(), kept, strict=True):
                parameter.copy_(torch.where(part, parameter, old))
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.mul_(part)

    def statistics(self) -> dict[str, Any]:
        """Share of the weights that were trained."""
        return {"mask_fraction": float(self.mask.double().mean()), "freeze": self.freeze_mode}
