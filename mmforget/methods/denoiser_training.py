"""What the methods that train a denoiser share: precision, schedule, clipping, and the edit."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from mmforget import __version__
from mmforget.errors import ConfigurationError
from mmforget.methods.base import GradientMethod, OptimizerName
from mmforget.models.base import state_hash
from mmforget.models.weight_edit import WeightEdit, base_facts


class DenoiserTraining(GradientMethod):
    """Base of the methods that train parameters of the denoiser by gradient steps.

    The trained weights and the optimizer work in single precision. If the rest of the network is in
    half precision, which needs a GPU, passes run under autocast, and `finalize` returns the type
    that was given. The learning rate falls to a tenth along a cosine over all steps.

    Subclasses call `prepare` at the end of their constructors.
    """

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Parameters of the denoiser that are trained; never empty. Called once, by `prepare`."""

    def prepare(
        self, lr: float, weight_decay: float, optimizer: OptimizerName, clip: float
    ) -> None:
        """Choose and unfreeze what is trained.

        Args:
            lr: learning rate at the start.
            weight_decay: see `GradientMethod`.
            optimizer: see `GradientMethod`.
            clip: largest norm of a step's gradient, unless the trainer has a `gradient_clip_val`.

        Raises:
            ConfigurationError: a setting out of range.
            ModelError: half precision on the CPU.
        """
        self.check_training(lr, optimizer)
        if not clip > 0:
            raise ConfigurationError(f"`clip` is {clip}, it must be positive")
        self.model.require_full_precision(f"{type(self).__name__}")
        self.lr, self.lr_min, self.weight_decay, self.clip = lr, lr / 10, weight_decay, clip
        self.optimizer_name, self.freeze_bn = optimizer, True
        self._base_hash = state_hash(self.model.network)
        self._type: torch.dtype = self.model.dtype_of_network
        self.model.requires_grad_(False)
        trained = {id(parameter) for parameter in self.trained()}
        self._names: list[str] = []
        self.trained_parameters = 0
        for name, parameter in self.model.network.named_parameters():
            if id(parameter) in trained:
                self._names.append(name)
                self.trained_parameters += parameter.numel()
                parameter.requires_grad_(True)
                if self._half:
                    parameter.data = parameter.data.float()

    @property
    def _half(self) -> bool:
        return self._type in (torch.float16, torch.bfloat16)

    def _autocast(self) -> Any:
        if not self._half:
            return contextlib.nullcontext()
        return torch.autocast(self.trainer.strategy.root_device.type, self._type)

    def on_train_epoch_start(self) -> None:
        """Denoisers train in eval mode, since dropout would blur what they answer."""
        self.model.eval()

    def teardown(self, stage: str) -> None:
        """Nothing to lift: there is no data module."""

    def configure_optimizers(self) -> Any:
        """The optimizer with a cosine over all steps instead of epochs."""
        settings = super().configure_optimizers()
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            settings["optimizer"], steps, self.lr_min
        )
        settings["lr_scheduler"] = {"scheduler": schedule, "interval": "step"}
        return settings

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the method's norm, unless the trainer has one."""
        if gradient_clip_val is None:
            gradient_clip_val, gradient_clip_algorithm = self.clip, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def metadata(self) -> dict[str, Any]:
        """Where a weight edit comes from: base model, method, request and seed, as plain data."""
        return {
            **base_facts(self.model, self._base_hash),
            "method": type(self).__name__,
            "method_version": __version__,
            "seed": self.seed,
            **self.statistics(),
        }

    def edit(self) -> None:
        """Give the trained parameters the type of the network again."""
        if self._half:
            for name in self._names:
                parameter = self.model.network.get_parameter(name)
                parameter.data = parameter.data.to(self._type)

    def weight_edit(self) -> WeightEdit:
        """The trained parameters, whole."""
        network = self.model.network
        return WeightEdit(
            self.model.component,
            tensors={name: network.get_parameter(name).detach().clone() for name in self._names},
            metadata=self.metadata(),
        )
