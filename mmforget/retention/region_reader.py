"""Attention of every visual token to the uncompressed features of its own region of the picture."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError


@functools.lru_cache(maxsize=64)
def region_index(grid: tuple[int, int], source: tuple[int, int], window: int) -> Tensor:
    """The features in the region of every visual token.

    Token (i, j) of a grid h x w looks at the `window` x `window` features of the grid H x W whose
    centre is nearest to its own; regions that would reach beyond the border are moved inside.

    Returns:
        (h * w, window * window) int64 indices, row by row.

    Raises:
        CapabilityError: the window is larger than the picture.
    """
    if window > min(source):
        raise CapabilityError(
            f"a `window` of {window} does not fit into {source[0]}x{source[1]} features; choose a "
            "smaller one"
        )
    rows, columns = (_starts(g, s, window) for g, s in zip(grid, source, strict=True))
    inside = torch.arange(window)
    high = (rows[:, None] + inside)[:, None, :, None]
    wide = (columns[:, None] + inside)[None, :, None, :]
    return (high * source[1] + wide).reshape(grid[0] * grid[1], window * window)


def _starts(tokens: int, features: int, window: int) -> Tensor:
    centre = (torch.arange(tokens) + 0.5) * features / tokens
    return (centre - window / 2 + 0.5).floor().long().clamp(0, features - window)


class RegionReader(nn.Module):
    r"""Cross-attention from visual tokens to features of their region; a residual, ungated.

    With X the hidden states of a picture's visual tokens and F the features of its patches,

    .. math::
        Q = LN(W_q RMSNorm(X)), K = LN(W_k F), V = LN(W_v F) \\
        A = softmax(Q K^T / \sqrt{d} + b + \log s), \quad Y = W_o A V

    over the `window` x `window` features of each token's region, with a learnt bias b per head and
    place in the region, and the saliency s: a softmax over the region of one scalar per feature,
    ``w GELU(U K)``.

    With `text_guided`, the tokens then exchange what they read: all of a picture's tokens X + Y and
    a guide (the mean of the question's hidden states) attend to each other in both directions, and
    the result is added to Y.

    Args:
        width: of the hidden states.
        source: of the features.
        inner: of queries, keys and values; a multiple of `heads`.
        heads: of the attention.
        window: side of a region, in features.
        saliency: weigh the features of a region; False weighs them equally.
        text_guided: see above.

    Raises:
        ConfigurationError: a value out of range.
    """

    def __init__(
        self,
        width: int,
        source: int,
        inner: int,
        heads: int,
        window: int,
        saliency: bool = True,
        text_guided: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("inner", inner), ("heads", heads), ("window", window)):
            if value < 1:
                raise ConfigurationError(f"`{name}` is {value}; it must be at least 1")
        if inner % heads:
            raise ConfigurationError(f"`inner` is {inner}; it must be a multiple of {heads} heads")
        self.heads, self.window = heads, window
        self.norm = nn.RMSNorm(width)
        self.query = nn.Sequential(nn.Linear(width, inner, bias=False), nn.LayerNorm(inner))
        self.key = nn.Sequential(nn.Linear(source, inner, bias=False), nn.LayerNorm(inner))
        self.value = nn.Sequential(nn.Linear(source, inner, bias=False), nn.LayerNorm(inner))
        self.place = nn.Parameter(torch.zeros(heads, window * window))
        self.saliency = (
            nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, 1, bias=False))
            if saliency
            else None
        )
        self.out = nn.Linear(inner, width, bias=False)
        self.exchange = TokenExchange(width, inner, heads) if text_guided else None

    def forward(
        self, states: Tensor, features: Tensor, index: Tensor, guide: Tensor | None = None
    ) -> Tensor:
        """What is to be added to the hidden states.

        Args:
            states: (P, N, D) hidden states of the visual tokens of P pictures.
            features: (P, M, C).
            index: (N, W) the region of every token; see `region_index`.
            guide: (P, D) mean of the question's hidden states, for `text_guided`.

        Returns:
            (P, N, D).
        """
        key, value = self.key(features), self.value(features)
        query = self._split(self.query(self.norm(states)))  # P, N, H, d
        scores = torch.einsum("pnhd,pnwhd->pnhw", query, self._split(key[:, index]))
        scores = scores / query.shape[-1] ** 0.5 + self.place
        if self.saliency is not None:
            scores = scores + self.saliency(key)[:, index, 0].log_softmax(dim=-1)[:, :, None]
        weights = scores.softmax(dim=-1)
        read = torch.einsum("pnhw,pnwhd->pnhd", weights, self._split(value[:, index]))
        found: Tensor = self.out(read.flatten(2))
        if self.exchange is not None:
            assert guide is not None  # the caller knows whether it is wanted
            found = found + self.exchange(states + found, guide)
        return found

    def _split(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.heads, -1))


class TokenExchange(nn.Module):
    """Attention among the visual tokens of a picture and one guide, in both directions.

    Args:
        width: of the hidden states.
        inner: of queries, keys and values.
        heads: of the attention.
    """

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.guide = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.project = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, guide: Tensor) -> Tensor:
        """What is to be added to the visual tokens (P, N, D), guided by (P, D)."""
        both = self.norm(torch.cat([self.guide(guide)[:, None], states], dim=1))
        parts = self.project(both).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query[:, :, 1:], key, value)
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found
