"""Average pooling of the grid of visual tokens: the plainest way to have fewer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmforget.errors import DataError
from mmforget.retention.token_budget import cell_centres, even_grid
from mmforget.retention.token_reduction import PictureTokens
from mmforget.retention.visual_features import FeatureReducer


class PooledTokens(FeatureReducer):
    """Average the tokens of a picture over the cells of a coarser grid, before the language model.

    The grid is the finest one of at most as many cells as the budget (`even_grid`): a quarter of
    the tokens of a square grid of even side is 2 x 2 pooling. Cells of uneven size overlap by one
    token, as in `torch.nn.functional.adaptive_avg_pool2d`. Where no grid fits, fewer tokens stay
    than the budget allows; see `kept`.

    Raises:
        DataError: tokens that form no grid.
    """

    merges = True

    def chosen(self, tokens: PictureTokens) -> tuple[Tensor, Tensor]:
        """Pooled tokens, each at the place nearest to the centre of its cell."""
        if tokens.grid is None:
            raise DataError(
                f"picture {tokens.number} of row {tokens.row} has {len(tokens.features)} visual "
                "tokens that form no grid, so they cannot be pooled; use another reducer"
            )
        if tokens.keep == 0:
            return tokens.features[:0], torch.arange(0)
        cells = even_grid(tokens.grid, tokens.keep)
        planes = tokens.features.reshape(*tokens.grid, -1).permute(2, 0, 1)
        pooled = F.adaptive_avg_pool2d(planes[None], cells)[0]
        return pooled.flatten(1).T, cell_centres(tokens.grid, cells)
