"""LogitMask: never answer with a forgotten class, and forget nothing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from mmforget.data.access import DataAccess
from mmforget.data.base import View
from mmforget.data.split import ForgetSplit
from mmforget.errors import CapabilityError, RequestError
from mmforget.methods.base import ForgettingMethod
from mmforget.models.base import HasHead, HasLogits, Model

MASKED = -1e4  # fits into float16, and its softmax is exactly zero


class LogitMask(ForgettingMethod):
    """Sets the head's rows of all forgotten classes to weight 0 and bias -10,000.

    The mask lies in the weights, so that the result loads natively. Features are untouched: this
    control must fail every audit that looks behind the logits. Classes of earlier requests are
    masked too. Reads no data, only the request, which must name classes. There is no training:
    ``method.bind(datamodule)``, then ``method.finalize()``.

    Args:
        model, copy, seed: see `ForgettingMethod`.

    Raises:
        CapabilityError: the head is not made of linear layers with a bias.
        RequestError: the request names samples (by `finalize`).
    """

    requires: ClassVar[tuple[type, ...]] = (HasLogits, HasHead)
    access: ClassVar[DataAccess] = DataAccess(
        forget_inputs=False, forget_labels=False, retain="none", retain_labels=False
    )
    view: ClassVar[View | None] = None
    control: ClassVar[bool] = True

    def __init__(self, model: Model, copy: bool | Literal["auto"] = "auto", seed: int = 0) -> None:
        super().__init__(model, copy=copy, seed=seed)
        output_layers("LogitMask", self.model)

    @torch.no_grad()
    def edit(self) -> None:
        """Mask the classes of the current request and of all earlier ones."""
        split = self.data.split
        if split is None or not split.forget_classes:
            raise RequestError(
                "LogitMask masks classes, but the request names none; use it with a request for "
                "`classes`"
            )
        mask_classes(self.model, split)


def mask_classes(model: Model, split: ForgetSplit) -> None:
    """Set the rows of all forgotten classes to weight 0 and bias -10,000, in place."""
    layer: Any
    for layer, rows in model.class_rows(split.forget_classes + split.previous_classes):
        layer.weight[rows] = 0
        layer.bias[rows] = MASKED


def output_layers(method: str, model: Model) -> list[Any]:
    """The layers of a model's head that give class scores, at least one, all with a bias.

    Raises:
        CapabilityError: the head has none, or one without a bias.
    """
    layers: list[Any] = [layer for layer, _ in model.class_rows((0,))]
    if not layers:
        head: Any = model.head
        raise CapabilityError(
            f"{method} needs a linear head, but that of {type(model).__name__} is a "
            f"{type(head).__name__}; choose another method"
        )
    if any(layer.bias is None for layer in layers):
        raise CapabilityError(
            f"{method} needs a bias in the head, which that of {type(model).__name__} does not "
            "have; leave out this control"
        )
    return layers
