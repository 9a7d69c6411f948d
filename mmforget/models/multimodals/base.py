"""The parts of a multimodal language model of transformers by their place in the module tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError, DataError

Part = Literal["vision", "projector", "language", "head", "other"]
Inputs = Mapping[str, Any]
"""What a network is called with: ``input_ids`` (B, L), ``attention_mask`` (B, L), and where there
are pictures ``pixel_values`` and whatever else the family needs."""

VISION_KEYS = (
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_sizes",
    "mm_encoder_outputs",
)


WRAPPER = "base_model.model."
"""What peft puts before the names of a network that it wraps."""


@dataclass(frozen=True)
class VisualFeatures:
    """The pictures of a batch as the language model gets to see them, and before.

    Attributes:
        pooled: per picture (N_i, D) what replaces the placeholders, after the projector.
        levels: per layer of the vision tower and picture (M_i, Dv) its hidden states, without
            class token; layer -1 is the last.
        grid: per picture (h, w) of `pooled`, None where its tokens form no grid.
        raw_grid: per picture (h, w) of `levels`.
    """

    pooled: list[Tensor]
    levels: dict[int, list[Tensor]]
    grid: list[tuple[int, int] | None]
    raw_grid: list[tuple[int, int]]


class MultimodalFamily:
    """One family of networks: where its parts lie, and how it numbers its visual tokens.

    Names of modules are those in memory (`named_modules` of the network), which differ from the
    names in files.

    Class attributes:
        name: for messages.
        model_types: values of ``config.model_type``.
        language: the module that owns the decoder ``layers``, ``norm`` and ``embed_tokens``.
        vision: the vision tower.
        blocks: the list of the tower's blocks.
        projector: what maps the tower's features to the width of the language model. It may lie
            inside of `vision`.
        head: the layer that scores tokens.
        nested_pictures: whether the processor wants the pictures row by row.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    language: ClassVar[str] = "model.language_model"
    vision: ClassVar[str] = "model.vision_tower"
    blocks: ClassVar[str] = "model.vision_tower.encoder.layers"
    projector: ClassVar[str] = "model.multi_modal_projector"
    head: ClassVar[str] = "lm_head"
    nested_pictures: ClassVar[bool] = False

    # ---- modules --------------------------------------------------------------------------------

    def language_model(self, network: nn.Module) -> Any:
        """The decoder: owns ``layers``, ``norm`` and ``embed_tokens``."""
        return network.get_submodule(self.language)

    def layers(self, network: nn.Module) -> nn.ModuleList:
        """The decoder layers."""
        found: nn.ModuleList = self.language_model(network).layers
        return found

    def vision_tower(self, network: nn.Module) -> Any:
        """The vision tower."""
        return network.get_submodule(self.vision)

    def vision_blocks(self, network: nn.Module) -> nn.ModuleList:
        """The blocks of the vision tower."""
        found = network.get_submodule(self.blocks)
        assert isinstance(found, nn.ModuleList)  # what transformers builds
        return found

    def projector_of(self, network: nn.Module) -> Any:
        """The projector."""
        return network.get_submodule(self.projector)

    def part(self, name: str) -> Part:
        """Which part of the network a parameter or module belongs to, by its name in memory."""
        name = name.removeprefix(WRAPPER)
        for prefix, part in (
            (self.projector, "projector"),  # before the tower: it may lie inside
            (self.vision, "vision"),
            (self.head, "head"),
            (self.language, "language"),
        ):
            if name == prefix or name.startswith(prefix + "."):
                return part  # type: ignore[return-value]
        return "other"

    def block(self, name: str) -> tuple[Literal["vision", "language"], int] | None:
        """The tower and the number of the block that a parameter lies in; None outside of blocks.

        The projector's own layers are no blocks, wherever they lie.
        """
        name = name.removeprefix(WRAPPER)
        if self.part(name) == "projector":
            return None
        for kind, prefix in (("vision", self.blocks), ("language", f"{self.language}.layers")):
            if name.startswith(prefix + "."):
                number = name[len(prefix) + 1 :].partition(".")[0]
                if number.isdigit():
                    return kind, int(number)  # type: ignore[return-value]
        return None

    # ---- tokens ---------------------------------------------------------------------------------

    def image_token_ids(self, network: Any) -> tuple[int, ...]:
        """Ids of the placeholders that visual features replace."""
        return (int(network.config.image_token_id),)

    def visual_mask(self, network: Any, input_ids: Tensor) -> Tensor:
        """(B, L) bool: where visual tokens stand."""
        ids = torch.tensor(self.image_token_ids(network), device=input_ids.device)
        return torch.isin(input_ids, ids)

    def pictures_per_row(self, network: Any, inputs: Inputs, counts: Sequence[int]) -> list[int]:
        """How many pictures (or tiles) every row of a batch holds.

        Args:
            network: the network.
            inputs: of the network.
            counts: visual tokens of every picture of the batch, in order.

        Raises:
            DataError: the placeholders of a row end within a picture.
        """
        wanted = self.visual_mask(network, inputs["input_ids"]).sum(dim=1).tolist()
        found, place = [], 0
        for row, tokens in enumerate(wanted):
            have, number = 0, 0
            while have < tokens and place < len(counts):
                have += counts[place]
                place, number = place + 1, number + 1
            if have != tokens:
                raise DataError(
                    f"row {row} of the batch has {tokens} placeholders for visual tokens, but its "
                    f"pictures give {have}; encode question and pictures together"
                )
            found.append(number)
        if place != len(counts):
            raise DataError(
                f"the batch has {len(counts)} pictures, but placeholders for {place} only; "
                "encode question and pictures together"
            )
        return found

    # ---- features -------------------------------------------------------------------------------

    def encode_images(
        self, network: Any, inputs: Inputs, layers: Sequence[int] = ()
    ) -> VisualFeatures:
        """Run the vision tower and the projector.

        Args:
            network: the network.
            inputs: with ``pixel_values``.
            layers: blocks of the tower whose outputs are wanted, from 0, negative from the end.

        Raises:
            DataError: the inputs hold no picture.
        """
        if inputs.get("pixel_values") is None:
            raise DataError("the batch holds no picture, so there are no visual features")
        blocks = self.vision_blocks(network)
        wanted = {layer % len(blocks): layer for layer in layers}
        states: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [blocks[n].register_forward_hook(keep(n)) for n in wanted]
        try:
            output = network.get_image_features(**self.vision_inputs(inputs), return_dict=True)
        finally:
            for handle in handles:
                handle.remove()
        pooled = self.split_pooled(network, inputs, output.pooler_output)
        raw = self.raw_grids(network, inputs, len(pooled))
        levels = {layer: self.split_states(network, states[n], raw) for n, layer in wanted.items()}
        grids = [self.grid_of(network, len(p), r) for p, r in zip(pooled, raw, strict=True)]
        return VisualFeatures(pooled, levels, grids, raw)

    def vision_inputs(self, inputs: Inputs) -> dict[str, Any]:
        """The arguments of ``get_image_features``."""
        return {"pixel_values": inputs["pixel_values"]}

    def split_pooled(
        self, network: Any, inputs: Inputs, pooled: Tensor | Sequence[Tensor]
    ) -> list[Tensor]:
        """What ``get_image_features`` returns, by picture."""
        return [feature.reshape(-1, feature.shape[-1]) for feature in pooled]

    def raw_grids(self, network: Any, inputs: Inputs, pictures: int) -> list[tuple[int, int]]:
        """(h, w) of the patches of every picture."""
        height, width = inputs["pixel_values"].shape[-2:]
        patch = _side(network.config.vision_config.patch_size)
        return [(height // patch, width // patch)] * pictures

    def split_states(
        self, network: Any, states: Tensor, grids: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Hidden states of a block (P, M or M + 1, Dv) by picture, without class token."""
        extra = states.shape[1] - grids[0][0] * grids[0][1]
        return [one[extra:] for one in states]

    def grid_of(self, network: Any, tokens: int, raw: tuple[int, int]) -> tuple[int, int] | None:
        """(h, w) of the visual tokens of a picture whose patches form the grid `raw`."""
        shrink = round((raw[0] * raw[1] / tokens) ** 0.5) if tokens else 0
        if not shrink or raw[0] % shrink or raw[1] % shrink:
            return None
        grid = (raw[0] // shrink, raw[1] // shrink)
        return grid if grid[0] * grid[1] == tokens else None

    def tokens_of(self, network: Any, raw: tuple[int, int]) -> int:
        """Visual tokens of a picture whose patches form the grid `raw`."""
        config = network.config
        whole = getattr(config, "vision_feature_select_strategy", "default") == "full"
        return raw[0] * raw[1] + int(whole)  # with the class token

    def encoder_outputs(self, features: Sequence[Tensor]) -> dict[str, Any]:
        """Ready visual features, the value of ``mm_encoder_outputs``.

        Args:
            features: (N_i, D) in the order of their placeholders, one entry per row that has any.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}  # type: ignore[arg-type]

    def picture_frame(self, network: Any, processor: Any) -> tuple[list[int], list[int]]:
        """Ids of the tokens that stand before and after the visual tokens of a picture."""
        return [], []

    def grid_inputs(self, network: Any, grids: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """What `position_ids` must know of pictures whose visual tokens form these grids."""
        return {}

    def position_ids(self, network: Any, inputs: Inputs) -> Tensor | None:
        """(3, B, L) where positions have three dimensions, None where tokens are just counted.

        Args:
            network: the network.
            inputs: ``input_ids`` and ``attention_mask``, and what `grid_inputs` gives.
        """
        return None

    def model_inputs(self, inputs: Inputs) -> dict[str, Any]:
        """What the network's forward takes, without what is None.

        transformers crashes in `generate` on ``pixel_values=None``.
        """
        return {
            key: value
            for key, value in inputs.items()
            if value is not None and key not in ("labels", "id", "weight")
        }

    def check_images(self, network: Any, inputs: Inputs) -> None:
        """Refuse placeholders without pictures, which transformers would take for ordinary words.

        Raises:
            DataError: names the first row.
        """
        if any(inputs.get(key) is not None for key in ("pixel_values", "mm_encoder_outputs")):
            return
        rows = self.visual_mask(network, inputs["input_ids"]).any(dim=1)
        if rows.any():
            raise DataError(
                f"row {int(rows.nonzero()[0])} of the batch has placeholders for visual tokens, "
                "but the batch has no pictures; give `pixel_values` or visual features"
            )


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def families() -> tuple[MultimodalFamily, ...]:
    """All supported families."""
    from mmforget.models.multimodals.idefics import Idefics
    from mmforget.models.multimodals.intern_vl import InternVL
    from mmforget.models.multimodals.llava import Llava
    from mmforget.models.multimodals.qwen_vl import QwenVL

    return Llava(), QwenVL(), Idefics(), InternVL()


def supported() -> str:
    """The supported ``model_type`` values, for messages."""
    return ", ".join(kind for family in families() for kind in family.model_types)


def family_of(network: nn.Module) -> MultimodalFamily:
    """The family of a network of transformers; one wrapped by peft counts as what it wraps.

    Raises:
        CapabilityError: names the network's type and the supported ones.
    """
    base: Any = unwrapped(network)
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    for family in families():
        if kind in family.model_types:
            return family
    raise CapabilityError(
        f"'{kind}' is no multimodal language model that mmforget knows; supported are: "
        f"{supported()}"
    )


def unwrapped(network: nn.Module) -> nn.Module:
    """The network of transformers itself, out of a peft model."""
    inner = getattr(network, "get_base_model", None)
    return inner() if inner is not None else network


def has_adapters(network: nn.Module) -> bool:
    """Whether a network is wrapped by peft."""
    return unwrapped(network) is not network
