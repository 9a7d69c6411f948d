"""InternVL: a tower with class token, pixel shuffle and a projector."""

from __future__ import annotations

from typing import ClassVar

from mmforget.models.multimodals.base import MultimodalFamily


class InternVL(MultimodalFamily):
    """``InternVLForConditionalGeneration``. Large pictures are cut into tiles."""

    name: ClassVar[str] = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    blocks: ClassVar[str] = "model.vision_tower.encoder.layer"
