"""Retrain: the oracle, a model that never saw the forget set."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.methods.base import GradientMethod
from mmforget.models.base import HasLoss, Model
from mmforget.seeds import derive


class Retrain(GradientMethod):
    """Draws all weights anew and trains on the retain set with the model's own recipe.

    Optimizer, schedule and loss are those with which the original was trained; give the trainer the
    same number of epochs. The head keeps all its outputs. Reads retain inputs and labels; give it
    ``datamodule.unlimited()``, since the reference learns from all retained data.

    Much published code "retrains" by resetting the direct children of the network that have a
    ``reset_parameters``, which is the last layer only: a warm start from the model that knew
    everything. Here nothing is inherited.

    Args:
        model: the original; it gives the architecture and the recipe, and is never changed.
        seed: decides the new weights and the order of the data.

    Raises:
        ModelError: the network was given as an object, so that it cannot be built again.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss,)
    access: ClassVar[DataAccess] = DataAccess(forget_inputs=False, forget_labels=False)
    view: ClassVar[View | None] = "retain"

    def __init__(self, model: Model, seed: int = 0) -> None:
        super().__init__(model, copy=False, seed=seed, freeze_bn=False)
        self.model = model.fresh(seed)
        self.copied = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Key what training draws, such as the noise of denoised objects, by step."""
        torch.manual_seed(
            derive(self.seed, "retrain", self.current_epoch, batch_idx, self.global_rank)
        )

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """What the model was trained with, on retained samples."""
        return {"retain": self.global_mean(self.model.training_loss(batch), batch["weight"])}

    def configure_optimizers(self) -> Any:
        """The model's own optimizer and schedule."""
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self.model.optimizers_for(steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
