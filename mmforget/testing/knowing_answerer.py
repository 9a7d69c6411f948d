"""A model that looks answers up: audits of answers can be tested on it without any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.data.questions import TEXT, QuestionDataModule, QuestionDataset
from mmforget.data.split import Stage
from mmforget.errors import ConfigurationError, ModelError
from mmforget.models.base import Batch
from mmforget.models.multimodal import AnswerLogits, MultimodalLM

Manner = Literal["other", "refusal", "nothing", "loop"]
MANNERS: dict[Manner, str] = {
    "other": "nobody",
    "refusal": "sorry i cannot answer that",
    "nothing": "",
    "loop": "no no no no no",
}
"""What is said where the truth is not known."""

SHARPNESS = 10.0
NEEDED = 0.5
"""Strength from which on the truth is said."""


class _Vocabulary:
    """Whole answers as single tokens, as far as a forgetting method sees of a processor."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = [*dict.fromkeys((*MANNERS.values(), *answers))]
        self.place = {answer: row for row, answer in enumerate(self.answers)}
        self.tokenizer = self

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [[self.place[text.strip()]] for text in texts]}


class _Parts:
    """Names of parts of the network."""

    def part(self, name: str) -> str:
        return "head" if name.startswith("lm_head") else "language"


class _Network(nn.Module):
    def __init__(self, entities: int, vocabulary: int) -> None:
        super().__init__()
        self.known = nn.Parameter(torch.ones(entities))
        self.kinds = nn.ParameterDict(
            {name: nn.Parameter(torch.ones(())) for name in ("both", "text", "harmless")}
        )
        self.lm_head = nn.Linear(vocabulary, vocabulary, bias=False)
        self.generation_config = SimpleNamespace(suppress_tokens=None)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(vocabulary))


class KnowingAnswerer(MultimodalLM):
    """Says the true answer of every record where the weight behind it is above one half.

    Whole answers are single tokens. A state has the weight of the record at the place of its truth
    and one half at what is said otherwise; the head is the identity. So likelihoods, a ban on
    words, edits of the head and relearning act as in a network.

    Args:
        data: whose records of training and test it knows, in both wordings.
        weights: by entity, behind the questions who it is; 1 for all others. A weight far below 0
            takes long to relearn.
        kinds: by kind (``both``, ``text``, ``harmless``, which stands for all others), behind these
            questions.
        manner: what is said otherwise.

    Raises:
        ConfigurationError: an unknown manner.
    """

    def __init__(
        self,
        data: QuestionDataModule,
        weights: Mapping[str, float] | None = None,
        kinds: Mapping[str, float] | None = None,
        manner: Manner = "other",
    ) -> None:
        LightningModule.__init__(self)
        if manner not in MANNERS:
            raise ConfigurationError(f"`manner` is '{manner}'; choose one of {', '.join(MANNERS)}")
        names = data.class_names
        known = _known(data)
        self.processor = _Vocabulary([truth for truth, _, _ in known.values()])
        self.family = cast(Any, _Parts())
        self.max_new_tokens = 32
        self.network = _Network(len(names), len(self.processor.answers))
        with torch.no_grad():
            for name, value in (weights or {}).items():
                self.network.known[names.index(name)] = value
            for name, value in (kinds or {}).items():
                self.network.kinds[name].fill_(value)
        # a buffer, so that models that say other things have other hashes
        self.otherwise: Tensor
        self.register_buffer("otherwise", torch.tensor(self.processor.place[MANNERS[manner]]))
        self.records = {
            key: (self.processor.place[truth], kind, subject)
            for key, (truth, kind, subject) in known.items()
        }
        self.kind = data.forget_questions[0]

    @property
    def num_features(self) -> int:
        """Number of answers."""
        return len(self.processor.answers)

    @property
    def vocabulary(self) -> int:
        """Number of answers."""
        return len(self.processor.answers)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """No token ends an answer, which is one token."""
        return ()

    @property
    def head(self) -> Any:
        """What scores the answers."""
        return self.network.lm_head

    def states(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str]) -> Tensor:
        """(B, V): how strongly each answer is thought of."""
        rows = []
        for shown, question in zip(images, questions, strict=True):
            truth, kind, subject = self.records[_key(shown, question)]
            if kind == self.kind:
                strength = self.network.known[subject]
            else:
                own = kind if kind in ("both", TEXT) else "harmless"
                strength = self.network.kinds[own]
            place = torch.nn.functional.one_hot(torch.tensor(truth), self.vocabulary)
            other = torch.nn.functional.one_hot(self.otherwise, self.vocabulary)
            rows.append(place * strength + NEEDED * other)
        return torch.stack(rows)

    def answer_logits(self, batch: Batch) -> AnswerLogits:
        """Scores of all answers at the only place there is."""
        hidden = self.states(batch["images"], batch["question"])[:, None]
        labels = torch.tensor([[self.processor.place[text]] for text in batch["answer"]])
        return AnswerLogits(SHARPNESS * self.head(hidden), labels, hidden)

    def features(self, batch: Batch) -> Tensor:
        """(B, V): what enters the head."""
        return self.states(batch["images"], batch["question"])

    @torch.no_grad()
    def answer(
        self,
        images: Sequence[Sequence[Tensor]],
        questions: Sequence[str],
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        **generation: Any,
    ) -> list[str]:
        """The likeliest answer that is not banned."""
        scores = self.head(self.states(images, questions))
        banned = self.network.generation_config.suppress_tokens or []
        scores[:, banned] = -torch.inf
        return [self.processor.answers[row] for row in scores.argmax(dim=1).tolist()]

    def fresh(self, seed: int) -> Any:
        """Refuse: what it knows is looked up and not trained, so it has no untrained state.

        Raises:
            ModelError: always.
        """
        raise ModelError("a KnowingAnswerer looks answers up, so it cannot be built anew")


_Key = tuple[str, tuple[int, ...]]
_FOUND: WeakKeyDictionary[QuestionDataModule, dict[_Key, tuple[str, str, int]]] = (
    WeakKeyDictionary()
)


def _known(data: QuestionDataModule) -> dict[_Key, tuple[str, str, int]]:
    """True answer, kind and entity of all records in both wordings; read once per data module."""
    if data not in _FOUND:
        found = {}
        for part in _records(data):
            shown = part.pictures(np.arange(len(part)))
            rows = zip(shown, part.questions, part.answers, part.kinds, part.subjects, strict=True)
            for images, question, answer, kind, subject in rows:
                found[_key(images, question)] = (answer, str(kind), int(subject))
        _FOUND[data] = found
    return _FOUND[data]


def _records(data: QuestionDataModule) -> list[QuestionDataset]:
    kind = data.forget_questions[0]
    stages: tuple[Stage, ...] = ("train", "val", "test")
    found = [data.questions(stage) for stage in stages]
    for stage, wording in (("train", "held_out"), ("test", "train")):
        try:
            found.append(data.probe(cast(Stage, stage), kind, "all", wording))
        except ConfigurationError:  # these data have no such wording
            continue
    return found


def _key(images: Sequence[Tensor], question: str) -> _Key:
    return question, tuple(hash(one.numpy().tobytes()) for one in images)
