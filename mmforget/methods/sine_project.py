"""SineProject: the projector may only move by sines, so that it stays near where it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmforget.errors import CapabilityError
from mmforget.methods.answer_unlearning import AnswerUnlearning
from mmforget.methods.low_rank import LowRankAdapters
from mmforget.methods.preference_optimization import PreferenceOptimization


class Sine(nn.Module):
    """``W + sin(D)`` with a frozen ``W``, for `torch.nn.utils.parametrize`.

    Args:
        weight: ``W``.
    """

    base: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("base", weight.detach().clone())

    def forward(self, change: Tensor) -> Tensor:
        """The weight of a change ``D``."""
        return self.base + change.sin()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The change at which training starts: none."""
        return torch.zeros_like(weight)


class SineProjection(AnswerUnlearning):
    """Mixin, before any method on answers: matrices of the projector train as ``W + sin(D)``."""

    def _prepare(self, *given: Any) -> LowRankAdapters | None:
        """Choose what is trained, then put sines into the projector's matrices."""
        adapters = super()._prepare(*given)
        network = self.model.network
        self.bounded = [
            module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and self._part(name) == "projector"
        ]
        if not self.bounded:
            raise CapabilityError(
                f"{type(self).__name__} needs linear layers in the projector, but "
                f"{type(network).__name__} has none there; use another method"
            )
        for module in self.bounded:
            parametrize.register_parametrization(module, "weight", Sine(module.weight))
            for parameter in module.parameters():
                parameter.requires_grad_(True)
        return adapters

    @torch.no_grad()
    def edit(self) -> None:
        """Bring the sines into the weights."""
        super().edit()
        for module in self.bounded:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            module.register_parameter("bias", module._parameters.pop("bias"))  # after the weight


class SineProject(SineProjection, PreferenceOptimization):
    """`PreferenceOptimization` whose projector is trained as ``W + sin(D)``.

    Every entry of the matrices of the projector can move by at most 1, and the less the further it
    has gone, so that pictures and words stay aligned while the language model learns to refuse. The
    matrices of the projector are always trained, and their biases; what else is, `trained` says.
    The published setting is that of SafeEraser, with Prompt Decouple. ``D`` starts at 0 (there: at
    small random numbers), so that training starts at the original model. `SineProjection` does the
    same for the other methods. Reads forget inputs and a part of the retain data.

    Args:
        (all of `PreferenceOptimization`)

    Reference:
        A. Garg, H. Saratchandran, S. Lucey: SineProject: Machine Unlearning for Stable Vision
        Language Alignment, CVPR 2026, arXiv 2511.18444.
    """
