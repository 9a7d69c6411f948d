"""TVC, inference: answer with the picture shown again on the way, pooled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError, suggest
from mmforget.models.multimodal import MultimodalLM
from mmforget.retention.picture_context import (
    Answer,
    Reader,
    Span,
    block,
    chosen,
    prompts,
    text_of,
    words,
)
from mmforget.retention.take_along import BRIDGE

Mode = Literal["move", "append", "refresh"]


class CalibratedAnswer(NamedTuple):
    """An answer during which the picture was shown again.

    Attributes:
        text: without bridges and pictures.
        tokens: number of tokens of the answer itself.
        reread: after how many of them the picture was shown again.
        extra_tokens: tokens that were read on top: those of bridges and of pictures.
    """

    text: str
    tokens: int
    reread: tuple[int, ...]
    extra_tokens: int


@dataclass
class _Row:
    prompt: Span
    bare: Span
    again: Span
    bridge: Span
    answer: Answer = field(default_factory=Answer)
    reread: list[int] = field(default_factory=list)

    @property
    def extra(self) -> Span:
        return self.bridge + self.again


class PeriodicVisualCalibration:
    """Greedy answers during which the picture is shown again, pooled (TVC's second half, PVC).

    Where an answer reaches a re-read point, a bridge text and the picture are inserted, and it goes
    on behind them:

    * ``move``: the context is built anew: question without picture, answer so far, bridge, pooled
      picture. What was shown before at the start, or at an earlier point, is gone, and what the
      text's keys and values had kept of it too.
    * ``append``: bridge and pooled picture are read on top of the cache, in which everything stays
      as it is.
    * ``refresh``, a control: the context is built anew with the whole picture at its old place and
      the bridge behind the answer so far. (Without the bridge this would be ordinary decoding.)

    Rows without picture are answered as ever. Rows are processed together where all of them reach
    their re-read points after the same number of tokens, and one by one with `trigger` or `snap`.

    The authors published no inference code; the modes ``append`` and ``refresh`` and all details
    are ours. Models need training with `dynamic_visual_reaffirmation` to profit.

    ::

        calibrated = PeriodicVisualCalibration(model, at=(0.5,), expected_tokens=400)
        texts = calibrated.answer(images, questions)

    Args:
        model: the model; it is not changed, and no hook is left on it.
        at: shares of `expected_tokens`, in (0, 1); `every` or `trigger` take their place.
        every: show the picture after every so many tokens.
        trigger: called with the text so far after every token; True shows the picture.
        expected_tokens: length that `at` refers to; None takes `max_new_tokens`.
        most: how often at most.
        pool: so many by so many visual tokens become one; 1 keeps all.
        mode: see above.
        bridge: text before the picture; may be empty.
        snap: wait for the end of a sentence.
        pictures: which of a question's pictures, from 0; None is all.

    Raises:
        ConfigurationError: a value out of range, or two of `every` and `trigger`.

    Reference:
        Sun et al., Mitigating visual forgetting via take-along visual conditioning for multi-modal
        long CoT reasoning, 2025, arXiv 2503.13360.
    """

    def __init__(
        self,
        model: MultimodalLM,
        *,
        at: Sequence[float] = (0.5,),
        every: int | None = None,
        trigger: Callable[[str], bool] | None = None,
        expected_tokens: int | None = None,
        most: int = 25,
        pool: int = 4,
        mode: Mode = "move",
        bridge: str = BRIDGE,
        snap: bool = False,
        pictures: Sequence[int] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigurationError(f"`mode` is '{mode}', {suggest(mode, get_args(Mode))}")
        if every is not None and trigger is not None:
            raise ConfigurationError("`every` and `trigger` are both set; choose one")
        for name, value in (
            ("every", every),
            ("expected_tokens", expected_tokens),
            ("most", most),
            ("pool", pool),
        ):
            if value is not None and value < 1:
                raise ConfigurationError(f"`{name}` is {value}; it must be at least 1")
        if any(not 0 < share < 1 for share in at):
            raise ConfigurationError(f"`at` is {list(at)}; give shares of the answer in (0, 1)")
        self.model, self.mode = model, mode
        self.at, self.every, self.trigger = tuple(at), every, trigger
        self.expected_tokens, self.most, self.pool = expected_tokens, most, pool
        self.bridge, self.snap, self.pictures = bridge, snap, pictures

    def answer(
        self,
        images: Sequence[Sequence[Tensor]],
        questions: Sequence[str],
        max_new_tokens: int | None = None,
        batch_size: int = 64,
    ) -> list[str]:
        """Answer questions; see `MultimodalLM.answer` and `generate`."""
        found = self.generate(images, questions, max_new_tokens, batch_size)
        return [one.text for one in found]

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[Sequence[Tensor]],
        questions: Sequence[str],
        max_new_tokens: int | None = None,
        batch_size: int = 64,
    ) -> list[CalibratedAnswer]:
        """Answer questions, and say when the picture was shown again.

        Args:
            images: per question a list of pictures, uint8 (3, H, W); empty lists are texts.
            questions: texts.
            max_new_tokens: most tokens of an answer, bridges and pictures not counted; None takes
                the model's.
            batch_size: of the questions that are answered together.

        Raises:
            DataError: the numbers of questions and of lists of pictures differ.
            ConfigurationError: `pictures` names one that a question does not have.
            CapabilityError: visual tokens that form no grid are to be pooled.
        """
        if len(images) != len(questions):
            raise DataError(
                f"there are {len(questions)} questions, but {len(images)} lists of pictures; give "
                "one list per question, empty without a picture"
            )
        length = max_new_tokens or self.model.max_new_tokens
        alone = self.trigger is not None or self.snap
        training = self.model.network.training
        self.model.network.eval()
        found: list[CalibratedAnswer] = []
        try:
            for start in range(0, len(questions), batch_size):
                part = slice(start, start + batch_size)
                rows = self._rows(images[part], questions[part])
                for group in [[row] for row in rows] if alone else [rows]:
                    self._run(group, length)
                found += [self._finished(row) for row in rows]
        finally:
            self.model.network.train(training)
        return found

    def _rows(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> list[_Row]:
        batch = {"images": images, "question": questions}
        rows = []
        for prompt, bare, given in zip(
            prompts(self.model, batch), prompts(self.model, batch, False), images, strict=True
        ):
            shown = chosen(prompt.pictures, self.pictures, len(given))
            again = Span()
            if self.mode != "refresh":
                again = block(self.model, [picture.pooled(self.pool) for picture in shown])
            bridge = words(self.model, self.bridge) if shown else Span()
            rows.append(_Row(prompt, bare, again, bridge))
        return rows

    def _finished(self, row: _Row) -> CalibratedAnswer:
        tokens, reread = row.answer.tokens, tuple(row.reread)
        extra = len(row.extra.ids) * len(reread)
        return CalibratedAnswer(text_of(self.model, tokens), len(tokens), reread, extra)

    def _run(self, rows: Sequence[_Row], length: int) -> None:
        ends, reader = set(self.model.end_ids), Reader(self.model)
        logits = reader.read([row.prompt for row in rows])
        waiting, passed = False, 0
        for step in range(length):
            tokens = logits.argmax(dim=-1).tolist()
            for row, token in zip(rows, tokens, strict=True):
                row.answer.take(token, ends)
            going = [row for row in rows if not row.answer.done and row.prompt.pictures]
            if step + 1 == length or all(row.answer.done for row in rows):
                break
            waiting = waiting or (passed < self.most and self._due(rows[0], step + 1, length))
            now = waiting and going and (not self.snap or self._sentence_over(rows[0]))
            if now:
                waiting, passed = False, passed + 1
                for row in going:
                    row.reread.append(len(row.answer.tokens))
            if now and self.mode != "append":
                reader = Reader(self.model)
                logits = reader.read([self._context(row) for row in rows])
            else:
                pieces = [Span([token]) for token in tokens]
                if now:
                    pieces = [
                        piece + row.extra if row.prompt.pictures else piece
                        for piece, row in zip(pieces, rows, strict=True)
                    ]
                logits = reader.read(pieces)

    def _due(self, row: _Row, step: int, length: int) -> bool:
        if self.trigger is not None:
            return self.trigger(text_of(self.model, row.answer.tokens))
        if self.every is not None:
            return step % self.every == 0
        expected = self.expected_tokens or length
        return step in {max(1, int(share * expected + 0.5)) for share in self.at}

    def _sentence_over(self, row: _Row) -> bool:
        tokens, tokenizer = row.answer.tokens, self.model.processor.tokenizer
        text = tokenizer.decode(tokens[-4:]).rstrip(" ")
        return text.endswith((".", "!", "?", "\n", "。"))

    def _context(self, row: _Row) -> Span:
        """The whole context of a row, built anew."""
        said = Span(row.answer.tokens)
        if not row.prompt.pictures or row.answer.done:
            return row.prompt + said
        start = row.prompt if self.mode == "refresh" else row.bare
        return start + said + row.extra
