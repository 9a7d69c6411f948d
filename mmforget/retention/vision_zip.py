"""VisionZip: the tokens that the vision tower looks at, and the rest merged into a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import ConfigurationError, suggest
from mmforget.models.multimodals.base import Inputs, MultimodalFamily
from mmforget.retention.token_budget import highest
from mmforget.retention.token_reduction import PictureTokens
from mmforget.retention.tower_attention import TowerView, tower_view
from mmforget.retention.visual_features import FeatureReducer

Merge = Literal["sum", "mean"]


class VisionZip(FeatureReducer):
    r"""Keep dominant tokens by the tower's own attention, and merge all others into a few.

    In one block of the tower, *dominant* tokens are those with the highest attention of the class
    token, summed over heads. Of the n others every :math:`\lfloor n/c\rfloor`-th is a target; each
    remaining token joins the target whose key (mean over heads) has the highest cosine similarity.
    A *contextual* token is its target plus the mean of what joined it. Nothing is trained, and the
    question is not read.

    Ours differs from the released code: features are merged after the projector, since most
    families mix neighbouring patches in it; contextual tokens stand at the places of their targets
    among the dominant ones, not behind them; the class token itself, on which LLaVA was not
    trained, is not added (it counts among the dominant ones there, so "54 + 10" is 53 + 10 here);
    towers without class token use the attention that a token gets from all others.

    Args:
        keep_tokens: dominant and contextual ones together; see `TokenBudget`.
        keep_ratio: see `TokenBudget`.
        contextual: share of the budget for contextual tokens, in [0, 1), a half rounded up; the
            released code takes 10 of 64.
        merge: ``sum`` adds the mean of the joined tokens to the target (the released code);
            ``mean`` averages target and joined tokens, which keeps the size of the features.
        tower_block: block of the tower, negative from the end.
        keep_positions: see `FeatureReducer`.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR
        2025, arXiv 2412.04467.
    """

    merges = True

    def __init__(
        self,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
        contextual: float = 10 / 64,
        merge: Merge = "sum",
        tower_block: int = -2,
        keep_positions: bool = False,
    ) -> None:
        super().__init__(keep_tokens, keep_ratio, keep_positions)
        if not 0.0 <= contextual < 1.0:
            raise ConfigurationError(f"`contextual` is {contextual}; it must lie in [0, 1)")
        if merge not in get_args(Merge):
            raise ConfigurationError(f"`merge` is '{merge}', {suggest(merge, get_args(Merge))}")
        self.contextual, self.merge, self.tower_block = contextual, merge, tower_block

    def viewed(self, family: MultimodalFamily, network: Any, inputs: Inputs) -> TowerView:
        """Encode the pictures and look into the tower."""
        return tower_view(family, network, inputs, self.tower_block)

    def chosen(self, tokens: PictureTokens) -> tuple[Tensor, Tensor]:
        """Dominant tokens, and contextual ones at the places of their targets."""
        assert tokens.attention is not None and tokens.keys is not None  # `viewed` gave them
        merged = math.floor(self.contextual * tokens.keep + 0.5)
        dominant = highest(tokens.attention, tokens.keep - merged)
        if not merged:
            return tokens.features[dominant], dominant
        others = torch.ones(len(tokens.features), dtype=torch.bool, device=dominant.device)
        others[dominant] = False
        rest = others.nonzero()[:, 0]
        targets, contextual = self._contextual(tokens.features[rest], tokens.keys[rest], merged)
        places, order = torch.cat((dominant, rest[targets])).sort()
        return torch.cat((tokens.features[dominant], contextual))[order], places

    def _contextual(self, features: Tensor, keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Rows of the targets (c,), and what they become (c, D)."""
        step = len(features) // number
        targets = torch.arange(number, device=features.device) * step
        joining = torch.ones(len(features), dtype=torch.bool, device=features.device)
        joining[targets] = False
        unit = F.normalize(keys, dim=-1)
        nearest = (unit[joining] @ unit[targets].T).argmax(dim=1)
        sums = features.new_zeros(number, features.shape[1])
        sums = sums.index_add(0, nearest, features[joining])
        joined = torch.bincount(nearest, minlength=number)[:, None]
        if self.merge == "mean":
            return targets, (features[targets] + sums) / (joined + 1)
        return targets, features[targets] + sums / joined.clamp(min=1)
