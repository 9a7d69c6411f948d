"""Which parts of its pictures a network looks at while it answers, as maps for reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError
from mmforget.models.multimodals.attention_tap import recorded_attention
from mmforget.models.multimodals.base import Inputs, family_of, unwrapped


@torch.no_grad()
def visual_evidence(
    network: nn.Module,
    inputs: Inputs,
    max_new_tokens: int = 16,
    layers: Sequence[int] | None = None,
    end_ids: Collection[int] | None = None,
    **generation: Any,
) -> list[list[Tensor]]:
    """Answer a batch, and map the attention that each visual token gets meanwhile.

    A value is the attention of the rows that predict the answer's tokens, its end included, to one
    visual token: mean over those rows, the heads and the layers. The sum of a map is the mass on
    that picture, and the sum over a row's maps its `mmforget.metrics.visual_attention.VisualMass`.
    Attention shows where the network looks, not what it concludes from there.

    Args:
        network: of a supported family, maybe wrapped by peft.
        inputs: of the network, padded on the left, with the pictures.
        max_new_tokens: most tokens of an answer, at least 1.
        layers: decoder layers, negative ones from the end; None takes all.
        end_ids: tokens that end an answer; None takes those of the generation settings.
        **generation: further arguments of transformers' ``generate``, without beams.

    Returns:
        Per row of the batch and picture (or tile) a map (h, w), or (N,) where its tokens form no
        grid; an empty list for a row without pictures.

    Raises:
        ConfigurationError: `max_new_tokens` is below 1.
        DataError: the placeholders do not fit the pictures.
    """
    if max_new_tokens < 1:
        raise ConfigurationError(f"`max_new_tokens` is {max_new_tokens}; it must be at least 1")
    base: Any = unwrapped(network)
    family = family_of(network)
    family.check_images(base, inputs)
    ids, given = inputs["input_ids"], family.model_inputs(inputs)
    visual = family.visual_mask(base, ids)
    if not visual.any():
        return [[] for _ in ids]
    if end_ids is None:
        found = base.generation_config.eos_token_id
        end_ids = found if isinstance(found, list | tuple) else [found]
    ends = [one for one in end_ids if one is not None]
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": ends or None}
    with recorded_attention(network, layers, reduce="heads") as record:
        answers = base.generate(**given, **(options | generation))[:, ids.shape[1] :]
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device, dtype=answers.dtype))
    counted = (ended.long().cumsum(dim=1) - ended.long()) == 0
    steps = counted.to(torch.float32) / counted.sum(dim=1, keepdim=True)
    received = torch.zeros(visual.shape, device=ids.device)
    for passes in record.values():
        for step, weights in enumerate(passes):
            received += weights[:, 0, : ids.shape[1]] * steps[:, step, None] / len(record)
    return _maps(base, family, inputs, received, visual)


def _maps(
    base: Any, family: Any, inputs: Inputs, received: Tensor, visual: Tensor
) -> list[list[Tensor]]:
    """Cut (B, L) into the maps of the pictures."""
    features = family.encode_images(base, inputs)
    counts = [len(feature) for feature in features.pooled]
    pictures = iter(zip(counts, features.grid, strict=True))
    maps: list[list[Tensor]] = []
    for row, number in enumerate(family.pictures_per_row(base, inputs, counts)):
        values, start = received[row][visual[row]], 0
        maps.append([])
        for _ in range(number):
            count, grid = next(pictures)
            one = values[start : start + count]
            maps[-1].append(one if grid is None else one.reshape(grid))
            start += count
    return maps
