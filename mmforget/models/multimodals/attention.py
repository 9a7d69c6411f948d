"""Attention weights of a network that runs on a fused kernel: recomputed, or read off as it runs.

Fused kernels (sdpa, flash) never form the weights, and ``output_attentions=True`` then gives an
empty tuple. Switching the network to the eager kernel forms all of them in all layers, which at
4,000 tokens is tens of gigabytes. Here only those asked for are formed, and the network goes on
with its own kernel, so that its outputs stay the same to the last bit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, DataError


def recomputed_attention(
    attention: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Compute the weights of an attention module from what its forward gets.

    Meant for hooks on ``layers[l].self_attn``. The projections are called as modules, so that
    biases and LoRA count; query and key norms are applied where the module has them. Queries are
    formed for the wanted rows only.

    Args:
        attention: the module, with ``q_proj``, ``k_proj``, ``head_dim`` and ``scaling``.
        hidden_states: (B, Q, D) that enter the module.
        position_embeddings: cosines and sines (B or 1, Q, d) that the layer hands on.
        attention_mask: what the layer hands on: None (causal, nothing padded), bool or additive
            (B, 1 or H, Q, L), or the (B, L) mask of padding that flash kernels get.
        rows: of the queries, (R,) for all sequences or (B, R) for each its own; negative ones
            count from the end. None takes all.
        keys: (B, Hkv, L, d) with positions already applied, from a cache; None computes them from
            `hidden_states`, so L = Q.

    Returns:
        (B, H, R, L) float32. The rows of padding are 0, all others sum to 1.

    Shape:
        B sequences, Q queries of this call, R of them wanted, L keys, H query heads, Hkv key heads.
    """
    batch, queries, _ = hidden_states.shape
    index = row_index(rows, batch, queries, hidden_states.device)
    wanted = hidden_states.gather(1, index[:, :, None].expand(-1, -1, hidden_states.shape[-1]))
    query = _projected(attention, "q", wanted)
    query = _rotated(attention, query, *(_picked(p, index) for p in position_embeddings))
    if keys is None:
        keys = _projected(attention, "k", hidden_states)
        keys = _rotated(attention, keys, *position_embeddings)
    visible, bias = visible_keys(attention_mask, index, queries, keys.shape[-2])
    return attention_weights(query, keys, visible, bias, _scaling(attention))


def row_index(rows: Tensor | None, batch: int, queries: int, device: torch.device) -> Tensor:
    """Bring the wanted query rows into the shape (B, R), counted from 0.

    Raises:
        ConfigurationError: a row that the call does not have.
    """
    if rows is None:
        rows = torch.arange(queries, device=device)
    rows = rows.to(device)
    if rows.numel() and (int(rows.max()) >= queries or int(rows.min()) < -queries):
        raise ConfigurationError(
            f"`rows` reaches from {int(rows.min())} to {int(rows.max())}, but this call has "
            f"{queries} query rows"
        )
    rows = torch.where(rows < 0, rows + queries, rows)
    return rows.expand(batch, -1) if rows.ndim == 1 else rows


def visible_keys(
    mask: Tensor | None, index: Tensor, queries: int, length: int
) -> tuple[Tensor, Tensor | None]:
    """Say which keys a query row may look at; rows of padding see nothing.

    The queries are the last ones of the sequence, so query q is key L - Q + q. A row whose own key
    is hidden is padding, at whichever side.

    Args:
        mask: as in `recomputed_attention`.
        index: (B, R) wanted query rows.
        queries: Q, how many the call has.
        length: L, how many keys there are.

    Returns:
        (B, 1 or H, R, L) bool, and what an additive mask adds, or None.

    Raises:
        DataError: a mask of another length.
    """
    own = index + (length - queries)
    bias = None
    if mask is None or mask.ndim == 2:
        places = torch.arange(length, device=index.device)
        visible = (places <= own[:, :, None])[:, None]
        if mask is not None:
            visible = visible & mask[:, None, None, -length:].bool()
    else:
        if mask.shape[-1] != length:
            raise DataError(
                f"the attention mask covers {mask.shape[-1]} keys, but there are {length}; static "
                "caches, and caches that evict keys, are not supported here, use a DynamicCache"
            )
        batch, heads = len(index), mask.shape[1]
        mask = mask.expand(batch, -1, -1, -1).gather(
            2, index[:, None, :, None].expand(-1, heads, -1, length)
        )
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        bias = None if mask.dtype == torch.bool else mask.float()
    itself = own[:, None, :, None].expand(-1, visible.shape[1], -1, 1)
    return visible & visible.gather(-1, itself), bias


def attention_weights(
    query: Tensor, key: Tensor, visible: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """Softmax over the visible keys in float32; each key head serves a group of query heads.

    Args:
        query: (B, H, R, d).
        key: (B, Hkv, L, d).
        visible: (B, 1 or H, R, L) bool.
        bias: (B, 1 or H, R, L) to add, or None.
        scaling: of the products.

    Returns:
        (B, H, R, L) float32, 0 in rows that see nothing.
    """
    batch, heads, rows, width = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, width)  # keys are not repeated
    scores = (grouped @ key.float().transpose(-1, -2) * scaling).reshape(batch, heads, rows, -1)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)


def _projected(attention: Any, which: str, states: Tensor) -> Tensor:
    """Queries or keys (B, heads, R, d), normed where the module does so."""
    flat = getattr(attention, f"{which}_proj")(states)
    norm = getattr(attention, f"{which}_norm", None)
    split = (*states.shape[:-1], -1, attention.head_dim)
    if norm is None:
        return flat.view(split).transpose(1, 2)
    whole = getattr(norm, "weight", None) is not None and norm.weight.shape[-1] == flat.shape[-1]
    flat = norm(flat).view(split) if whole else norm(flat.view(split))
    return flat.transpose(1, 2)


def _rotated(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary positions the way that the module's own modelling file does."""
    source = sys.modules.get(type(attention).__module__)
    apply = getattr(source, "apply_rotary_pos_emb", None)
    if cos.ndim == 4:  # the first transformers 5 still handed M-RoPE on in three parts
        settings = getattr(attention, "rope_parameters", None) or attention.rope_scaling
        sections = settings["mrope_section"]
        apply = source.apply_multimodal_rotary_pos_emb  # type: ignore[union-attr]
        return apply(states, states, cos, sin, sections)[0]
    if apply is not None:
        return apply(states, states, cos, sin)[0]
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cos[:, None] + turned * sin[:, None]


def _picked(part: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (B, R) of cosines or sines (..., B or 1, Q, d)."""
    part = part.expand(*part.shape[:-3], len(index), *part.shape[-2:])
    place = index[:, :, None].expand(*part.shape[:-2], -1, part.shape[-1])
    return part.gather(-2, place)


def _scaling(attention: Any) -> float:
    return float(getattr(attention, "scaling", attention.head_dim**-0.5))
