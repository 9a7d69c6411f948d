"""LLaVA 1.5: a CLIP tower, a two-layer projector and a language model."""

from __future__ import annotations

from typing import ClassVar

from mmforget.models.multimodals.base import MultimodalFamily


class Llava(MultimodalFamily):
    """``LlavaForConditionalGeneration``. Every picture gives the same number of tokens."""

    name: ClassVar[str] = "LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
