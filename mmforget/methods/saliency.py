"""Training only the weights that a mask selects, and choosing them by their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, NoOpError, suggest

Freeze = Literal["strict", "grad_only"]


def check_mask(mask_fraction: float, freeze: str) -> None:
    """Refuse settings of a mask that have no meaning.

    Raises:
        ConfigurationError: names the setting and its value.
    """
    if not 0 < mask_fraction <= 1:
        raise ConfigurationError(
            f"`mask_fraction` is {mask_fraction}, it must be above 0 and at most 1"
        )
    if freeze not in ("strict", "grad_only"):
        raise ConfigurationError(
            f"`freeze` is '{freeze}', {suggest(freeze, ('strict', 'grad_only'))}"
        )


def most_salient(total: Tensor, fraction: float, method: str) -> Tensor:
    """Select the entries with the largest absolute values.

    Args:
        total: (P,) summed gradients.
        fraction: share to select, in (0, 1].
        method: name for the message.

    Returns:
        (P,) bool.

    Raises:
        NoOpError: all entries are 0.
    """
    saliency = total.abs()
    if not saliency.any():
        raise NoOpError(
            f"{method} would change nothing: no weight has a gradient on the forget set; "
            "check the forget set and which parameters are trainable"
        )
    below = len(saliency) - max(1, round(fraction * len(saliency)))
    if below == 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    return saliency > saliency.kthvalue(below).values


def flat_gradients(loss: Tensor, trained: Sequence[nn.Parameter]) -> Tensor:
    """Gradients of a loss as one vector (P,) in single precision; 0 where there is none."""
    found = torch.autograd.grad(loss, list(trained), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1).float()
            for p, g in zip(trained, found, strict=True)
        ]
    )


class MaskedTraining(LightningModule):
    """Mixin, before the method's base: gradients and, if strict, weights outside of `mask` stay.

    Weight decay and momentum move weights whose gradient is masked; ``freeze_mode="strict"`` puts
    them back after every step and clears their optimizer state.

    Attributes:
        mask: (P,) bool buffer over all trained parameters, one after another.
        freeze_mode: ``strict`` or ``grad_only``.
    """

    model: Any
    mask: Tensor
    freeze_mode: Freeze

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _masked(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Every trained parameter with its part of the mask, in its shape."""
        trained = self._trained()
        parts = self.mask.split([p.numel() for p in trained])
        return [(p, part.view_as(p)) for p, part in zip(trained, parts, strict=True)]

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
        with self.holding(optimizer):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    @contextmanager
    def holding(self, optimizer: Any, clear: bool = True) -> Iterator[None]:
        """Take a step inside; then, if strict, put frozen weights back.

        Args:
            optimizer: that takes the step.
            clear: set its state for these weights to 0; not if other steps train them.
        """
        kept = [p.detach().clone() for p in self._trained()]
        yield
        if self.freeze_mode == "grad_only":
            return
        with torch.no_grad():
            for (parameter, part), old in zip(self._masked(), kept, strict=True):
                parameter.copy_(torch.where(part, parameter, old))
                for value in optimizer.state.get(parameter, {}).values() if clear else ():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        value.mul_(part)
