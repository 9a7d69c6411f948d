"""Do different seeds give the same picture? Needs nothing but pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.detection.report import DetectionReport
from mmforget.errors import ConfigurationError, DataError, RequestError, suggest
from mmforget.metrics.copying import CopySimilarity, PixelDistance

ConsistencyScore = Literal["clique", "similarity"]

EXACT = 64
"""Pictures up to which the largest clique is searched for exactly."""


def seed_consistency(
    images: Tensor,
    prompts: Sequence[str],
    *,
    clique: int = 10,
    similarity: CopySimilarity | None = None,
    threshold: float | None = None,
    score: ConsistencyScore = "clique",
) -> DetectionReport:
    """Score prompts by how many of their pictures are near-duplicates of each other.

    Two pictures are joined if they are more alike than the threshold. A prompt is called memorized
    if some `clique` of its pictures are all joined with each other; the paper makes 500 pictures
    per prompt and asks for cliques of 10. Templates, of which a part varies, need a similarity that
    tolerates it.

    Args:
        images: (P * n, 3, H, W) float in [0, 1], n per prompt in the order of the prompts, of
            different seeds, as `DiffusionGenerator.generate` returns them.
        prompts: P different texts.
        clique: pictures that must agree, from 2 to n.
        similarity: how alike is measured; None takes `PixelDistance`.
        threshold: None takes the similarity's own.
        score: ``clique``: the largest number of pictures that agree; ``similarity``: the median
            over pairs, which ranks prompts more finely.

    Returns:
        `details` per prompt: ``clique``, ``exact`` (with more than 64 pictures a clique that is
        large but perhaps not the largest is found), ``flagged``, ``median_similarity``, and
        ``members``, the numbers of the pictures that agree.

    Raises:
        RequestError: prompts that are none or not different.
        DataError: pictures that are not equally many for all prompts.
        ConfigurationError: a setting out of range.

    Reference:
        Carlini et al., Extracting training data from diffusion models, 2023, arXiv 2301.13188.
    """
    if isinstance(prompts, str) or not prompts or len(set(prompts)) != len(prompts):
        raise RequestError("`prompts` must be a list of different texts, at least one")
    n, rest = divmod(len(images), len(prompts))
    if rest or n < 2:
        raise DataError(
            f"there are {len(images)} pictures for {len(prompts)} prompts; give equally many for "
            "each, at least two"
        )
    if not 2 <= clique <= n:
        raise ConfigurationError(
            f"`clique` is {clique}, it must be from 2 to the {n} pictures per prompt; make more "
            "pictures or ask for fewer"
        )
    if score not in get_args(ConsistencyScore):
        raise ConfigurationError(
            f"`score` is '{score}', {suggest(score, get_args(ConsistencyScore))}"
        )
    measure: CopySimilarity = PixelDistance() if similarity is None else similarity
    limit = measure.threshold if threshold is None else threshold
    begin = time.process_time()
    details: dict[str, dict[str, Any]] = {}
    for prompt, own in zip(prompts, images.split(n), strict=True):
        alike = measure.matrix(own, own)
        pairs = alike[torch.ones(n, n).triu(1).bool()]
        members, exact = largest_clique(alike > limit)
        details[prompt] = {
            "clique": len(members),
            "exact": exact,
            "flagged": len(members) >= clique,
            "median_similarity": float(pairs.quantile(0.5)),
            "members": members,
        }
    key = "clique" if score == "clique" else "median_similarity"
    return DetectionReport(
        name="seed_consistency",
        scores={prompt: float(found[key]) for prompt, found in details.items()},
        higher_is_memorized=True,
        protocol={"score": score, "threshold": limit, "similarity": measure.protocol()},
        settings={"n": n, "clique": clique},
        details=details,
        seconds=round(time.process_time() - begin, 3),
    )


def largest_clique(joined: Tensor, exact_up_to: int = EXACT) -> tuple[list[int], bool]:
    """Find the largest set of nodes that are all joined with each other.

    Branch and bound: a set of nodes that can be coloured with k colours, joined nodes differently,
    has no clique of more than k.

    Args:
        joined: (N, N) bool, symmetric; the diagonal does not count.
        exact_up_to: nodes; larger graphs get the best clique that grows greedily from some node.

    Returns:
        The nodes in order, and whether no larger clique exists.

    Raises:
        DataError: no symmetric square matrix of bool.

    Reference:
        Tomita and Seki, An efficient branch-and-bound algorithm for finding a maximum clique, 2003.
    """
    if joined.dtype != torch.bool or joined.ndim != 2 or not torch.equal(joined, joined.T):
        raise DataError(
            f"`joined` is {tuple(joined.shape)} {joined.dtype}; it must be a symmetric square "
            "matrix of bool"
        )
    rows = joined.tolist()
    near = [{b for b, one in enumerate(row) if one and b != a} for a, row in enumerate(rows)]
    best: list[int] = max(
        (_greedy([node], near[node], near) for node in range(len(near))), key=len, default=[]
    )
    if len(near) > exact_up_to:
        return sorted(best), False

    def search(chosen: list[int], candidates: set[int]) -> None:
        nonlocal best
        if len(chosen) > len(best):
            best = chosen
        coloured = _coloured(candidates, near)
        left = set(candidates)
        for node, colour in reversed(coloured):
            if len(chosen) + colour <= len(best):
                return
            search([*chosen, node], left & near[node])
            left.discard(node)

    search([], set(range(len(near))))
    return sorted(best), True


def _greedy(chosen: list[int], candidates: set[int], near: list[set[int]]) -> list[int]:
    """Add the candidate with most neighbours among the candidates until none is left."""
    while candidates:
        node = max(sorted(candidates), key=lambda one: len(near[one] & candidates))
        chosen, candidates = [*chosen, node], candidates & near[node]
    return chosen


def _coloured(candidates: set[int], near: list[set[int]]) -> list[tuple[int, int]]:
    """Nodes with their colours from 1, in the order of the colours."""
    left, colour, found = set(candidates), 0, []
    while left:
        colour += 1
        free = set(left)
        while free:
            node = min(free)
            free -= near[node]
            free.discard(node)
            left.discard(node)
            found.append((node, colour))
    return found
