"""FastV: visual tokens to which the end of the prompt pays no attention are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmforget.errors import ConfigurationError, suggest
from mmforget.retention.token_budget import Scope
from mmforget.retention.token_pruning import HEADS, QUERIES, Heads, Mode, Queries, TokenPruner
from mmforget.retention.token_reduction import PictureTokens


@dataclass(frozen=True)
class AttentionScores:
    """Attention that a token receives in the layer before the one from which on it is dropped.

    Args:
        queries: ``last`` (the last token of the prompt, as in FastV) or ``text`` (the mean over all
            tokens of the prompt that are no visual ones).
        heads: ``mean`` (FastV) or ``max`` over the heads.
    """

    queries: Queries = "last"
    heads: Heads = "mean"

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("queries", self.queries, QUERIES),
            ("heads", self.heads, HEADS),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")

    def __call__(self, tokens: PictureTokens) -> Tensor:
        """Return (N,) attention weights."""
        if tokens.attention is None:
            raise ConfigurationError(
                "attention scores exist only between decoder layers; use them in a `TokenPruner`"
            )
        return tokens.attention


class FastV(TokenPruner):
    r"""Drop visual tokens before decoder layer K by the attention of layer K - 1.

    The score of visual token j is :math:`\frac1H\sum_h A^{K-1}_{h,t,j}` with t the last token of
    the prompt; the highest scores stay, at their original positions. Nothing is trained; no weight
    is changed. Reads no data but the prompt.

    The released code takes the scores of the first sample for the whole batch, wants the place and
    the number of the visual tokens as constants, runs all layers on the eager kernel, and chooses
    again at every step unless it caches; with a cache it fixes the choice at the prompt. Ours
    scores each picture of each row, recomputes the weights of the needed queries only, and fixes
    the choice at the prompt. (Without a cache, every step is a prompt of its own.) Where there are
    labels, the prompt ends before the first of them, so that the answer does not choose.

    Args:
        keep_tokens: see `TokenBudget`.
        keep_ratio: see `TokenBudget`; the paper's R is what is dropped, ``1 - keep_ratio``.
        layer: K, from 1 to the number of layers - 1; the paper takes 2, or 3.
        queries: see `AttentionScores`.
        heads: see `AttentionScores`.
        mode: see `TokenPruner`.
        scope: see `TokenPruner`.
        turns: see `TokenPruner`.

    Raises:
        ConfigurationError: a setting out of range.

    Reference:
        Chen et al., An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference
        Acceleration for Large Vision-Language Models, ECCV 2024, arXiv 2403.06764.
    """

    def __init__(
        self,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
        layer: int = 2,
        queries: Queries = "last",
        heads: Heads = "mean",
        mode: Mode = "drop",
        scope: Scope = "picture",
        turns: bool = False,
    ) -> None:
        scorer = AttentionScores(queries, heads)
        super().__init__(scorer, keep_tokens, keep_ratio, layer, mode, scope, turns)
