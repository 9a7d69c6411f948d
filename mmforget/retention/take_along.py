"""TVC, training: show the picture once more in the middle of an answer, pooled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmforget.data.hashing import uniform
from mmforget.errors import ConfigurationError, DataError
from mmforget.models.base import Batch
from mmforget.models.multimodal import AnswerLogits, MultimodalLM
from mmforget.models.multimodal_files import Dtype
from mmforget.models.multimodals.base import Part
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.retention.picture_context import Span, block, chosen, collated, pictures_of, words

BRIDGE = " Let me see the image again."
"""Said before a picture is shown once more."""

REFLECTIONS = ("wait", "let me check", "let me see", "alternatively", "on second thought")
"""Starts of sentences in which a chain of reasoning turns back."""

WINDOW = 8
"""Tokens that are decoded to see whether a sentence or a word ends."""


@dataclass(frozen=True)
class Reaffirmation:
    """Where and how a picture is shown again in an answer.

    Attributes:
        bridge: text before the picture; it is learnt.
        pool: so many by so many visual tokens become one.
        positions: shares of the answer's tokens, in (0, 1). Each is moved to the next end of a
            sentence, or where none follows to the next start of a word.
        before_markers: show it before every sentence that starts with one of `markers` instead.
        markers: see `before_markers` and `most_markers`; in lower case.
        min_tokens, max_tokens: answers with fewer or more tokens stay as they are.
        most_markers: so do answers with more of `markers`.
        pictures: which of a question's pictures, from 0; None is all.

    Raises:
        ConfigurationError: a value out of range.
    """

    bridge: str = BRIDGE
    pool: int = 4
    positions: tuple[float, ...] = (0.5,)
    before_markers: bool = False
    markers: tuple[str, ...] = REFLECTIONS
    min_tokens: int = 200
    max_tokens: int = 8000
    most_markers: int = 25
    pictures: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ConfigurationError(f"`pool` is {self.pool}; it must be at least 1")
        outside = [share for share in self.positions if not 0 < share < 1]
        if outside or not (self.positions or self.before_markers):
            raise ConfigurationError(
                f"`positions` is {list(self.positions)}; give shares of the answer in (0, 1)"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigurationError(
                f"`min_tokens` is {self.min_tokens} and `max_tokens` is {self.max_tokens}; the "
                "first must not be negative, nor above the second"
            )
        if self.before_markers and not self.markers:
            raise ConfigurationError("`before_markers` is set, but `markers` is empty; name some")

    def places(self, tokenizer: Any, tokens: Sequence[int]) -> list[int]:
        """Where to cut an answer: numbers of tokens, ascending; none if it stays as it is.

        Args:
            tokenizer: of the tokens.
            tokens: of the answer, without the end of the turn.
        """
        if not self.min_tokens <= len(tokens) <= self.max_tokens:
            return []
        if self._reflections(tokenizer.decode(list(tokens))) > self.most_markers:
            return []
        if self.before_markers:
            starts = range(1, len(tokens))
            return [p for p in starts if self._turns_back(tokenizer, tokens, p)]
        found = {self._snapped(tokenizer, tokens, share) for share in self.positions}
        return sorted(place for place in found if place)

    def _reflections(self, text: str) -> int:
        low = text.lower()
        return sum(len(re.findall(rf"\b{re.escape(marker)}\b", low)) for marker in self.markers)

    def _turns_back(self, tokenizer: Any, tokens: Sequence[int], place: int) -> bool:
        if not ends_sentence(tokenizer, tokens, place):
            return False
        ahead = tokenizer.decode(list(tokens[place : place + 2 * WINDOW])).strip().lower()
        return any(re.match(rf"{re.escape(marker)}\b", ahead) for marker in self.markers)

    def _snapped(self, tokenizer: Any, tokens: Sequence[int], share: float) -> int:
        """The cut of a share, 0 if there is none before the end."""
        first = max(1, int(share * len(tokens) + 0.5))
        for ends in (ends_sentence, starts_word):
            for place in range(first, len(tokens)):
                if ends(tokenizer, tokens, place):
                    return place
        return 0


def starts_word(tokenizer: Any, tokens: Sequence[int], place: int) -> bool:
    """Whether the token at a place starts a word."""
    before = tokenizer.decode(list(tokens[max(0, place - WINDOW) : place]))
    after = tokenizer.decode(list(tokens[max(0, place - WINDOW) : place + 1]))
    return before[-1:].isspace() or after[len(before) :][:1].isspace()


def ends_sentence(tokenizer: Any, tokens: Sequence[int], place: int) -> bool:
    """Whether a sentence or a line ends before a place."""
    before = tokenizer.decode(list(tokens[max(0, place - WINDOW) : place])).rstrip(" ")
    return before.endswith((".", "!", "?", "\n", "。")) and starts_word(tokenizer, tokens, place)


class Reaffirmed(NamedTuple):
    """A batch in which pictures are shown again.

    Attributes:
        inputs: of the network: ``inputs_embeds`` (B, L, D), ``attention_mask`` (B, L) and where the
            family needs them ``position_ids`` (3, B, L).
        labels: (B, L) token ids, -100 where nothing is learnt: at all visual tokens and the tokens
            around them.
        input_ids: (B, L) for whoever wants to know.
        reread: (B,) how often each row shows its picture again.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    input_ids: Tensor
    reread: list[int]


