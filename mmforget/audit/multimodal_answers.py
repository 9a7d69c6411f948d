"""What a multimodal language model says, computed once; all metrics are functions of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmforget.audit.outputs import evaluating
from mmforget.data.base import ForgetDataModule, Stage
from mmforget.data.questions import QuestionDataModule, QuestionDataset
from mmforget.errors import CapabilityError, DataError
from mmforget.metrics.answers import exact_match, mentions
from mmforget.models.base import Batch, Model
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.encoding import IGNORED
from mmforget.seeds import generator

ROLES = ("forget", "retain", "previous")
MOST = 60
"""Records of each role that are asked after every epoch."""


@dataclass(frozen=True)
class Said:
    """Answers of one model to a set of records, in the order of the records, on the CPU.

    Attributes:
        id: (N,) record ids.
        answers: N texts; empty where only the losses were wanted.
        total: (N,) ``-log p`` of the true answers; empty where only the answers were wanted.
        tokens: (N,) their numbers of tokens; likewise.
        read: (N,) bool: each token of the true answer is the likeliest by another head, if one was
            given; else None.
    """

    id: np.ndarray
    answers: list[str]
    total: Tensor
    tokens: Tensor
    read: np.ndarray | None = None

    @property
    def loss(self) -> Tensor:
        """(N,) loss of the true answers per token, float64."""
        return self.total.double() / self.tokens.double()


def listen(
    model: Model,
    data: QuestionDataset,
    batch_size: int = 64,
    answers: bool = True,
    losses: bool = True,
    head: Tensor | None = None,
    instead: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
) -> Said:
    """Ask a model every record of a data set once, in eval mode, without gradients.

    With `torch.distributed` the records are divided among the processes, and every process gets all
    the answers.

    Args:
        model: a `MultimodalLM`.
        data: the records.
        batch_size: on each process.
        answers: let it answer.
        losses: compute the losses of the true answers, in a second forward pass.
        head: (V, D) weights of another head, by which the true answers are read besides.
        instead: N answers whose losses are wanted in place of the true ones.
        max_new_tokens: most tokens of an answer; None takes the model's own.

    Raises:
        CapabilityError: the model answers no questions.
        DataError: there are no records.
    """
    if not isinstance(model, MultimodalLM):
        raise CapabilityError(
            f"an audit of answers needs a MultimodalLM, but this is a {type(model).__name__}"
        )
    if not len(data):
        raise DataError(f"'{data.name}' has no such records; an audit needs some")
    world, rank = 1, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    positions = np.arange(len(data))[rank::world]
    own: list[tuple[int, _Row]] = []
    for start in range(0, len(positions), batch_size):
        chosen = positions[start : start + batch_size]
        batch = data[chosen.tolist()]
        if instead is not None:
            batch["answer"] = [instead[place] for place in chosen]
        rows = [_Row() for _ in chosen]
        with evaluating(model), torch.autocast(model.device.type, enabled=False):
            if answers:
                told = model.answer(batch["images"], batch["question"], max_new_tokens)
                for row, text in zip(rows, told, strict=True):
                    row.text = text
            if losses:
                _weigh(model, batch, head, rows)
        own += zip(chosen.tolist(), rows, strict=True)
    parts: list[Any] = [own]
    if world > 1:
        parts = [own] * world
        torch.distributed.all_gather_object(parts, own)
    ordered = [row for _, row in sorted((pair for part in parts for pair in part), key=_place)]
    weighed = ordered if losses else []
    return Said(
        id=data.ids,
        answers=[row.text for row in ordered] if answers else [],
        total=torch.tensor([row.total for row in weighed], dtype=torch.float64),
        tokens=torch.tensor([row.tokens for row in weighed], dtype=torch.int64),
        read=None if head is None else np.array([row.read for row in weighed], dtype=bool),
    )


@dataclass
class _Row:
    """What is known of one record."""

    text: str = ""
    total: float = 0.0
    tokens: int = 0
    read: bool = False


def _place(pair: tuple[int, _Row]) -> int:
    return pair[0]


def _weigh(model: MultimodalLM, batch: Batch, head: Tensor | None, rows: list[_Row]) -> None:
    """Fill in losses, and what another head reads."""
    found = model.answer_logits(batch)
    known = found.losses()
    for row, total, tokens in zip(
        rows, known.total.double().tolist(), known.tokens.tolist(), strict=True
    ):
        row.total, row.tokens = total, tokens
    if head is not None:
        for row, hit in zip(rows, _read(found.hidden, found.labels, head).tolist(), strict=True):
            row.read = hit


def _read(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """(B,) bool: a head reads every labelled token off the hidden states.

    Raises:
        ValueError: the head belongs to a network of another width.
    """
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"a head for {head.shape[1]} features cannot read {hidden.shape[-1]} of them"
        )
    top = (hidden.float() @ head.to(hidden.device).float().T).argmax(dim=-1)
    return ((top == labels) | (labels == IGNORED)).all(dim=1)


def target_of(answer: str, entity: str) -> str:
    """What an answer must not say: the entity, or all of an answer that does not name it."""
    return entity if mentions(answer, entity) else answer


def targets_of(data: QuestionDataset) -> list[str]:
    """`target_of` every record; the entity is the one that is shown or asked about."""
    names = data.class_names
    return [
        target_of(answer, names[subject])
        for answer, subject in zip(data.answers, data.subjects, strict=True)
    ]


def role_answers(
    model: Model, data: ForgetDataModule, stage: Stage = "test", most: int = MOST
) -> list[dict[str, Any]]:
    """How often forgotten names are still said, and how often retained answers are right.

    Args:
        model: a `MultimodalLM`.
        data: a `QuestionDataModule` with a request.
        stage: ``test`` or ``val``. A request that names samples has no forget part there; its
            training samples stand in for it.
        most: records per role, drawn at random.

    Returns:
        One row per role that has records: ``{"split", "accuracy" in [0, 1], "n"}``: for ``retain``
        the share of right answers, else the share of answers that reveal what was forgotten. Of
        the kinds of questions that reveal an entity only the first one is asked for the latter.
    """
    assert isinstance(data, QuestionDataModule)  # what such a model is trained on
    rows = []
    for role in ROLES:
        part = data.subset(stage, role, whole=True)  # type: ignore[arg-type]
        if not len(part):
            part = data.subset("train", role, whole=True)  # type: ignore[arg-type]
            if role == "retain" or not len(part):
                continue
        if role != "retain":
            asked = part.kinds == data.forget_questions[0]
            part = part.subset(np.flatnonzero(asked if asked.any() else ~asked))
        chance = generator(data.seed, f"role-answers/{stage}/{role}")
        part = part.subset(torch.randperm(len(part), generator=chance)[:most].sort().values.numpy())
        said = spoken(model, part)
        if role == "retain":
            right = [exact_match(a, b) for a, b in zip(said, part.answers, strict=True)]
        else:
            right = [mentions(a, b) for a, b in zip(said, targets_of(part), strict=True)]
        rows.append({"split": role, "accuracy": float(np.mean(right)), "n": len(right)})
    return rows


def spoken(
    model: Model,
    data: QuestionDataset,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
) -> list[str]:
    """The answers of a model, without any losses; see `listen`.

    Raises:
        CapabilityError: the model answers no questions.
    """
    if not isinstance(model, MultimodalLM):
        raise CapabilityError(f"answers need a MultimodalLM, but this is a {type(model).__name__}")
    found: list[str] = []
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        for batch in batches(data, batch_size):
            found += model.answer(batch["images"], batch["question"], max_new_tokens)
    return found


def batches(data: QuestionDataset, batch_size: int) -> Iterator[Batch]:
    """The batches of a data set in order."""
    for start in range(0, len(data), batch_size):
        yield data[list(range(start, min(start + batch_size, len(data))))]
