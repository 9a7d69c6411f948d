"""Qwen2-VL and Qwen2.5-VL: pictures of any size, rotary positions in three dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmforget.models.multimodals.base import Inputs, MultimodalFamily


class QwenVL(MultimodalFamily):
    """``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``.

    Patches of all pictures lie one after another in ``pixel_values``; ``image_grid_thw`` says
    where they end, and ``mm_token_type_ids`` which tokens are visual. The blocks of Qwen2.5-VL see
    the patches of a window at a time, so their order within a picture is not that of the rows.
    """

    name: ClassVar[str] = "Qwen2-VL and Qwen2.5-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    vision: ClassVar[str] = "model.visual"
    blocks: ClassVar[str] = "model.visual.blocks"
    projector: ClassVar[str] = "model.visual.merger"

    def vision_inputs(self, inputs: Inputs) -> dict[str, Any]:
        """The patches and the grids of the pictures."""
        return {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}

    def raw_grids(self, network: Any, inputs: Inputs, pictures: int) -> list[tuple[int, int]]:
        """(h, w) of the patches of every picture."""
        return [(h, w) for _, h, w in inputs["image_grid_thw"].tolist()]

    def split_states(
        self, network: Any, states: Tensor, grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Hidden states of a block (sum of M, Dv) by picture, in the order of rows and columns."""
        tower = self.vision_tower(network)
        merge = int(tower.spatial_merge_size)
        order = window_order(tower, grids)
        if order is not None:  # groups of merge x merge patches were sorted by window
            groups = states.reshape(-1, merge * merge, states.shape[-1])
            states = groups[order.argsort().to(states.device)].reshape(-1, states.shape[-1])
        sizes = [h * w for h, w in grids]
        found = []
        for one, (h, w) in zip(states.split(sizes), grids, strict=True):
            blocks = one.reshape(h // merge, w // merge, merge, merge, -1)
            found.append(blocks.permute(0, 2, 1, 3, 4).reshape(h * w, -1))
        return found

    def grid_of(self, network: Any, tokens: int, raw: tuple[int, int]) -> tuple[int, int]:
        """(h, w) after merging."""
        merge = int(self.vision_tower(network).spatial_merge_size)
        return (raw[0] // merge, raw[1] // merge)

    def tokens_of(self, network: Any, raw: tuple[int, int]) -> int:
        """After merging."""
        return raw[0] * raw[1] // int(self.vision_tower(network).spatial_merge_size) ** 2

    def picture_frame(self, network: Any, processor: Any) -> tuple[list[int], list[int]]:
        """The tokens that open and close a picture."""
        config = network.config
        return [int(config.vision_start_token_id)], [int(config.vision_end_token_id)]

    def grid_inputs(self, network: Any, grids: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """``image_grid_thw``, which counts patches before merging."""
        if not grids:
            return {}
        merge = int(self.vision_tower(network).spatial_merge_size)
        return {"image_grid_thw": torch.tensor([[1, h * merge, w * merge] for h, w in grids])}

    def position_ids(self, network: Any, inputs: Inputs) -> Tensor | None:
        """Time, row and column of every token; words count in all three."""
        index = network.model.get_rope_index
        known = {
            "image_grid_thw": inputs.get("image_grid_thw"),
            "attention_mask": inputs["attention_mask"],
        }
        if "mm_token_type_ids" in inspect.signature(index).parameters:  # not in the first releases
            known["mm_token_type_ids"] = self.visual_mask(network, inputs["input_ids"]).int()
        positions: Tensor = index(inputs["input_ids"], **known)[0]
        return positions


def window_order(tower: Any, grids: Sequence[tuple[int, int]]) -> Tensor | None:
    """The order in which a tower with windows goes through its groups of patches, else None."""
    if not getattr(tower, "fullatt_block_indexes", None):
        return None
    thw = torch.tensor([[1, h, w] for h, w in grids])
    if hasattr(tower, "get_window_index"):
        index = tower.get_window_index(thw)[0]
    else:  # transformers moved it into a function
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as source

        index = source.get_vision_window_index(  # type: ignore[attr-defined]
            thw,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )[0]
    return torch.as_tensor(index)