def dynamic_visual_reaffirmation(
    model: MultimodalLM,
    batch: Batch,
    settings: Reaffirmation | None = None,
    rows: Sequence[bool] | None = None,
    moved: Sequence[bool] | None = None,
    captions: Sequence[str] | None = None,
) -> Reaffirmed:
    """Insert a bridge and the pooled picture into the answers of a batch (DVR).

    An answer becomes ``first part + bridge + picture + second part``. Its own tokens stay the same;
    those of the bridge are learnt too, those of the picture are not. Gradients reach the projector
    through both places where the picture stands. Rows without picture, and those that `settings`
    filter out, stay as they are.

    The authors published their training configuration only, so that all details beyond their paper
    are ours; so is `moved`.

    Args:
        model: the model.
        batch: with answers; see `MultimodalLM`.
        settings: where and how; None takes the paper's.
        rows: (B,) which rows; None takes all.
        moved: (B,) rows whose picture is not shown at the start, as at inference when it is moved
            (`PeriodicVisualCalibration`); there, what comes before it cannot be known, and is not
            learnt. None: the picture stays in all rows, as in the paper.
        captions: (B,) texts to put behind the picture, learnt; empty ones for none.

    Raises:
        AccessError: the batch has no answers.
        DataError: a row that becomes longer than the model's `max_length`.
        ConfigurationError: `settings` names a picture that a row does not have.
    """
    settings = settings or Reaffirmation()
    inputs = model.inputs(batch)
    pictures, ends = pictures_of(model, inputs), set(model.end_ids)
    bare = None
    if moved is not None and any(moved):
        asked = {"images": [[] for _ in batch["question"]], "question": batch["question"]}
        bare = model.inputs(asked, padding="left", answers=False)
    spans, labels, reread = [], [], []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][row][mask].tolist()
        learnt = inputs["labels"][row][mask].tolist()
        start = next(place for place, label in enumerate(learnt) if label != IGNORED)
        end = start
        while end < len(ids) and learnt[end] != IGNORED and ids[end] not in ends:
            end += 1
        cuts: list[int] = []
        if pictures[row] and (rows is None or rows[row]):
            cuts = settings.places(model.processor.tokenizer, ids[start:end])
        prompt, blind = Span(ids[:start], pictures[row]), False
        if cuts and bare is not None and moved is not None and moved[row]:
            kept = bare["attention_mask"][row].bool()
            prompt, blind = Span(bare["input_ids"][row][kept].tolist()), True
        span, own = prompt, [IGNORED] * len(prompt.ids)
        if cuts:
            again = chosen(pictures[row], settings.pictures, len(batch["images"][row]))
            shown = block(model, [picture.pooled(settings.pool) for picture in again])
            bridge = words(model, settings.bridge)
            caption = words(model, captions[row]) if captions and captions[row] else Span()
            for before, after in zip([0, *cuts], cuts, strict=False):
                part = Span(ids[start + before : start + after]) + bridge
                known = before > 0 or not blind
                span = span + part + shown + caption
                own += part.ids if known else [IGNORED] * len(part.ids)
                own += [IGNORED] * len(shown.ids) + caption.ids
        rest = start + (cuts[-1] if cuts else 0)
        spans.append(span + Span(ids[rest:]))
        labels.append(own + learnt[rest:])
        reread.append(len(cuts))
    found = collated(model, spans, padding="right")
    length = found["inputs_embeds"].shape[1]
    if model.max_length is not None and length > model.max_length:
        raise DataError(
            f"a row of the batch has {length} tokens with its pictures shown again, more than "
            f"`max_length` {model.max_length}; pool more, or raise it"
        )
    padded = torch.full((len(labels), length), IGNORED, dtype=torch.int64)
    for row, own in enumerate(labels):
        padded[row, : len(own)] = torch.tensor(own)
    all_ids = found.pop("input_ids")
    return Reaffirmed(found, padded.to(all_ids.device), all_ids, reread)


