"""What the patches of a picture mean to each other inside of the vision tower."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError
from mmforget.models.multimodals.base import Inputs, MultimodalFamily, VisualFeatures

KERNEL = "mmforget_tower"


@dataclass(frozen=True)
class TowerView:
    """Features of the pictures of a batch, and what a block of the tower thinks of their tokens.

    Where the projector merges patches, a token has the mean over its patches.

    Attributes:
        features: see `MultimodalFamily.encode_images`.
        attention: per picture (N_i,) float32: what its tokens get from the class token, summed over
            heads; without class token what they get from all patches, the mean over heads. None if
            nobody looked.
        keys: per picture (N_i, d) float32 keys, the mean over heads. None if nobody looked.
    """

    features: VisualFeatures
    attention: Sequence[Tensor | None]
    keys: Sequence[Tensor | None]


@dataclass
class _Record:
    """Queries and keys of one attention module, per call of its kernel."""

    calls: list[tuple[Tensor, Tensor, float, Tensor | None]] = field(default_factory=list)
    flat: bool = False  # patches of all pictures lie in one sequence


_records: weakref.WeakKeyDictionary[nn.Module, _Record] = weakref.WeakKeyDictionary()


def tower_view(
    family: MultimodalFamily, network: Any, inputs: Inputs, block: int = -2
) -> TowerView:
    """Encode the pictures of a batch, and look into one block of the tower while that runs.

    Works for towers with class token (CLIP, InternVL), without (SigLIP), and with windows
    (Qwen2.5-VL), on any kernel. Attention is summed over the queries of a window, so that a token
    gets 1 by chance in a window of any size.

    Args:
        family: of the network.
        network: of transformers.
        inputs: with pictures.
        block: of the tower, negative from the end.

    Raises:
        ConfigurationError: the tower has no such block.
    """
    blocks = family.vision_blocks(network)
    if not -len(blocks) <= block < len(blocks):
        raise ConfigurationError(
            f"`tower_block` is {block}, but the vision tower has {len(blocks)} blocks"
        )
    with _recorded(_attention_of(blocks[block])) as record:
        features = family.encode_images(network, inputs)
    size = features.raw_grid[0][0] * features.raw_grid[0][1]
    parts = [_statistics(*call, None if record.flat else size) for call in record.calls]
    states = torch.cat(parts, dim=1)[0] if record.flat else torch.cat(parts)
    pictures = family.split_states(network, states, features.raw_grid)
    tokens = [
        _merged(one, raw, len(pooled))
        for one, raw, pooled in zip(pictures, features.raw_grid, features.pooled, strict=True)
    ]
    return TowerView(features, [one[:, 0] for one in tokens], [one[:, 1:] for one in tokens])


@contextmanager
def _recorded(attention: Any) -> Iterator[_Record]:
    """Let one attention module run on a kernel that keeps queries and keys."""
    from transformers import AttentionInterface

    AttentionInterface.register(KERNEL, _kernel)
    record = _records[attention] = _Record()
    usual = attention.config
    attention.config = copy.copy(usual)  # the others read the same object
    attention.config._attn_implementation = KERNEL

    def rank(_module: nn.Module, _args: Any, output: Any) -> None:
        record.flat = (output[0] if isinstance(output, tuple) else output).dim() == 2

    handle = attention.register_forward_hook(rank)
    try:
        yield record
    finally:
        handle.remove()
        attention.config = usual
        _records.pop(attention, None)


def _kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> Any:
    """Attend as sdpa does, and keep what `_recorded` asked for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    record = _records.get(module)
    if record is not None:
        scaling = given.get("scaling") or query.shape[-1] ** -0.5
        record.calls.append((query.detach(), key.detach(), scaling, attention_mask))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)


def _attention_of(block: nn.Module) -> Any:
    for name in ("self_attn", "attn", "attention"):
        found = getattr(block, name, None)
        if found is not None:
            return found
    raise ConfigurationError(f"{type(block).__name__} has no attention that mmforget knows")


@torch.no_grad()
def _statistics(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, patches: int | None
) -> Tensor:
    """Attention received and mean key of every token, (n, M, 1 + d) float32.

    Args:
        query: (n, H, M, d).
        key: (n, H, M, d).
        scaling: of the products.
        mask: bool or additive (n or 1, 1, M, M), or None.
        patches: of a picture; one token more is the class token. None: there is none.
    """
    query, key = query.float(), key.float()
    received = []
    classed = patches is not None and query.shape[2] > patches
    for number in range(len(query)):  # one picture at a time: M x M weights of all would not fit
        asked = query[number, :, :1] if classed else query[number]
        scores = asked @ key[number].transpose(1, 2) * scaling
        if mask is not None:
            own = mask.expand(len(query), -1, -1, -1)[number, :, : asked.shape[1]]
            if own.dtype == torch.bool:
                own = torch.zeros_like(scores).masked_fill(~own, torch.finfo(scores.dtype).min)
            scores = scores + own
        weights = scores.softmax(dim=-1)
        received.append(weights.sum(dim=(0, 1)) if classed else weights.mean(dim=0).sum(dim=0))
    return torch.cat((torch.stack(received)[..., None], key.mean(dim=1)), dim=-1)


def _merged(patches: Tensor, raw: tuple[int, int], tokens: int) -> Tensor:
    """Mean over the patches (M, C) that become one visual token, (N, C)."""
    side = round((len(patches) / tokens) ** 0.5)
    if side == 1:
        return patches
    cells = patches.reshape(raw[0] // side, side, raw[1] // side, side, -1)
    return cells.mean(dim=(1, 3)).flatten(0, 1)
