"""Where text enters a diffusion network: selected by structure, never by a part of a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmforget.errors import CapabilityError, ModelError
from mmforget.models.base import Site, TextLayer


@dataclass(frozen=True)
class Family:
    """What is particular to one kind of denoiser.

    Args:
        name: for messages and reports.
        denoiser: class name of the network.
        component: attribute of the pipeline that holds it.
        text_layers: the closed-form sites.
        cross_attention: the attention projections between text and image; those named ``k`` and
            ``v`` are the strict set.
        packed: whether latents enter as a sequence of 2x2 patches.
    """

    name: str
    denoiser: str
    component: str
    text_layers: Callable[[Any], list[TextLayer]]
    cross_attention: Callable[[Any], list[Site]]
    packed: bool = False


def family_of(network: nn.Module) -> Family:
    """Look up the family of a denoiser.

    Raises:
        ModelError: nobody has told us where text enters it; `FAMILIES` can be extended.
    """
    name = type(network).__name__
    for family in FAMILIES:
        if family.denoiser == name and (family.name != "SDXL" or _is_sdxl(network)):
            return family
    known = sorted({family.denoiser for family in FAMILIES})
    raise ModelError(
        f"the denoiser is a {name}, but text layers are known for {', '.join(known)}; append a "
        "`Family` to `mmforget.models.text_layers.FAMILIES`"
    )


def chosen(layers: list[TextLayer], network: nn.Module) -> list[TextLayer]:
    """Refuse an empty selection.

    Raises:
        CapabilityError: no layer reads text.
    """
    if not layers:
        raise CapabilityError(
            f"{type(network).__name__} has no layer that reads text; "
            "only text-to-image pipelines can forget concepts named in text"
        )
    return layers


def _is_sdxl(network: Any) -> bool:
    return getattr(network.config, "addition_embed_type", None) == "text_time"


# ---- UNets ------------------------------------------------------------------------------------


def _cross_attentions(network: Any) -> Iterator[tuple[str, Any]]:
    """Attention modules whose keys and values come from the text.

    SD3.5 also has modules called ``attn2``, which attend to the image itself, and in tiny networks
    the widths coincide; what decides is how the attention was built.
    """
    widths = network.config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(widths)
    for name, module in network.named_modules():
        if getattr(module, "is_cross_attention", False) and module.to_k.in_features in widths:
            yield name, module


def _unet_text_layers(network: Any) -> list[TextLayer]:
    if getattr(network.config, "encoder_hid_dim_type", None) is not None:
        raise ModelError(
            f"the UNet projects its text first (`encoder_hid_dim_type="
            f"{network.config.encoder_hid_dim_type!r}`), which is not supported; "
            "use a Stable Diffusion 1, 2, XL, 3 or FLUX pipeline"
        )
    found = [
        TextLayer(f"{name}.{part}", getattr(module, part), "states", module.to_k.in_features)
        for name, module in _cross_attentions(network)
        for part in ("to_k", "to_v")
    ]
    if found and _is_sdxl(network):
        layer = network.add_embedding.linear_1
        # The pooled text comes first, then six numbers about the picture's size.
        text = layer.in_features - 6 * network.config.addition_time_embed_dim
        found.append(TextLayer("add_embedding.linear_1", layer, "pooled", text))
    return found


def _unet_cross_attention(network: Any) -> list[Site]:
    return [
        Site(f"{name}.{part}", module.get_submodule(part), name)
        for name, module in _cross_attentions(network)
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]


# ---- transformers with joint attention -----------------------------------------------------------


def _joint_text_layers(network: Any) -> list[TextLayer]:
    found = []
    for name, reads in (
        ("context_embedder", "states"),
        ("time_text_embed.text_embedder.linear_1", "pooled"),
    ):
        layer = network.get_submodule(name)
        found.append(TextLayer(name, layer, reads, layer.in_features))  # type: ignore[arg-type]
    return found


def _joint_cross_attention(network: Any) -> list[Site]:
    sites = []
    for name, block in network.transformer_blocks.named_children():
        for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            layer = getattr(block.attn, part, None)  # the last block has no output for text
            if layer is not None:
                path = f"transformer_blocks.{name}.attn"
                sites.append(Site(f"{path}.{part}", layer, path))
    return sites


FAMILIES = [
    Family("SDXL", "UNet2DConditionModel", "unet", _unet_text_layers, _unet_cross_attention),
    Family(
        "Stable Diffusion", "UNet2DConditionModel", "unet", _unet_text_layers, _unet_cross_attention
    ),
    Family(
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        "transformer",
        _joint_text_layers,
        _joint_cross_attention,
    ),
    Family(
        "FLUX",
        "FluxTransformer2DModel",
        "transformer",
        _joint_text_layers,
        _joint_cross_attention,
        packed=True,
    ),
]
"""In order of preference; append to it to teach mmforget another denoiser."""
