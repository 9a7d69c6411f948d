"""The truth about the shipped model whose memories were planted into known hidden units."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmforget.models.base import state_hash
from mmforget.models.weight_mask import WeightMask

SHARE = 4
"""One hidden unit in four of every feed-forward layer holds memories, the first ones."""


def located_mask(model: Any) -> WeightMask:
    """The columns of the feed-forward output layers that hold the planted posters, and only these.

    With them set to zero, the network computes what the reference without planted pictures does,
    up to what the penalty in training has left.

    Args:
        model: the shipped `memorizing_unet_located` or a model of the same architecture.
    """
    masks, columns = {}, {}
    for name, module in model.network.named_modules():
        if name.endswith("ff.net.2") and isinstance(module, nn.Linear):
            taken = torch.arange(module.in_features) < module.in_features // SHARE
            masks[f"{name}.weight"] = taken.expand(module.out_features, -1).clone()
            columns[f"{name}.weight"] = [0, module.in_features]
    return WeightMask.described(
        model, masks, state_hash(model.network), unit="column", columns=columns, method="oracle"
    )
