"""Linear layers of a denoiser in which memories of pictures have been looked for, per family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError, ModelError, suggest
from mmforget.models.text_layers import in_stages

MemoryKind = Literal["ffn_out", "ffn_in", "cross_value", "cross_key", "ffn_context_out"]
"""===============  =============================================================================
ffn_out          last layers of the feed-forward networks that work on the picture
ffn_in           their first layers
cross_value      what turns text into values of the attention
cross_key        what turns text into its keys
ffn_context_out  last layers of the feed-forward networks that work on the text alone
===============  ============================================================================="""

SINGLE = "FluxSingleTransformerBlock"
"""Blocks of FLUX in which one layer reads the attention and the hidden units side by side."""


@dataclass(frozen=True)
class MemoryLayer:
    """A linear layer, or a part of one.

    Attributes:
        name: qualified name in the network.
        module: the linear layer, weight (out, in).
        columns: inputs that belong to the part.
        rows: outputs that belong to the part.
    """

    name: str
    module: Any
    columns: slice
    rows: slice

    @property
    def weight_name(self) -> str:
        """Name of the weight in the network."""
        return f"{self.name}.weight"

    @property
    def width(self) -> int:
        """Number of inputs of the part."""
        return int(self.columns.stop - self.columns.start)

    @property
    def weight(self) -> Tensor:
        """(rows, columns) view of the weight, without gradient."""
        found: Tensor = self.module.weight.detach()[self.rows, self.columns]
        return found


def memory_layers(model: Any, kind: MemoryKind = "ffn_out") -> list[MemoryLayer]:
    """Find layers by the type of the module that owns them and by their place in it.

    ===============  ===================  ======================  ==================================
    kind             UNets, PixArt, DiT   Stable Diffusion 3      FLUX
    ===============  ===================  ======================  ==================================
    ffn_out          ``ff.net.2``         ``ff.net.2``            ``ff.net.2``; in single blocks the
                                                                  columns of ``proj_out`` that read
                                                                  hidden units
    ffn_in           ``ff.net.0.proj``    ``ff.net.0.proj``       ``ff.net.0.proj``, ``proj_mlp``
    cross_value      ``attn2.to_v``       ``attn.add_v_proj``     ``attn.add_v_proj``
    cross_key        ``attn2.to_k``       ``attn.add_k_proj``     ``attn.add_k_proj``
    ffn_context_out  none                 ``ff_context.net.2``    ``ff_context.net.2``
    ===============  ===================  ======================  ==================================

    In the single blocks of FLUX text and picture share keys and values; those are left out.

    Args:
        model: a `DiffusionGenerator`, or its network.
        kind: which layers.

    Returns:
        Layers in forward order, never none.

    Raises:
        ConfigurationError: an unknown kind.
        CapabilityError: the network has no such layer.
        ModelError: quantised, offloaded, compiled or fused layers, or layers with a LoRA on them.
    """
    if kind not in get_args(MemoryKind):
        raise ConfigurationError(f"`layers` is '{kind}', {suggest(kind, get_args(MemoryKind))}")
    network: nn.Module = getattr(model, "network", model)
    for part in network.modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"the denoiser is compiled ({type(part).__name__}), so that its layers cannot be "
                "watched; give the pipeline before `compile`"
            )
    found = [_checked(layer) for layer in _found(network, kind)]
    if not found:
        raise CapabilityError(
            f"{type(network).__name__} has no layers of kind '{kind}'; "
            + ("use 'ffn_out'" if kind != "ffn_out" else "memories can be looked for in UNets and "
               "transformers with feed-forward layers of diffusers")
        )  # fmt: skip
    return found


def _found(network: nn.Module, kind: MemoryKind) -> Iterator[MemoryLayer]:
    for name, module in in_stages(network.named_modules()):
        owner = type(module).__name__
        last = name.rpartition(".")[2]
        if owner == "FeedForward":
            if kind == ("ffn_context_out" if last == "ff_context" else "ffn_out"):
                yield _whole(f"{name}.net.2", module.net[2])
            elif kind == "ffn_in" and last != "ff_context":
                yield _whole(f"{name}.net.0.proj", module.net[0].proj)
        elif owner == SINGLE:
            if kind == "ffn_in":
                yield _whole(f"{name}.proj_mlp", module.proj_mlp)
            elif kind == "ffn_out":
                layer = module.proj_out
                _refuse_wrapped(f"{name}.proj_out", layer)
                hidden = slice(layer.in_features - module.mlp_hidden_dim, layer.in_features)
                whole = slice(0, layer.out_features)
                yield MemoryLayer(f"{name}.proj_out", layer, hidden, whole)
        elif kind in ("cross_value", "cross_key") and owner in ("Attention", "FluxAttention"):
            letter = kind.removeprefix("cross_")[0]
            # SD3.5 has modules called `attn2` that attend to the picture itself.
            reads_text = getattr(module, "is_cross_attention", False)
            part = f"to_{letter}" if reads_text else f"add_{letter}_proj"
            layer = getattr(module, part, None)
            if layer is None:
                continue
            if getattr(module, "fused_projections", False):
                raise ModelError(
                    f"the projections of '{name}' are fused, so that '{part}' is not in use; call "
                    "`unfuse_qkv_projections()` first"
                )
            yield _whole(f"{name}.{part}", layer)


def _whole(name: str, layer: Any) -> MemoryLayer:
    _refuse_wrapped(name, layer)
    return MemoryLayer(name, layer, slice(0, layer.in_features), slice(0, layer.out_features))


def _refuse_wrapped(name: str, layer: Any) -> None:
    if hasattr(layer, "base_layer"):
        raise ModelError(
            f"the layer '{name}' has a LoRA on it; take it out by `pipe.unload_lora_weights()`, "
            "after `pipe.fuse_lora()` to keep its effect"
        )
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"the layer '{name}' is a {type(layer).__name__}, not a linear layer; load the "
            "pipeline without quantisation"
        )


def _checked(layer: MemoryLayer) -> MemoryLayer:
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
    return layer
