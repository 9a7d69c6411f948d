"""A2SF: accumulated attention with a forgetting factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.retention.eviction_policy import EvictionPolicy, Step

NEGLIGIBLE = 1e-9


class A2SF(EvictionPolicy):
    """Scores a key by the attention that it got, older queries counting less.

    With the softmax attention S[q, k] of query q to key k, after n queries
    ``A[n, k] = sum_q alpha^(n - q) S[q, k] = S[n, k] + alpha A[n - 1, k]``, summed over the query
    heads of a key head. Plain sums (`H2O`) favour early keys, which more queries can see under a
    causal mask. Only queries that are not padding count as steps.

    The paper evicts after every step, ``when="every_step"``, without a window of recent keys; the
    released code evicts once, after the prompt, and always keeps the last 16 keys
    (``when="prefill", recent=16``).

    Args:
        alpha: forgetting factor in [0, 1]; 0 looks at the last query only, 1 is H2O's sum. The
            paper's best values lie between 0.1 and 0.3, the released example uses 0.95.

    Raises:
        ConfigurationError: `alpha` is out of range.

    Reference:
        Jo, Shin, A2SF: Accumulative attention scoring with forgetting factor for token pruning in
        transformer decoder, 2024, arXiv 2407.20485.
    """

    def __init__(self, alpha: float = 0.3) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigurationError(f"`alpha` is {alpha}; it must lie in [0, 1]")
        self.alpha = alpha

    @property
    def reach(self) -> int | None:
        """Query rows that can matter: what lies further back has a factor below 1e-9."""
        if self.alpha == 1:
            return None
        return math.ceil(math.log(NEGLIGIBLE) / math.log(self.alpha)) if self.alpha else 1

    def update(self, score: Tensor, step: Step) -> Tensor:
        """Decay the old sums and add the attention of the new queries."""
        alpha = torch.tensor(self.alpha, device=score.device)
        total = score * (alpha ** step.valid.sum(dim=1))[:, None, None]
        for weights, after, valid in step.rows(self.reach):
            total = total + torch.einsum("bgrn,br->bgn", weights, alpha**after * valid)
        return total
