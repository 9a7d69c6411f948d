"""The training recipe that model families share: AdamW with warm-up and cosine."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmforget.errors import ConfigurationError


def check_recipe(lr: float, weight_decay: float, warmup: float) -> None:
    """Refuse settings of a recipe that have no meaning.

    Raises:
        ConfigurationError: names the setting and its value.
    """
    if not lr > 0:
        raise ConfigurationError(f"`lr` is {lr}, it must be positive")
    if not weight_decay >= 0:
        raise ConfigurationError(f"`weight_decay` is {weight_decay}, it must not be negative")
    if not 0 <= warmup < 1:
        raise ConfigurationError(f"`warmup` is {warmup}, it must lie in [0, 1)")


def adamw_with_cosine(
    network: nn.Module, lr: float, weight_decay: float, warmup: float, total_steps: int
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """The optimizer over all trainable parameters, and the scheduler to step after each step.

    Args:
        network: whose parameters are trained; those of one dimension without weight decay.
        lr: highest learning rate.
        weight_decay: decoupled.
        warmup: share of the steps in [0, 1) over which the rate rises from 0 to `lr`.
        total_steps: number of optimizer steps, at least 1.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    return optimizer, LambdaLR(optimizer, WarmupCosine(total_steps, warmup))


def steps_of(total: float) -> int:
    """The number of steps of a trainer.

    Raises:
        ConfigurationError: the trainer has no end.
    """
    if not math.isfinite(total):
        raise ConfigurationError(
            "the learning rate follows a cosine over all steps, but the trainer has no end; "
            "set `max_epochs` or `max_steps`"
        )
    return int(total)


class WarmupCosine:
    """Factor of the learning rate; a class, since a checkpoint cannot hold a local function."""

    def __init__(self, total_steps: int, warmup: float) -> None:
        self.total_steps = max(1, total_steps)
        self.rising = int(warmup * self.total_steps)

    def __call__(self, step: int) -> float:
        """Factor of the highest rate at a step."""
        if step < self.rising:
            return (step + 1) / (self.rising + 1)
        share = (step - self.rising) / max(1, self.total_steps - self.rising)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
