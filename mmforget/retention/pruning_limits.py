"""Networks and caches in which tokens cannot be dropped between layers."""

from __future__ import annotations

from typing import Any

from mmforget.errors import CapabilityError, ConfigurationError
from mmforget.models.multimodals.base import MultimodalFamily

COMPILED = (
    "visual tokens of a compiled network cannot be pruned, since shapes depend on the data; use "
    "the network as it is"
)


def check_network(network: Any, family: MultimodalFamily, layer: int) -> None:
    """Refuse a network whose tokens cannot be dropped before decoder layer `layer`.

    Raises:
        ConfigurationError: it has no such layer.
        CapabilityError: its kernel takes other masks, or it is compiled.
    """
    number = len(family.layers(network))
    if layer >= number:
        raise ConfigurationError(
            f"`layer` is {layer}, but the language model has {number} layers; it must lie "
            f"between 1 and {number - 1}"
        )
    kernel = str(family.language_model(network).config._attn_implementation)
    if "flash" in kernel or "flex" in kernel:
        raise CapabilityError(
            f"visual tokens cannot be pruned with the attention kernel '{kernel}'; call "
            "network.set_attn_implementation('sdpa') first"
        )
    if hasattr(network, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) for module in network.modules()
    ):
        raise CapabilityError(COMPILED)


def check_cache(cache: Any) -> None:
    """Refuse caches other than plain dynamic ones.

    Raises:
        CapabilityError: names the kinds of the cache and of its layers.
    """
    if cache is None:
        return
    from transformers.cache_utils import DynamicCache, DynamicLayer

    plain = isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )
    if not plain:
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
        raise CapabilityError(
            f"visual tokens cannot be pruned in a {type(cache).__name__}"
            + (f" of {', '.join(kinds)}" if kinds else "")
            + "; use a plain DynamicCache, without sliding windows and quantisation"
        )
