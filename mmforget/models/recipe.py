"""What families that are trained on labelled images share: AdamW with warm-up and cosine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmforget.errors import ConfigurationError
from mmforget.models.base import Batch, Model
from mmforget.models.native import to_device_of
from mmforget.seeds import derive


class TrainedModel(Model):
    """A family that is trained from scratch on labelled images, by one recipe.

    Attributes:
        lr: highest learning rate of AdamW.
        weight_decay: decoupled, for weights of at least two dimensions.
        warmup: share of the steps in [0, 1) over which the rate rises from 0 to `lr`; it then
            follows a cosine down to 0.
    """

    lr: float
    weight_decay: float
    warmup: float

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean `training_loss` over the samples of a batch of the view ``full`` or ``retain``.

        The mean is that of the batch of all processes, whose gradients are averaged.
        """
        weight = batch["weight"]
        total = self.trainer.strategy.reduce(weight.sum(), reduce_op="sum").clamp(min=1)
        loss: Tensor = self.trainer.world_size * (self.training_loss(batch) * weight).sum() / total
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(weight))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW whose rate changes after every step; see `optimizers_for`."""
        steps = steps_of(self.trainer.estimated_stepping_batches)
        optimizer, scheduler = self.optimizers_for(steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizers_for(self, total_steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        """The recipe of this model for a given number of steps; needs no trainer.

        Args:
            total_steps: number of optimizer steps, at least 1.

        Returns:
            The optimizer over all trainable parameters, and the scheduler to step after each step.
        """
        return adamw_with_cosine(self.network, self.lr, self.weight_decay, self.warmup, total_steps)

    def role_of(self, stage: str, loader: int) -> str:
        """``/`` and the role that a validation or test loader serves; empty for a single one."""
        loaders = getattr(self.trainer, f"{stage}_dataloaders")
        if not isinstance(loaders, list | tuple) or len(loaders) == 1:
            return ""
        data: Any = getattr(self.trainer, "datamodule", None)
        names = data.eval_names(stage) if hasattr(data, "eval_names") else range(len(loaders))
        return f"/{names[loader]}"

    def with_network(self, seed: int, build: Callable[[], nn.Module]) -> Self:
        """Copy everything but the network, which is built anew; in training mode.

        Args:
            seed: decides the weights; the global random generator is left as it is.
            build: makes the network, on the CPU.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "fresh"))
            network = build()
        to_device_of(network, self.network)
        # the trainer stays with this model
        kept: dict[int, Any] = {id(self.network): network}
        if self._trainer is not None:
            kept[id(self._trainer)] = None
        return copy.deepcopy(self, kept).train()


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
