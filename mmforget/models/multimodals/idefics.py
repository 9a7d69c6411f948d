"""Idefics3 and SmolVLM: a SigLIP tower and pixel shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.models.multimodals.base import Inputs, MultimodalFamily


class Idefics(MultimodalFamily):
    """``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``.

    ``pixel_values`` are (B, tiles, 3, S, S). Large pictures are cut into tiles, and a small copy
    of the whole comes last; padding tiles are black and skipped by the network.
    """

    name: ClassVar[str] = "Idefics3 and SmolVLM"
    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    language: ClassVar[str] = "model.text_model"
    vision: ClassVar[str] = "model.vision_model"
    blocks: ClassVar[str] = "model.vision_model.encoder.layers"
    projector: ClassVar[str] = "model.connector"
    nested_pictures: ClassVar[bool] = True

    def vision_inputs(self, inputs: Inputs) -> dict[str, Any]:
        """The tiles, and which of their pixels are no padding."""
        mask = inputs.get("pixel_attention_mask")
        known = {"pixel_values": inputs["pixel_values"]}
        return known if mask is None else known | {"pixel_attention_mask": mask}

    def split_pooled(
        self, network: Any, inputs: Inputs, pooled: Tensor | Sequence[Tensor]
    ) -> list[Tensor]:
        """By tile; transformers splits by row of the batch, which may hold several."""
        tokens = self.tokens_of(network, self.raw_grids(network, inputs, 1)[0])
        joined = torch.cat([part.reshape(-1, part.shape[-1]) for part in pooled])
        return list(joined.split(tokens))

    def tokens_of(self, network: Any, raw: tuple[int, int]) -> int:
        """After pixel shuffle."""
        return raw[0] * raw[1] // int(network.config.scale_factor) ** 2

    def picture_frame(self, network: Any, processor: Any) -> tuple[list[int], list[int]]:
        """The token around pictures, and the one that says that it is the whole picture."""
        whole = getattr(processor, "global_image_tag", None) or processor.global_image_token
        tokens = [processor.fake_image_token, str(whole)]
        around, tag = processor.tokenizer.convert_tokens_to_ids(tokens)
        return [around, tag], [around]
