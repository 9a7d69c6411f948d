"""Which layers of a network do what, read off its module tree.

The libraries name the same thing differently, and rename it now and then. The rules below therefore
look at the shape of the tree (which children a block has) and list the few names in use, in one
place.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from mmforget.errors import CapabilityError, ConfigurationError, suggest
from mmforget.models.base import Site, SiteKind

FFN_CONTAINERS = frozenset({"mlp", "ffn", "feed_forward", "feedforward", "mlp_channels"})
"""Children of a block that hold its feed-forward layers: timm, torchvision ViT and Swin,
transformers ViT, DeiT, DINOv2 and CLIP; `mlp_channels` in MLP-Mixers."""

FFN_PAIRS = (
    ("intermediate.dense", "output.dense"),  # BERT-like blocks of transformers: BEiT, Swin
    ("pwconv1", "pwconv2"),  # ConvNeXt of transformers and of the authors
    ("linear1", "linear2"),  # torch.nn.TransformerEncoderLayer, DETR
    ("block.3", "block.5"),  # torchvision ConvNeXt: CNBlock.block is one nn.Sequential
    ("fc6", "fc7"),  # box head of Faster R-CNN
)
"""Two layers that lie directly in a block, without a container."""

ATTENTION_CONTAINERS = frozenset({"attn", "attention", "self_attn", "self_attention", "cross_attn"})

POSITION_PARTS = ("position", "rel_pos", "cpb", "meta_mlp")
"""Parts of names of the small networks that compute a relative position bias."""


def find_sites(network: nn.Module, kind: SiteKind, heads: Collection[str]) -> list[Site]:
    """List the layers of one kind in the order in which they were registered.

    Args:
        network: the network.
        kind: ``ffn``: the feed-forward layers of each block (linear layers or 1x1 convolutions;
            three in a gated one); ``attention``: the projections into and out of attention;
            ``all``: every linear and convolutional layer.
        heads: qualified names of the classification heads, which are no site of any kind.

    Returns:
        Sites with names relative to `network`. The layers of one block are neighbours.

    Raises:
        CapabilityError: there is no such layer.
        ConfigurationError: `kind` is unknown.
    """
    kinds = ("ffn", "attention", "all")
    if kind not in kinds:
        raise ConfigurationError(f"unknown kind of site '{kind}', {suggest(kind, kinds)}")
    layers = _weight_layers(network, heads)
    if kind == "ffn":
        found = _ffn(network, layers)
        sought = (
            f"children named {', '.join(sorted(FFN_CONTAINERS))} that hold linear layers or 1x1 "
            f"convolutions, and pairs {', '.join('/'.join(pair) for pair in FFN_PAIRS)}"
        )
    elif kind == "attention":
        found = _attention(network, layers)
        sought = (
            f"linear layers or 1x1 convolutions in {', '.join(sorted(ATTENTION_CONTAINERS))} "
            "(nn.MultiheadAttention computes its projections itself, without layers)"
        )
    else:
        found = _everything(network, layers)
        sought = "nn.Linear and nn.Conv2d layers other than the head"
    if not found:
        raise CapabilityError(
            f"{type(network).__name__} has no sites of kind '{kind}': looked for {sought}; "
            "choose another kind of site or a method that needs none"
        )
    return found


def _weight_layers(network: nn.Module, heads: Collection[str]) -> dict[str, nn.Module]:
    """All linear and convolutional layers outside of the heads, by name."""
    inside_attention = {
        f"{name}.out_proj"  # its weight is used, its forward is never called: not a layer
        for name, module in network.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    excluded = tuple(f"{head}." for head in heads)
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and name not in heads
        and name not in inside_attention
        and not name.startswith(excluded)
    }


def _pointwise(module: nn.Module) -> bool:
    """Whether a layer mixes channels only: linear, or a dense 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _ffn(network: nn.Module, layers: dict[str, nn.Module]) -> list[Site]:
    found: list[Site] = []
    for block, module in network.named_modules():
        parts = block.split(".")
        if not block or ATTENTION_CONTAINERS.intersection(parts) or _about_position(block):
            continue
        names: list[str] = []
        for child, _ in module.named_children():
            if child in FFN_CONTAINERS:
                inside = f"{block}.{child}."
                names += [n for n, m in layers.items() if n.startswith(inside) and _pointwise(m)]
        for pair in FFN_PAIRS:
            full = [f"{block}.{part}" for part in pair]
            if all(name in layers and _pointwise(layers[name]) for name in full):
                names += full
        found += [Site(name, layers[name], block) for name in names]
    return found


def _attention(network: nn.Module, layers: dict[str, nn.Module]) -> list[Site]:
    found: dict[str, list[Site]] = {}
    with_queries: set[str] = set()
    for name, layer in layers.items():
        parts = name.split(".")
        depth = next((i for i, part in enumerate(parts) if part in ATTENTION_CONTAINERS), 0)
        # the outermost container counts: `attention.output` and `attention.self` are one attention
        if depth and _pointwise(layer) and not _about_position(name):
            container = ".".join(parts[: depth + 1])
            found.setdefault(container, []).append(Site(name, layer, ".".join(parts[:depth])))
            if any(part.startswith("q") or "qkv" in part for part in parts[depth + 1 :]):
                with_queries.add(container)
    # without queries it weighs channels, like squeeze-and-excitation, which timm also calls `attn`
    return [site for name, group in found.items() if name in with_queries for site in group]


def _everything(network: nn.Module, layers: dict[str, nn.Module]) -> list[Site]:
    blocks = {site.block for site in _ffn(network, layers) + _attention(network, layers)}
    found: list[Site] = []
    for name, layer in layers.items():
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
        block = next((outer for outer in above if outer in blocks), above[0] if above else name)
        found.append(Site(name, layer, block))
    return found


def _about_position(name: str) -> bool:
    return any(part in name for part in POSITION_PARTS)
