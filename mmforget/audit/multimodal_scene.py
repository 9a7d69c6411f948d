"""The questions of a multimodal audit by role and kind, and what every model says to them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmforget.attacks.answer_relearning import BANS
from mmforget.audit.compared import ComparedModels
from mmforget.audit.multimodal_answers import Said, listen, spoken, targets_of
from mmforget.audit.scene import AuditedModel, draw
from mmforget.data.questions import TEXT, QuestionDataModule, QuestionDataset
from mmforget.data.split import Role, Stage
from mmforget.errors import ConfigurationError, ModelError, RequestError
from mmforget.metrics.answer_judges import AnswerJudge, TargetJudge
from mmforget.models.base import Model, state_hash
from mmforget.models.multimodal import MultimodalLM
from mmforget.request import ForgetRequest
from mmforget.seeds import generator

if TYPE_CHECKING:
    from mmforget.audit.multimodal import MultimodalAuditSettings

logger = logging.getLogger(__name__)

BOTH = "both"
"""Kind of the questions that show a picture and name an entity."""

ROLES: dict[str, tuple[Role, ...]] = {"forgotten": ("forget", "previous"), "retain": ("retain",)}
"""Roles that a split holds, by the end of its name."""

UNSPOKEN = ("test_known_wording",)
"""Splits of which only the losses of the true answers are computed."""


@dataclass(frozen=True)
class Part:
    """The records of one split.

    Attributes:
        data: those that are asked, by id.
        whole: how many there are.
        targets: per record what its answer must not say, if it is to be forgotten.
    """

    data: QuestionDataset
    whole: int
    targets: list[str]


class MultimodalScene(ComparedModels):
    """Everything that the metrics of one audit are functions of.

    Splits by name. Of the first kind of `QuestionDataModule.forget_questions`:

    * ``train_forget``: pictures and wording of the training;
    * ``train_reworded``: training pictures of all forgotten entities, in held-out wording;
    * ``test_forget``, ``test_previous``, ``test_retain``: unseen pictures, held-out wording;
    * ``test_forgotten``: all that the models were asked to forget, by this and earlier requests;
    * ``test_known_wording``: unseen pictures of these, in the wording of the training.

    About unseen pictures of forgotten (``_forgotten``) and retained (``_retain``) entities, and
    about neither (``_other``), are asked ``test_harmless...``, ``test_both...`` (picture, and the
    name in the question) and ``test_text...`` (no picture; ``train_text...`` in the wording of the
    training). Where data have no held-out wording, theirs is used; splits without records are left
    out.

    Attributes:
        hashes: of the weights, by model.
        parts: by split.
        forgotten_classes: indices of all forgotten entities.
        entities: names by class index, without the class of records that reveal none.
        kind: of the questions that reveal an entity.
        wrong: per record of `judged` answers about other entities, in random order.

    Args:
        models: unique names, exactly one original.
        data: whose requests are set here.
        requests: in order.
        settings: see there.
        judge: decides whether an answer reveals its target; None looks for it as whole words.

    Raises:
        RequestError: no question about anything forgotten is left to be asked.
    """

    def __init__(
        self,
        models: Sequence[AuditedModel],
        data: QuestionDataModule,
        requests: Sequence[ForgetRequest],
        settings: MultimodalAuditSettings,
        judge: AnswerJudge | None = None,
    ) -> None:
        self.hashes = {one.entry.name: state_hash(one.model) for one in models}
        super().__init__(
            models, lambda one: (type(one.model), self.hashes[one.entry.name], _bans(one))
        )
        self.data, self.settings = data, settings
        self.judge: AnswerJudge = judge or TargetJudge()
        self.requests = list(requests)
        self.split = data.request(*requests)
        self.goal = requests[-1].goal
        self.class_names = self.split.class_names
        self.entities = self.class_names[:-1]
        self.forgotten_classes = tuple(
            sorted((*self.split.previous_classes, *self.split.forget_classes))
        )
        self.kind = data.forget_questions[0]
        self.parts = {name: part for name, part in self._parts().items() if len(part.data)}
        if not self.has("train_forget") and not self.has("test_forget"):
            raise RequestError(
                f"no question of the kind '{self.kind}' is about what is to be forgotten, so an "
                "audit has nothing to ask; name other `forget_questions` first"
            )
        self._said: dict[tuple[str, str], Said] = {}
        self._candidates: dict[str, Tensor] = {}
        self.wrong = self._wrong_answers()

    # ---- questions --------------------------------------------------------------------------

    def _parts(self) -> dict[str, Part]:
        kinds = set(self.data.questions("test").kinds.tolist())
        free = sorted(kinds - {*self.data.forget_questions, TEXT})
        found = {
            "train_forget": self._named("train", ["forget"], "train"),
            "train_reworded": self._named("train", ["forget", "previous"], "held_out"),
            "test_forget": self._named("test", ["forget"], "held_out"),
            "test_previous": self._named("test", ["previous"], "held_out"),
            "test_forgotten": self._named("test", ["forget", "previous"], "held_out"),
            "test_retain": self._named("test", ["retain"], "held_out"),
            "test_known_wording": self._named("test", ["forget", "previous"], "train"),
        }
        for name, asked in (("harmless", free), (BOTH, [BOTH]), (TEXT, [TEXT])):
            for role, roles in ROLES.items():
                found[f"test_{name}_{role}"] = self._plain("test", asked, roles)
                if name == TEXT:
                    found[f"train_{name}_{role}"] = self._plain("train", asked, roles)
        found["test_harmless_other"] = self._plain("test", free, ("all",), entity=False)
        return {name: self._drawn(name, data) for name, data in found.items()}

    def _named(self, stage: Stage, roles: Sequence[Role], wording: str) -> QuestionDataset:
        """Records of the kind that reveals an entity, in a wording if there is such a one."""
        try:
            every = self.data.probe(stage, self.kind, "all", wording)
        except ConfigurationError:  # these data have no such wording
            every = self.data.probe(stage, self.kind, "all")
        return every.subset(np.flatnonzero(self._play(every, roles)))

    def _play(self, data: QuestionDataset, roles: Sequence[Role]) -> np.ndarray:
        """(N,) bool: records about entities of one of the roles."""
        return np.logical_or.reduce([self.data.plays(data, role) for role in roles])

    def _plain(
        self, stage: Stage, kinds: Sequence[str], roles: Sequence[Role], entity: bool = True
    ) -> QuestionDataset:
        """Records of some kinds about entities of some roles, or about none, as the stage asks."""
        every = self.data.questions(stage)
        chosen = np.isin(every.kinds, kinds) & self._play(every, roles)
        chosen &= (every.subjects != len(self.class_names) - 1) == entity
        return every.subset(np.flatnonzero(chosen))

    def _drawn(self, name: str, data: QuestionDataset) -> Part:
        ordered = data.subset(np.argsort(data.ids))  # no result depends on the order
        seen: dict[tuple[tuple[int, ...], str], int] = {}
        for row, key in enumerate(zip(ordered.picture_keys, ordered.questions, strict=True)):
            seen.setdefault(key, row)  # copies of a record say nothing new
        ordered = ordered.subset(np.array([*seen.values()], dtype=np.int64))
        whole = len(ordered)
        most = self.settings.max_samples
        if most is not None and len(ordered) > most:
            ordered = ordered.subset(draw(len(ordered), most, self.settings.seed, name))
        return Part(ordered, whole, targets_of(ordered))

    def _wrong_answers(self) -> list[list[str]]:
        """Per record of `judged` several answers about other entities, in random order."""
        pool = self.data.probe("test", self.kind, "all")
        answers: dict[int, str] = {}
        for subject, answer in zip(pool.subjects.tolist(), pool.answers, strict=True):
            answers.setdefault(subject, answer)
        part = self.parts[self.judged]
        found = []
        for number, subject, answer in zip(
            part.data.ids.tolist(), part.data.subjects.tolist(), part.data.answers, strict=True
        ):
            others = sorted(
                {text for entity, text in answers.items() if entity != subject} - {answer}
            )
            chance = generator(self.settings.seed, "candidates", number)
            order = torch.randperm(len(others), generator=chance).tolist()
            found.append([others[place] for place in order[: self.settings.candidates]])
        return found

    def has(self, split: str) -> bool:
        """Whether a split has records."""
        return split in self.parts

    def seen(self, name: str) -> str:
        """``test_<name>``, or ``train_forget`` where the request leaves no test data of it."""
        return f"test_{name}" if self.has(f"test_{name}") else "train_forget"

    @property
    def forgotten_splits(self) -> list[str]:
        """The splits on which no answer may reveal its target."""
        names = ["train_forget", "train_reworded", "test_forget", "test_previous"]
        if TEXT in self.data.forgotten_kinds:
            names += [f"test_{TEXT}_forgotten", f"train_{TEXT}_forgotten"]
        return [name for name in names if self.has(name)]

    @property
    def judged(self) -> str:
        """The split by which forgetting is judged as a whole."""
        return self.seen("forgotten")

    # ---- what they say ------------------------------------------------------------------------

    @property
    def head(self) -> Tensor:
        """(V, D) what the original scores tokens with."""
        model = self.by_role("original")[0].model
        weight: Tensor = model.head.weight  # type: ignore[union-attr, assignment]
        return weight.detach()

    def run(self) -> None:
        """Ask every model every record once, and let it weigh wrong answers.

        Raises:
            ModelError: a model changed its own weights or buffers meanwhile.
        """
        number = sum(len(part.data) for part in self.parts.values())
        for one in self.distinct:
            name = one.entry.name
            logger.info("asking '%s' %d questions", name, number)
            known: dict[bytes, Said] = {}
            # with the losses first: of a single request `test_forget` is all that is forgotten
            for split in sorted(self.parts, key=lambda split: split not in self.weighed):
                ids = self.parts[split].data.ids.tobytes()
                if ids not in known:
                    known[ids] = self._ask(one.model, split)
                self._said[name, split] = known[ids]
            self._weigh(one.model, name)
            if state_hash(one.model) != self.hashes[name]:
                raise ModelError(
                    f"'{name}' changed its weights or buffers while it was evaluated; its forward "
                    "pass must not do so in eval mode"
                )

    @property
    def weighed(self) -> tuple[str, ...]:
        """The splits of which the losses of the true answers are computed."""
        return (self.judged, "train_forget", "test_retain", *UNSPOKEN)

    def _ask(self, model: Model, split: str) -> Said:
        return listen(
            model,
            self.parts[split].data,
            self.settings.batch_size,
            answers=split not in UNSPOKEN,
            losses=split in self.weighed,
            head=self.head if split == self.judged and self._readable(model) else None,
            max_new_tokens=self.settings.max_new_tokens,
        )

    def spoken(self, model: Model, data: QuestionDataset) -> list[str]:
        """What a model that is no column of this audit, or a changed copy, answers."""
        return spoken(model, data, self.settings.batch_size, self.settings.max_new_tokens)

    def _readable(self, model: Model) -> bool:
        return isinstance(model, MultimodalLM) and model.num_features == self.head.shape[1]

    def _weigh(self, model: Model, name: str) -> None:
        """Losses (N, K) of the wrong answers."""
        data, size = self.parts[self.judged].data, self.settings.batch_size
        columns = [
            listen(
                model, data, size, answers=False, instead=[row[place] for row in self.wrong]
            ).loss
            for place in range(min(map(len, self.wrong)))
        ]
        if columns:
            self._candidates[name] = torch.stack(columns, dim=1)

    def said(self, model: str, split: str) -> Said:
        """What a model says to the records of a split."""
        return self._said[self.twin[model], split]

    def wrong_losses(self, model: str) -> Tensor | None:
        """(N, K) losses of wrong answers to `judged`; None where there is only one entity."""
        return self._candidates.get(self.twin[model])


def _bans(one: AuditedModel) -> str:
    """Tokens that a model never says, which its weights do not tell."""
    configuration = getattr(one.model.network, "generation_config", None)
    return repr([getattr(configuration, name, None) or None for name in BANS])
