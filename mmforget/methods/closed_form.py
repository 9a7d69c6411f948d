"""Closed-form edits: which embedding rows enter, and the linear algebra that all layers share.

A layer ``W`` reads rows ``x`` of a text embedding. Erased rows ``c_i`` shall give what their guides
``g_i`` gave, preserved rows ``p_j`` what they gave before::

    min  sum_i e_i |W' c_i - W g_i|^2 + p sum_j |W' p_j - W p_j|^2 + lam |W' - W|^2

    W' = W + W T,   T = sum_i e_i (g_i - c_i) (A^-1 c_i)^T
    A = lam I + sum_i e_i c_i c_i^T + p sum_j p_j p_j^T

``T`` depends on the text only, so it is found once for all layers that read the same embedding.
With ``R`` the stacked rows, each times the root of its weight,
``A^-1 R^T = R^T (lam I + R R^T)^-1``: the system is as large as the number of rows or the width of
the embedding, whichever is smaller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmforget.concept import ConceptSpec
from mmforget.errors import ConfigurationError, DivergenceError
from mmforget.models.base import Segment
from mmforget.seeds import generator

logger = logging.getLogger(__name__)

Scope = Literal["last", "last_to_end", "all", "content_to_eos"]
Space = Literal["states", "pooled"]

TOLERANCE = 1e-6
"""Relative size of the singular values that compression drops."""

HELD_OUT = ("this is {}", "a large {} in the street")
"""Sentences that no kind has as a template, in which the drift of preserved words is measured."""


# ---- linear algebra -----------------------------------------------------------------------------


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64, and float32 on devices that have nothing better."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Solution:
    """The part of an edit that all layers with the same input share.

    Attributes:
        difference: (n, d) rows ``sqrt(e_i) (g_i - c_i)``.
        down: (n, d) rows ``sqrt(e_i) A^-1 c_i``; ``T = difference^T down``.
        residual: relative error of the linear system, a measure of its conditioning.
    """

    difference: Tensor
    down: Tensor
    residual: float

    def compressed(self) -> tuple[Tensor, Tensor]:
        """``T`` as ``left @ right`` of shapes (d, r) and (r, d), of the least rank."""
        return compress(self.difference.T, self.down)


def solve(
    erase: Tensor,
    guide: Tensor,
    keep: Tensor,
    lam: float,
    erase_weight: Tensor | float = 1.0,
    keep_weight: float = 1.0,
) -> Solution:
    """Solve for the edit of all layers that read these rows.

    Args:
        erase: (n, d) rows ``c_i``.
        guide: (n, d) rows ``g_i``.
        keep: (m, d) rows ``p_j``.
        lam: ridge, 0 or more; 0 needs linearly independent rows.
        erase_weight: ``e_i``, (n,) or one for all; 0 or more.
        keep_weight: ``p``, 0 or more.

    Raises:
        ConfigurationError: a negative ridge, or 0 with dependent rows.
        DivergenceError: rows that are not finite.
    """
    if not lam >= 0:
        raise ConfigurationError(f"`lam` is {lam}, it must be above 0")
    weight = torch.as_tensor(erase_weight, dtype=erase.dtype, device=erase.device)
    root = weight.sqrt().expand(len(erase))[:, None]
    rows = torch.cat([root * erase, keep_weight**0.5 * keep])
    if not (torch.isfinite(rows).all() and torch.isfinite(guide).all()):
        raise DivergenceError(
            "the text embeddings are not finite; check the text encoder, and load it in single "
            "precision"
        )
    count, width = rows.shape
    if count <= width:
        gram = rows @ rows.T
        gram.diagonal().add_(lam)
        right = torch.eye(count, len(erase), dtype=rows.dtype, device=rows.device)
    else:
        gram = rows.T @ rows
        gram.diagonal().add_(lam)
        right = rows[: len(erase)].T
    factor, failed = torch.linalg.cholesky_ex(gram)
    least = factor.diagonal().square().min() if not failed else torch.zeros(())
    if failed or float(least) <= 1e-12 * float(gram.diagonal().max()):
        raise ConfigurationError(
            f"`lambda` is {lam:g}, which is too small for {count} embedding rows that depend on "
            "each other; leave `lambda_rel` at 1e-3"
        )
    found = torch.cholesky_solve(right, factor)
    scale = right.norm().clamp(min=torch.finfo(rows.dtype).tiny)
    residual = float((gram @ found - right).norm() / scale)
    down = found.T @ rows if count <= width else found.T
    return Solution(root * (guide - erase), down, residual)


def compress(up: Tensor, down: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Rewrite ``up @ down`` with the least rank, by two thin QRs and one small SVD.

    Args:
        up: (out, n).
        down: (n, in).
        tolerance: singular values below this share of the largest are dropped.

    Returns:
        (out, r) and (r, in), r at least 1; the singular values are split evenly between them.
    """
    left, one = torch.linalg.qr(up)
    right, other = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(one @ other.T, full_matrices=False)
    rank = max(1, int((s > tolerance * s[0]).sum()))
    root = s[:rank].sqrt()
    return left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ right.T


