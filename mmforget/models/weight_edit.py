"""A change of weights as a thing of its own: kept, scaled, stacked, exported, applied."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

FORMAT_VERSION = 1


@dataclass
class WeightEdit:
    """What a method changed in one network.

    Args:
        component: attribute of the pipeline that holds the network, ``unet`` or ``transformer``.
        factors: per layer name ``(up, down)`` of shapes (out, r) and (r, in): the weight changes by
            ``up @ down``. Empty for ``replace``.
        tensors: per parameter name its new value. Empty for ``lora``.
        metadata: plain data: method, version, concepts, base model and its hash, settings, seed.
    """

    component: str
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["lora", "replace"]:
        """``lora`` for low-rank factors, ``replace`` for whole parameters."""
        return "lora" if self.factors else "replace"
