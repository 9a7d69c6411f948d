"""HeadOnly: a new head on the old features, the control that a test of the logits cannot see."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.methods.base import GradientMethod, OptimizerName
from mmforget.methods.logit_mask import mask_classes, output_layers
from mmforget.models.base import HasFeatures, HasHead, HasLogits, HasLoss, Model
from mmforget.seeds import generator


class HeadOnly(GradientMethod):
    """Trains a newly drawn head on the retain set; everything below it is frozen.

    The logits forget, the features still hold everything: an audit that ranks this high measures
    logits only. Elsewhere known as EU-k with ``k = 1`` (S. Goel et al., *Towards Adversarial
    Evaluations for Inexact Machine Unlearning*, 2022, arXiv 2201.06640), with one difference: the
    rows of forgotten classes are masked in the end, as in `LogitMask`. Without it they can win
    although they never saw a positive example, since behind a normalisation the features of an
    unseen class lie opposite to those of the others; the shipped digit classifier kept 68 and 88 %
    of its forget accuracy in that way. Reads retain inputs and labels.

    Args:
        model, copy, seed, lr, lr_min, weight_decay, optimizer: see `GradientMethod`.

    Raises:
        CapabilityError: the head has no linear layer with a bias.
    """

    requires: ClassVar[tuple[type, ...]] = (HasLoss, HasLogits, HasHead)
    access: ClassVar[DataAccess] = DataAccess(forget_inputs=False, forget_labels=False)
    view: ClassVar[View | None] = "retain"
    control: ClassVar[bool] = True

    def __init__(
        self,
        model: Model,
        copy: bool | Literal["auto"] = "auto",
        seed: int = 0,
        lr: float = 1e-2,
        lr_min: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        super().__init__(
            model,
            copy=copy,
            seed=seed,
            lr=lr,
            lr_min=lr_min,
            weight_decay=weight_decay,
            optimizer=optimizer,
        )
        layers = output_layers("HeadOnly", self.model)
        self.model.requires_grad_(False)
        for number, layer in enumerate(layers):
            layer.requires_grad_(True)
            # Drawn on the CPU, so that every device starts from the same head.
            drawn = torch.empty(layer.weight.shape)
            nn.init.trunc_normal_(drawn, std=0.02, generator=generator(seed, "head", number))
            with torch.no_grad():
                layer.weight.copy_(drawn)
                # A detector's head begins by saying that nothing is there, which one number tells.
                layer.bias.fill_(layer.bias.mean())

    def on_train_epoch_start(self) -> None:
        """The frozen layers stay in eval mode: no dropout, no new BatchNorm statistics."""
        super().on_train_epoch_start()
        self.model.eval()

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Retain loss of the new head; where features can be had alone, without their graph."""
        features = None
        if isinstance(self.model, HasFeatures):
            with torch.no_grad():
                features = self.model.features(batch)
        loss = self.model.loss(batch, features=features)
        return {"retain": self.global_mean(loss, batch["weight"])}

    @torch.no_grad()
    def edit(self) -> None:
        """Mask the rows of forgotten classes, if the request names classes."""
        split = self.data.split
        if split is not None and split.forget_classes + split.previous_classes:
            mask_classes(self.model, split)