def reaffirmed_logits(model: MultimodalLM, given: Reaffirmed) -> AnswerLogits:
    """Scores at the answers of a batch in which pictures are shown again; one forward pass."""
    labels, seen = given.labels, []
    last = labels.shape[1] - int((labels != IGNORED).int().argmax(dim=1).min()) + 1
    handle = model.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        output = model.network(**given.inputs, logits_to_keep=last, use_cache=False)
    finally:
        handle.remove()
    return AnswerLogits(output.logits[:, :-1], labels[:, 1 - last :], seen[-1][:, :-1])


class TakeAlongLM(MultimodalLM):
    """A multimodal language model that is trained with its pictures shown again (TVC).

    While it is in training mode, a share of the samples goes through
    `dynamic_visual_reaffirmation`; which ones depends on their ids and the seed only, as if they
    had been prepared once and for all. Evaluation, answers and files are those of `MultimodalLM`:
    nothing is added to the network. `PeriodicVisualCalibration` then answers with the picture shown
    again.

    The paper trains the language model and the projector (learning rate 2e-5, warm-up 10 %,
    5 epochs), the tower frozen.

    Args:
        network, processor, pretrained, dtype, trained, max_length, max_new_tokens, lr,
            weight_decay, warmup: see `MultimodalLM`.
        share: of the samples, in [0, 1].
        moved: share of those that do not show the picture at the start, in [0, 1]; 0 is the
            paper's, above 0 prepares for the mode ``move``.
        bridge, pool, positions, before_markers, min_tokens, max_tokens: see `Reaffirmation`.
        seed: of the choice of samples.

    Raises:
        ConfigurationError: a share out of range; see also `Reaffirmation` and `MultimodalLM`.

    Reference:
        Sun et al., Mitigating visual forgetting via take-along visual conditioning for multi-modal
        long CoT reasoning, 2025, arXiv 2503.13360.
    """

    def __init__(
        self,
        network: str | Path | nn.Module,
        processor: Any = None,
        pretrained: bool = True,
        dtype: Dtype = "float32",
        trained: Sequence[Part] = ("projector", "language", "head"),
        max_length: int | None = None,
        max_new_tokens: int = 32,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.1,
        share: float = 1.0,
        moved: float = 0.0,
        bridge: str = BRIDGE,
        pool: int = 4,
        positions: Sequence[float] = (0.5,),
        before_markers: bool = False,
        min_tokens: int = 200,
        max_tokens: int = 8000,
        seed: int = 0,
    ) -> None:
        super().__init__(
            network,
            processor,
            pretrained,
            dtype,
            trained,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
        )
        for name, value in (("share", share), ("moved", moved)):
            if not 0 <= value <= 1:
                raise ConfigurationError(f"`{name}` is {value}; it must lie in [0, 1]")
        self.share, self.moved, self.seed = share, moved, seed
        self.reaffirmation = Reaffirmation(
            bridge,
            pool,
            tuple(positions),
            before_markers,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
        )

    def answer_logits(self, batch: Batch) -> AnswerLogits:
        """Scores at the answers of a batch; in training, with pictures shown again."""
        if not self.training:
            return super().answer_logits(batch)
        ids = batch["id"].cpu().numpy()
        given = dynamic_visual_reaffirmation(
            self,
            batch,
            self.reaffirmation,
            rows=(uniform(ids, self.seed, "reaffirmed") < self.share).tolist(),
            moved=(uniform(ids, self.seed, "moved") < self.moved).tolist(),
        )
        return reaffirmed_logits(self, given)
