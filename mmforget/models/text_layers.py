"""Where text enters a diffusion network: selected by structure, never by a part of a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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

    Args:
        network: UNet or transformer of a pipeline.

    Raises:
        ModelError: nobody has told us where text enters it; `FAMILIES` can be extended.
    """
    name = type(network).__name__
    if hasattr(network, "_orig_mod"):
        raise ModelError(
            f"the denoiser is compiled ({name}); give the pipeline before `torch.compile`, and "
            "compile what comes back"
        )
    for family in FAMILIES:
        if family.denoiser == name and (family.name != "SDXL" or _is_sdxl(network)):
            return family
    known = sorted({family.denoiser for family in FAMILIES})
    raise ModelError(
        f"the denoiser is a {name}, but text layers are known for {', '.join(known)}; append a "
        "`Family` to `mmforget.models.text_layers.FAMILIES`"
    )


def chosen(layers: list[TextLayer], network: nn.Module) -> list[TextLayer]:
    """Refuse an empty selection, and layers whose weights cannot be edited.

    Args:
        layers: what a family's `text_layers` found.
        network: the denoiser, for the message.

    Raises:
        CapabilityError: no layer reads text.
        ModelError: quantised or offloaded weights.
    """
    if not layers:
        raise CapabilityError(
            f"{type(network).__name__} has no layer that reads text; "
            "only text-to-image pipelines can forget concepts named in text"
        )
    for layer in layers:
        weight = layer.module.weight
        if weight.is_meta:
            raise ModelError(
                f"the weights of '{layer.name}' are offloaded; load the pipeline without "
                "`enable_sequential_cpu_offload` or `device_map`"
            )
        if type(weight.data) is not Tensor or not weight.is_floating_point():
            raise ModelError(
                f"the weights of '{layer.name}' are quantised ({type(layer.module).__name__}, "
                f"{weight.dtype}); load the pipeline without quantisation"
            )
    return layers


_STAGES = {"time_embedding": 0, "add_embedding": 0, "conv_in": 0, "mid_block": 2, "up_blocks": 3}
"""UNets register their middle last of all blocks; stages not named here come between 0 and 2."""
_LAST = {"conv_norm_out": 4, "conv_out": 4}


def in_stages(modules: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Sort named modules of a denoiser by the stage of its forward pass that they belong to.

    Args:
        modules: qualified names and modules, as from `named_modules`.
    """
    return sorted(modules, key=lambda pair: (_STAGES | _LAST).get(pair[0].partition(".")[0], 1))


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
    for name, module in in_stages(network.named_modules()):
        if getattr(module, "is_cross_attention", False) and module.to_k.in_features in widths:
            yield name, module


def _unet_text_layers(network: Any) -> list[TextLayer]:
    if getattr(network.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise ModelError("the UNet has an IP-Adapter; take it out by `pipe.unload_ip_adapter()`")
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
        found.insert(0, TextLayer("add_embedding.linear_1", layer, "pooled", text))
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
        ("time_text_embed.text_embedder.linear_1", "pooled"),
        ("context_embedder", "states"),
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