def times(weight: Tensor, rows: Tensor) -> Tensor:
    """``weight @ rows`` for a stored weight: in single precision, or in double if it has it.

    Half-precision weights are promoted, never multiplied as they are. Converting a network to
    double would take longer than everything else, and the factors are stored in single precision.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) @ rows.to(weight.device, dtype)


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Embedding rows of one input space.

    Attributes:
        erase, guide: (n, d), aligned.
        weight: (n,) importance of the concept that a row belongs to.
        keep: (m, d).
    """

    erase: Tensor
    guide: Tensor
    weight: Tensor
    keep: Tensor


@dataclass(frozen=True)
class _Span:
    """Where a word ends up in one segment of one prompt, counted in the segment.

    Attributes:
        first, last: first and last token of the word; for the empty text, of what stands for it.
        end: the end token.
        stop: one past the last position that the network should read.
    """

    first: int
    last: int
    end: int
    stop: int


class Embedder:
    """Embeds prompts once and finds the rows that a scope selects.

    Args:
        model: a model that is `TextConditioned`.
        batch_size: prompts at a time.
    """

    def __init__(self, model: Any, batch_size: int = 32) -> None:
        self.model, self.batch_size = model, batch_size
        self._states: dict[str, Tensor] = {}
        self._pooled: dict[str, Tensor] = {}
        self._segments: dict[str, list[Segment]] = {}

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> None:
        """Embed those prompts that have not been seen yet."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._states]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            embedding = self.model.encode(part)
            for row, prompt in enumerate(part):
                self._states[prompt] = embedding.states[row]
                if embedding.pooled is not None:
                    self._pooled[prompt] = embedding.pooled[row]

    def segments(self, prompt: str) -> list[Segment]:
        """Tokens of one prompt, tokenizer by tokenizer."""
        if prompt not in self._segments:
            self._segments[prompt] = self.model.segments([prompt])
        return self._segments[prompt]

    def states(self, prompt: str) -> Tensor:
        """(L, d) in high precision."""
        self.read([prompt])
        value = self._states[prompt]
        return value.to(precise_dtype(value.device))

    def pooled(self, prompt: str) -> Tensor | None:
        """(p,) in high precision; None where the family has none."""
        self.read([prompt])
        value = self._pooled.get(prompt)
        return None if value is None else value.to(precise_dtype(value.device))

    def spans(self, sentence: str, word: str) -> list[_Span]:
        """Position of a word in a sentence, per segment; for the empty word, of the empty text."""
        spans = []
        before, _, _ = sentence.partition("{}")
        prompt = sentence.format(word) if word else ""
        for number, segment in enumerate(self.segments(prompt)):
            count = int(segment.content[0].sum())
            end = segment.begin + count
            # Tokenizers with a begin token (CLIP) pad with tokens that the network reads.
            stop = segment.content.shape[1] if segment.begin else end + 1
            if not word:
                # What stands for nothing is the begin token, or the end token if there is none.
                first = last = max(segment.begin - 1, 0)
            else:
                lead = int(self.segments(before)[number].content[0].sum())
                upto = int(self.segments(before + word)[number].content[0].sum())
                last = segment.begin + min(max(upto, 1), count) - 1
                first = min(segment.begin + lead, last)
            spans.append(_Span(first, last, min(end, stop - 1), stop))
        return spans

    def selected(self, sentence: str, word: str, scope: Scope) -> list[tuple[int, list[int]]]:
        """Per segment its start in the states, and the positions that a scope selects in it."""
        prompt = sentence.format(word) if word else ""
        return [
            (segment.start, _positions(span, scope, bool(segment.begin)))
            for segment, span in zip(self.segments(prompt), self.spans(sentence, word), strict=True)
        ]

    def pairs(self, sentence: str, word: str, guide: str, scope: Scope) -> tuple[Tensor, Tensor]:
        """Rows of a word and of its guide in the same sentence, aligned: (k, d) each."""
        mine = self.states(sentence.format(word))
        theirs = self.states(sentence.format(guide) if guide else "")
        erase, target = [], []
        both = zip(
            self.selected(sentence, word, scope),
            self.selected(sentence, guide, scope),
            self.segments(sentence.format(word)),
            strict=True,
        )
        for (start, one), (_, other), segment in both:
            padded = bool(segment.begin) and scope != "content_to_eos"
            for a, b in _aligned(one, other, padded):
                erase.append(start + a)
                target.append(start + b)
        return mine[erase], theirs[target]

    def kept(self, sentence: str, word: str, scope: Scope) -> Tensor:
        """Rows of a preserved word: (k, d)."""
        states = self.states(sentence.format(word) if word else "")
        where = [s + p for s, places in self.selected(sentence, word, scope) for p in places]
        return states[where]


def _positions(span: _Span, scope: Scope, padded: bool) -> list[int]:
    if scope == "last":
        return [min(span.end - 1, span.stop - 1)] if span.end > span.last else [span.last]
    if scope == "last_to_end":
        return list(range(span.last, span.stop))
    if scope == "all":
        return list(range(span.stop))
    return sorted({*range(span.first, span.last + 1), span.end})


def _aligned(one: list[int], other: list[int], padded: bool) -> list[tuple[int, int]]:
    """Pair positions of a concept with those of its guide.

    Padded sequences end at the same place, so what is left over of the longer one is trimmed.
    Otherwise the end tokens are paired, and surplus tokens of the concept get the guide's first.
    """
    if padded:
        return list(zip(one, other, strict=False))
    shift = len(one) - len(other)
    return [(place, other[max(i - shift, 0)]) for i, place in enumerate(one)]


def guide_word(concept: ConceptSpec) -> str:
    """What a concept becomes: its anchor, or for an attribute the prompt that is kept in use."""
    if concept.anchor is None and concept.erase_from is not None:
        return concept.erase_from
    return concept.anchor_text


def gather(embedder: Embedder, concepts: Sequence[ConceptSpec], scope: Scope) -> dict[Space, Rows]:
    """Collect the rows of all concepts, without repetitions.

    Preserved are the words of `preserve` and the anchors in all sentences, and every position of
    the empty text, which includes the begin token. An erased row that equals a preserved one, such
    as the beginning of a sentence in which only the later word differs, is not erased.

    Returns:
        Rows of ``states``, and of ``pooled`` where the family has it.
    """
    erase, guide, weight, keep = [], [], [], [embedder.kept("{}", "", "all")]
    pooled: dict[str, list[Tensor]] = {"erase": [], "guide": [], "weight": [], "keep": []}
    embedder.read(every_prompt(concepts))
    for concept in concepts:
        other = guide_word(concept)
        for sentence in concept.sentences:
            for word in concept.words:
                rows, targets = embedder.pairs(sentence, word, other, scope)
                erase.append(rows)
                guide.append(targets)
                weight.append(rows.new_full((len(rows),), concept.weight))
                one = embedder.pooled(sentence.format(word))
                if one is not None:
                    pooled["erase"].append(one)
                    to = embedder.pooled(sentence.format(other) if other else "")
                    assert to is not None
                    pooled["guide"].append(to)
                    pooled["weight"].append(one.new_tensor(concept.weight))
            for word in (*concept.preserve, *([other] if other else [])):
                keep.append(embedder.kept(sentence, word, scope))
                same = embedder.pooled(sentence.format(word))
                if same is not None:
                    pooled["keep"].append(same)
    found: dict[Space, Rows] = {
        "states": _distinct(torch.cat(erase), torch.cat(guide), torch.cat(weight), torch.cat(keep))
    }
    empty = embedder.pooled("")
    if empty is not None:
        stacked = {
            k: torch.stack([*v, *([empty] if k == "keep" else [])]) for k, v in pooled.items()
        }
        found["pooled"] = _distinct(**stacked)
    return found


def every_prompt(concepts: Sequence[ConceptSpec]) -> list[str]:
    """All prompts whose rows enter an edit."""
    prompts = [""]
    for concept in concepts:
        words = (*concept.words, *concept.preserve, guide_word(concept))
        prompts += [s.format(w) for s in concept.sentences for w in words if w]
    return prompts


def _distinct(erase: Tensor, guide: Tensor, weight: Tensor, keep: Tensor) -> Rows:
    keep = keep[_first_of_each(keep)]
    free = ~_occurs(erase, keep)
    erase, guide, weight = erase[free], guide[free], weight[free]
    rows = _first_of_each(torch.cat([erase, guide], 1))
    return Rows(erase[rows], guide[rows], weight[rows], keep)


def _sketch(rows: Tensor) -> tuple[Tensor, float]:
    """Few random projections of rows, in which equal rows are found fast, and a tolerance."""
    draw = torch.randn(rows.shape[1], 24, generator=generator(0, "sketch", rows.shape[1]))
    small = rows @ draw.to(rows)
    return small, 1e-4 * float(small.norm(dim=1).median().clamp(min=1e-12))


def _first_of_each(rows: Tensor) -> Tensor:
    """(n,) bool: rows that equal no earlier one, up to the rounding of the encoder."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool, device=rows.device)
    small, tolerance = _sketch(rows)
    first = [(torch.cdist(part, small) <= tolerance).int().argmax(1) for part in small.split(2048)]
    return torch.cat(first) == torch.arange(len(rows), device=rows.device)


