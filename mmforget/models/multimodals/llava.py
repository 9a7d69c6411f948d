"""LLaVA 1.5: a CLIP tower, a two-layer projector and a language model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from mmforget.models.multimodals.base import MultimodalFamily

OLDER = "vision_tower.vision_model."
"""Where the first releases of transformers 5 keep what later ones have in the tower itself."""


class Llava(MultimodalFamily):
    """``LlavaForConditionalGeneration``. Every picture gives the same number of tokens."""

    name: ClassVar[str] = "LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    def vision_blocks(self, network: nn.Module) -> nn.ModuleList:
        """The blocks of the vision tower."""
        tower = self.vision_tower(network)
        inside: Any = getattr(tower, "vision_model", tower)
        blocks: nn.ModuleList = inside.encoder.layers
        return blocks

    def block(self, name: str) -> tuple[Literal["vision", "language"], int] | None:
        """The tower and the number of the block that a parameter lies in, or None."""
        return super().block(name.replace(OLDER, "vision_tower."))
