"""InternVL: a tower with class token, pixel shuffle and a projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.models.multimodals.base import MultimodalFamily


class InternVL(MultimodalFamily):
    """``InternVLForConditionalGeneration``. Large pictures are cut into tiles."""

    name: ClassVar[str] = "InternVL"
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    blocks: ClassVar[str] = "model.vision_tower.encoder.layer"

    def tokens_of(self, network: Any, raw: tuple[int, int]) -> int:
        """After pixel shuffle."""
        return round(raw[0] * raw[1] * float(network.config.downsample_ratio) ** 2)

    def encoder_outputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Ready visual features in one tensor, which is what this network takes."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        even = len({len(one) for one in features}) == 1
        joined = torch.stack(list(features)) if even else torch.cat(list(features))
        return {"image": BaseModelOutputWithPooling(pooler_output=joined)}  # type: ignore[arg-type]

    def picture_frame(self, network: Any, processor: Any) -> tuple[list[int], list[int]]:
        """The tokens that open and close a picture."""
        return [int(processor.start_image_token_id)], [int(processor.end_image_token_id)]
