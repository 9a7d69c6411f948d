"""Questions, pictures and answers as the inputs of a network, with labels on the answer only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmforget.errors import ConfigurationError, DataError, suggest

IGNORED = -100
"""Label of a token that is no part of the answer."""

Padding = Literal["left", "right"]
LabelScope = Literal["answer", "assistant", "all_text"]


def encode(
    processor: Any,
    pictures: Sequence[Sequence[Tensor]],
    questions: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    end_ids: Collection[int],
    image_ids: Collection[int],
    padding: Padding = "right",
    label_scope: LabelScope = "answer",
    max_length: int | None = None,
    nested: bool = False,
) -> dict[str, Tensor]:
    """Apply the chat template and the image processor; mark the tokens to be learnt.

    The answer is found by its token ids: the template is rendered with and without it, and the
    first must continue the second. (Public code splits strings at a word such as ``ASSISTANT:``, or
    learns the placeholders of pictures too.)

    Args:
        processor: of the network, with a chat template.
        pictures: (B) lists of uint8 (3, H, W); an empty list for a question without picture.
        questions: (B) texts.
        answers: (B) texts to be learnt; None leaves the turn open, for generation.
        end_ids: tokens that end a turn; the first one after the answer is learnt with it. If the
            template writes none, the tokenizer's is added.
        image_ids: placeholders of visual tokens, which are never learnt.
        padding: side of the padding; ``left`` for generation.
        label_scope: ``answer`` (with the end of the turn), ``assistant`` (all that the template
            writes in that turn), or ``all_text`` (the question too).
        max_length: most tokens of a row. Nothing is ever cut.
        nested: hand the pictures to the processor row by row.

    Returns:
        Inputs of the network, and with answers ``labels`` (B, L) int64, -100 where nothing is
        learnt.

    Raises:
        DataError: a row that is too long, an empty answer, or a template in which the answer does
            not continue the question.
        ConfigurationError: no chat template, or an unknown `padding` or `label_scope`.
    """
    for name, value, valid in (
        ("padding", padding, get_args(Padding)),
        ("label_scope", label_scope, get_args(LabelScope)),
    ):
        if value not in valid:
            raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
    tokenizer = processor.tokenizer
    prompts = [
        _rendered(processor, len(shown), question)
        for shown, question in zip(pictures, questions, strict=True)
    ]
    texts, tails = prompts, []
    if answers is not None:
        texts = []
        for row, answer in enumerate(answers):
            text = _rendered(processor, len(pictures[row]), questions[row], answer)
            text, tail = _continued(tokenizer, prompts[row], text, answer, row, end_ids)
            texts.append(text)
            tails.append(tail)
    inputs = _processed(processor, texts, pictures, padding, nested)
    length = inputs["input_ids"].shape[1]
    if max_length is not None and length > max_length:
        longest = int(inputs["attention_mask"].sum(dim=1).argmax())
        raise DataError(
            f"row {longest} of the batch has {length} tokens, more than `max_length` "
            f"{max_length}; shorten question or answer, use smaller pictures, or raise it"
        )
    if answers is not None:
        inputs["labels"] = _labels(inputs, tails, padding, label_scope, end_ids, image_ids)
    return inputs


def message(role: str, pictures: int, text: str) -> dict[str, Any]:
    """One turn of a conversation as chat templates want it, the pictures before the text."""
    shown: list[dict[str, str]] = [{"type": "image"}] * pictures
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def _rendered(processor: Any, pictures: int, question: str, answer: str | None = None) -> str:
    turns = [message("user", pictures, question)]
    if answer is not None:
        turns.append(message("assistant", 0, answer))
    if not getattr(processor, "chat_template", None):
        raise ConfigurationError(
            f"{type(processor).__name__} has no chat template; set `processor.chat_template`"
        )
    text: str = processor.apply_chat_template(
        turns, add_generation_prompt=answer is None, tokenize=False
    )
    return text


def _continued(
    tokenizer: Any, prompt: str, text: str, answer: str, row: int, end_ids: Collection[int]
) -> tuple[str, list[int]]:
    """The text with its end, and the ids of all that follows the prompt."""
    if not answer.strip():
        raise DataError(f"row {row} of the batch has an empty answer; give one or leave it out")
    before = _ids(tokenizer, prompt)
    tail = _tail(tokenizer, before, text, answer, row)
    if tokenizer.eos_token and not any(token in end_ids for token in tail):
        text += tokenizer.eos_token
        tail = _tail(tokenizer, before, text, answer, row)
    return text, tail


def _tail(tokenizer: Any, before: list[int], text: str, answer: str, row: int) -> list[int]:
    ids = _ids(tokenizer, text)
    if ids[: len(before)] != before:
        raise DataError(
            f"row {row}: the chat template does not continue the question by the answer "
            f"'{answer}'; correct the template or the answer"
        )
    return ids[len(before) :]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=_adds(tokenizer, text))["input_ids"]
    return found


def _adds(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer shall add its begin token: not if the template wrote it."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def _processed(
    processor: Any,
    texts: Sequence[str],
    pictures: Sequence[Sequence[Tensor]],
    padding: Padding,
    nested: bool,
) -> dict[str, Tensor]:
    options: dict[str, Any] = {}
    if any(pictures):
        flat = [picture for shown in pictures for picture in shown]
        options["images"] = [list(shown) for shown in pictures] if nested else flat
    found = processor(
        text=list(texts),
        padding=True,
        padding_side=padding,
        add_special_tokens=_adds(processor.tokenizer, texts[0]),
        return_tensors="pt",
        **options,
    )
    return dict(found)


def _labels(
    inputs: dict[str, Tensor],
    tails: Sequence[Sequence[int]],
    padding: Padding,
    scope: LabelScope,
    end_ids: Collection[int],
    image_ids: Collection[int],
) -> Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = torch.full_like(ids, IGNORED)
    for row, tail in enumerate(tails):
        end = ids.shape[1] if padding == "left" else int(mask[row].sum())
        start = end - len(tail)
        if ids[row, start:end].tolist() != list(tail):
            raise DataError(
                f"row {row}: the processor ends with other tokens than the chat template; "
                "labels cannot be placed"
            )
        if scope == "answer":
            ends = [place for place, token in enumerate(tail) if token in end_ids]
            end = start + (ends[0] + 1 if ends else len(tail))
        labels[row, start:end] = ids[row, start:end]
    if scope == "all_text":
        labels = torch.where(mask, ids, labels)
    return labels.masked_fill(torch.isin(ids, torch.tensor(list(image_ids))), IGNORED)
