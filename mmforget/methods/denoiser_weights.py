"""Which weights of a denoiser are trained: sets chosen by structure, the same for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from mmforget.errors import CapabilityError, ConfigurationError, suggest
from mmforget.models.base import Site

WeightSet = Literal["x", "x-strict", "x-wide", "u", "selfattn", "attention", "all"]

KEYS_AND_VALUES = ("to_k", "to_v", "add_k_proj", "add_v_proj")
BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks")


def select_weights(model: Any, weights: WeightSet) -> list[Site]:
    """Choose layers of a denoiser.

    ===========  =================================================================================
    x            the attention between text and picture: queries, keys, values and outputs
    x-strict     of these, keys and values only
    x-wide       x, and keys and values of the blocks that FLUX shares between text and picture
    u            all linear and convolutional layers in the blocks, except x; neither the time
                 embedding nor the first and last convolution. For transformers, the blocks are
                 those with separate weights for text and picture
    selfattn     the attention of the picture to itself
    attention    every attention layer
    all          every linear and convolutional layer
    ===========  =================================================================================

    Args:
        model: offers `Sites`, with a denoiser of diffusers as its network.
        weights: name of the set.

    Returns:
        Layers in forward order, never none.

    Raises:
        ConfigurationError: an unknown set.
        CapabilityError: the network has no such layer.
    """
    if weights not in get_args(WeightSet):
        raise ConfigurationError(
            f"`weights` is '{weights}', {suggest(weights, get_args(WeightSet))}"
        )
    if weights == "all":
        return list(model.sites("all"))
    if weights == "attention":
        return list(model.sites("attention"))
    cross: list[Site] = model.sites("cross_attention")
    names = {site.name for site in cross}
    if weights == "x":
        found: Sequence[Site] = cross
    elif weights == "x-strict":
        found = [site for site in cross if _last(site) in KEYS_AND_VALUES]
    elif weights == "x-wide":
        shared = [
            site
            for site in model.sites("attention")
            if site.name.startswith("single_transformer_blocks.") and _last(site) in KEYS_AND_VALUES
        ]
        found = [*cross, *shared] if shared else []
    elif weights == "u":
        found = [
            site
            for site in model.sites("all")
            if site.name.split(".")[0] in BLOCKS and site.name not in names
        ]
    else:
        found = [
            site
            for site in model.sites("attention")
            if site.name not in names and site.name.split(".")[0] in BLOCKS
        ]
    if not found:
        raise CapabilityError(
            f"{type(model.network).__name__} has no layers for weights='{weights}'; "
            "choose another set, such as 'x'"
        )
    return list(found)


def parameters_of(sites: Sequence[Site]) -> list[nn.Parameter]:
    """Weights and biases of layers."""
    return [parameter for site in sites for parameter in site.module.parameters()]


def keys_and_values(model: Any) -> list[Site]:
    """Layers that turn text into keys and values."""
    return [site for site in model.sites("cross_attention") if _last(site) in KEYS_AND_VALUES]


def _last(site: Site) -> str:
    return site.name.rpartition(".")[2]