def _occurs(rows: Tensor, among: Tensor) -> Tensor:
    small, tolerance = _sketch(torch.cat([rows, among]))
    mine, theirs = small[: len(rows)], small[len(rows) :]
    return torch.cat([(torch.cdist(part, theirs) <= tolerance).any(1) for part in mine.split(2048)])


def thinned(rows: Tensor, most: int) -> Tensor:
    """At most `most` rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).long()]


# ---- words to preserve --------------------------------------------------------------------------

NEIGHBOURS: dict[str, tuple[str, ...]] = {
    "object": (
        *("cat", "dog", "horse", "bird", "fish", "car", "bus", "boat", "airplane", "bicycle"),
        *("house", "church", "bridge", "tree", "flower", "mountain", "chair", "table", "book"),
        *("person", "woman", "man", "child", "city", "street", "beach", "apple", "bread"),
    ),
    "style": (
        *("Vincent van Gogh", "Claude Monet", "Pablo Picasso", "Rembrandt", "Edvard Munch"),
        *("Salvador Dali", "Paul Cezanne", "Gustav Klimt", "Johannes Vermeer", "Andy Warhol"),
        *("watercolor", "pencil sketch", "oil painting", "pop art", "photograph", "cartoon"),
    ),
    "person": (
        *("a man", "a woman", "a child", "an actor", "a singer", "a politician", "an athlete"),
        *("Albert Einstein", "Marilyn Monroe", "Abraham Lincoln", "Queen Elizabeth"),
    ),
    "unsafe": (
        *("a person", "a woman", "a man", "a child", "a couple", "a dancer", "a swimmer"),
        *("a portrait", "a crowd", "a doctor", "a soldier", "a landscape", "a city", "a dog"),
    ),
}
"""Words to preserve if the user names none, by kind; other kinds take those of objects."""

MOST_WORDS = 2000
SYNONYM = 0.95


def neighbours(
    embedder: Embedder, concept: ConceptSpec, erased: Callable[[str], bool], count: int = 12
) -> tuple[str, ...]:
    """Words that a concept's erasure endangers most, for users who name none.

    Candidates are a word list by kind and, if the tokenizer knows at most 2000 whole words, those.
    They are ranked by the cosine between the last rows of word and target, after the mean of all
    candidates is subtracted; what is closer than 0.95 counts as a synonym and is left out.

    Args:
        embedder: of the model.
        concept: that is erased.
        erased: says whether a word must not be preserved.
        count: at most so many words.
    """
    candidates = list(NEIGHBOURS.get(concept.kind, NEIGHBOURS["object"]))
    tokenizer = getattr(getattr(embedder.model, "pipeline", None), "tokenizer", None)
    if tokenizer is not None:
        words = sorted(
            piece.removesuffix("</w>")
            for piece in tokenizer.get_vocab()
            if piece.endswith("</w>") and piece[:-4].isalnum()
        )
        candidates += words if len(words) <= MOST_WORDS else []
    candidates = [word for word in dict.fromkeys(candidates) if not erased(word)]
    embedder.read(candidates)
    rows = torch.stack([embedder.kept("{}", word, "last")[-1] for word in candidates])
    target = embedder.kept("{}", concept.target, "last")[-1]
    middle = rows.mean(0)
    near = nn.functional.cosine_similarity(rows - middle, (target - middle)[None])
    order = near.argsort(descending=True).tolist()
    return tuple(candidates[i] for i in order if near[i] < SYNONYM)[:count]
