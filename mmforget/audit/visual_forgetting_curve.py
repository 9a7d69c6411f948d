"""How long a model needs its picture: it is taken away on the way, and the answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.metrics.answers import exact_match
from mmforget.metrics.rates import Mean
from mmforget.metrics.visual_forgetting import ForgettingCurve, Removal
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import Inputs, unwrapped
from mmforget.retention.picture_context import (
    Reader,
    Span,
    block,
    chosen,
    prompts,
    spans,
    text_of,
    words,
)
from mmforget.retention.take_along import Reaffirmation

Judge = Callable[[str, str], float]
"""Scores an answer against the true one, 1 for a right answer."""


@dataclass(frozen=True)
class CutAnswers:
    """What a model answered with its picture, without it, and with it taken away on the way.

    Attributes:
        full: N answers with the picture.
        without: N answers to the question without any picture.
        cut: per place N answers; the first part is that of `full`, the rest was said without.
        kept: per place N first parts that were said with the picture.
        removal: how the picture was taken away.
        again: how it was shown again at the same place, or None.
    """

    full: tuple[str, ...]
    without: tuple[str, ...]
    cut: tuple[tuple[str, ...], ...]
    kept: tuple[tuple[str, ...], ...]
    removal: Removal
    again: Reaffirmation | None = None

    def curve(self, truths: Sequence[str], judge: Judge = exact_match) -> ForgettingCurve:
        """Accuracies by place.

        Args:
            truths: N true answers.
            judge: scores one answer.
        """
        means = [
            sum(judge(answer, truth) for answer, truth in zip(given, truths, strict=True))
            / len(given)
            for given in (self.full, *self.cut)
        ]
        return ForgettingCurve(means[0], tuple(means[1:]), self.removal, len(self.full))

    def accuracy_without(self, truths: Sequence[str], judge: Judge = exact_match) -> Mean:
        """Accuracy on the questions alone, without any picture."""
        found = [judge(one, truth) for one, truth in zip(self.without, truths, strict=True)]
        return Mean(float(sum(found)), len(found))

    def remaining(self, truths: Sequence[str]) -> tuple[Mean, ...]:
        """Share of right words, by place, among those of the true answer that came after the cut.

        Words count at their place in the answer. Where nothing is left to say, there is no word.
        """
        found = []
        for given, kept in zip(self.cut, self.kept, strict=True):
            right = number = 0
            for answer, first, truth in zip(given, kept, truths, strict=True):
                start, said, true = len(first.split()), answer.split(), truth.split()
                number += len(true[start:])
                right += sum(a == b for a, b in zip(said[start:], true[start:], strict=False))
            found.append(Mean(float(right), number))
        return tuple(found)


@torch.no_grad()
def cut_answers(
    model: MultimodalLM,
    images: Sequence[Sequence[Tensor]],
    questions: Sequence[str],
    *,
    places: int = 9,
    removal: Removal = "reprefill",
    again: Reaffirmation | None = None,
    blank: Tensor | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> CutAnswers:
    """Answer greedily, and again with the picture taken away after shares of the answer.

    Place k of K + 1 lies after ``floor(k * R / K)`` of the R tokens of the answer. There, with

    * ``reprefill``, question and first part are read anew without the picture;
    * ``evict``, the keys and values of all visual tokens are hidden; the last token before the cut
      is read once more, so that what it says next does not come from the picture either. Text that
      was read with the picture in sight still carries what it saw, even at place 0;
    * ``blank``, question and first part are read anew with an empty picture in its place.

    Args:
        model: the model; it is not changed. With Vision Remember, `again` must be None.
        images: per question a list of pictures, uint8 (3, H, W).
        questions: texts.
        places: K + 1, at least 2.
        removal: see above.
        again: show the picture once more at the place where it is taken away, with this bridge,
            pooling and choice of pictures. What then remains of the loss is what showing it again
            cannot mend.
        blank: (3,) uint8 colour of the empty picture; None is the mean of all pictures. (The mean
            picture of a few samples would still show them.)
        max_new_tokens: most tokens of an answer; None takes the model's.
        batch_size: of the questions that are answered together.

    Raises:
        DataError: a question without picture, or other numbers of questions and pictures.
        ConfigurationError: an argument out of range.
        CapabilityError: `again` with Vision Remember, or pooling of tokens that form no grid.

    Reference:
        Sun et al., Mitigating visual forgetting via take-along visual conditioning for multi-modal
        long CoT reasoning, 2025, arXiv 2503.13360; the removals ``evict`` and ``blank`` are ours.
    """
    if removal not in get_args(Removal):
        raise ConfigurationError(f"`removal` is '{removal}', {suggest(removal, get_args(Removal))}")
    if places < 2:
        raise ConfigurationError(f"`places` is {places}; it must be at least 2")
    if len(images) != len(questions) or not questions:
        raise DataError(
            f"there are {len(questions)} questions and {len(images)} lists of pictures; give one "
            "list per question, and at least one"
        )
    for row, shown in enumerate(images):
        if not shown:
            raise DataError(f"question {row} has no picture that could be taken away; leave it out")
    if blank is None:
        colours = [picture.float().mean(dim=(1, 2)) for shown in images for picture in shown]
        blank = torch.stack(colours).mean(dim=0).round().to(torch.uint8)
    run = _Cuts(model, places, removal, again, blank, max_new_tokens or model.max_new_tokens)
    training = model.network.training
    model.network.eval()
    try:
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            run.add({"images": images[part], "question": questions[part]})
    finally:
        model.network.train(training)
    return run.result()


@dataclass
class _Cuts:
    """The cuts of all batches."""

    model: MultimodalLM
    places: int
    removal: Removal
    again: Reaffirmation | None
    blank: Tensor
    length: int
    full: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    cut: list[list[str]] = field(init=False)
    kept: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.cut = [[] for _ in range(self.places)]
        self.kept = [[] for _ in range(self.places)]

    def result(self) -> CutAnswers:
        return CutAnswers(
            tuple(self.full),
            tuple(self.without),
            tuple(map(tuple, self.cut)),
            tuple(map(tuple, self.kept)),
            self.removal,
            self.again,
        )

    def add(self, batch: dict[str, Any]) -> None:
        inputs = self.model.inputs(batch, padding="left", answers=False)
        bare = prompts(self.model, batch, pictures=False)
        reader = Reader(self.model)
        whole = reader.greedy(reader.read_native(inputs), self.length)
        self.full += self._texts(whole)
        reader = Reader(self.model)
        self.without += self._texts(reader.greedy(reader.read(bare), self.length))
        extra = self._extra(batch, inputs)
        if self.removal == "blank":
            inputs = self.model.inputs(self._blanked(batch), padding="left", answers=False)
        for place in range(self.places):
            kept = [tokens[: place * len(tokens) // (self.places - 1)] for tokens in whole]
            reader, logits = self._removed(inputs, bare, kept, extra)
            longest = self.length - min(map(len, kept))
            rest = reader.greedy(logits, longest) if longest else [[] for _ in kept]
            said = [(first + more)[: self.length] for first, more in zip(kept, rest, strict=True)]
            self.cut[place] += self._texts(said)
            self.kept[place] += self._texts(kept)

    def _texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        return [text_of(self.model, tokens) for tokens in answers]

    def _extra(self, batch: dict[str, Any], inputs: Inputs) -> list[Span]:
        """What is read behind the cut: nothing, or bridge and picture."""
        if self.again is None:
            return [Span() for _ in batch["question"]]
        bridge, found = words(self.model, self.again.bridge), []
        for span, given in zip(spans(self.model, inputs), batch["images"], strict=True):
            shown = chosen(span.pictures, self.again.pictures, len(given))
            pooled = [picture.pooled(self.again.pool) for picture in shown]
            found.append(bridge + block(self.model, pooled))
        return found

    def _blanked(self, batch: dict[str, Any]) -> dict[str, Any]:
        colour = self.blank[:, None, None]
        empty = [[colour.expand_as(one).clone() for one in shown] for shown in batch["images"]]
        return batch | {"images": empty}

    def _removed(
        self, inputs: Inputs, bare: list[Span], kept: list[list[int]], extra: list[Span]
    ) -> tuple[Reader, Tensor]:
        """A reader of what is left, and the scores of the next token."""
        reader = Reader(self.model)
        if self.removal == "reprefill":
            rows = [a + Span(b) + c for a, b, c in zip(bare, kept, extra, strict=True)]
            return reader, reader.read(rows)
        rows = [
            Span(ids[real].tolist() + tokens)
            for ids, real, tokens in zip(
                inputs["input_ids"], inputs["attention_mask"].bool(), kept, strict=True
            )
        ]
        begun = _continued(self.model, inputs, [row.ids[:-1] for row in rows])
        answered = torch.tensor([len(tokens) for tokens in kept], device=self.model.device)
        left = torch.arange(begun["input_ids"].shape[1], 0, -1, device=self.model.device)
        reader.read_native(begun, left >= answered[:, None])
        if self.removal == "evict":
            reader.hide_pictures()
        last = [Span(row.ids[-1:]) + more for row, more in zip(rows, extra, strict=True)]
        return reader, reader.read(last)


def _continued(model: MultimodalLM, inputs: Inputs, rows: Sequence[Sequence[int]]) -> Inputs:
    """The same pictures with other token ids, padded at the left."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = torch.tensor(row)
        mask[number, length - len(row) :] = 1
    ids, mask = ids.to(inputs["input_ids"].device), mask.to(inputs["input_ids"].device)
    old = inputs["input_ids"].shape
    found = {
        key: value for key, value in inputs.items() if not (value.ndim == 2 and value.shape == old)
    }
    found |= {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        visual = model.family.visual_mask(unwrapped(model.network), ids)
        found["mm_token_type_ids"] = visual.to(inputs["mm_token_type_ids"].dtype)
    return found
