"""The data module that gives questions about pictures their roles."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, Self, get_args

import numpy as np

from mmforget.data.base import ForgetDataModule, View
from mmforget.data.hashing import uniform
from mmforget.data.question_records import (
    OTHER,
    TEXT,
    Overlap,
    QuestionDataset,
    normalised,
    overlap_of,
)
from mmforget.data.question_records import Records as Records
from mmforget.data.split import STAGES, ForgetSplit, Labelled, Role, Stage, class_indices
from mmforget.errors import AccessError, ConfigurationError, DataError, RequestError, suggest
from mmforget.request import ForgetRequest

logger = logging.getLogger(__name__)

RetainQuestions = Literal["all", "harmless"]


class QuestionDataModule(ForgetDataModule):
    """Questions about pictures, whose roles follow from the entity that the answer reveals.

    The forget set holds the records of the requested entities whose kind is in `forget_questions`.
    Everything else is retained, also harmless questions about the very same pictures. Subclasses
    implement `build`.

    Args:
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction: see
            `ForgetDataModule`. `view` may also be ``decoupled``: ``forget`` and ``retain`` as in
            ``paired``, and ``decouple``, pictures of retained entities with the questions of the
            forget set and their true answers (Prompt Decouple).
        augment: shift training pictures, and mirror them where the data set allows it.
        forget_questions: kinds of questions that reveal an entity and are to be forgotten.
        forget_text: whether questions of the kind ``text`` belong to the forget set too; else what
            a model knows about the entity without seeing it is to be retained.
        retain_questions: ``all``, or ``harmless``: the retain set then holds neither
            `forget_questions` nor ``text`` (the protocol of SafeEraser). Validation, test and the
            retrained reference are not affected.
        decouple_size: records of the stream ``decouple``; None for as many as there are in the
            forget set.

    Raises:
        DataError, ConfigurationError: a value out of range, or a kind that the data does not have.

    Reference:
        J. Chen et al., SafeEraser: Enhancing Safety in Multimodal Large Language Models through
        Multimodal Machine Unlearning, 2025, arXiv 2502.12520.
    """

    def __init__(
        self,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        view: View = "full",
        shots: int | None = None,
        missing_classes: Sequence[str | int] = (),
        retain_fraction: float = 1.0,
        augment: bool = False,
        forget_questions: Sequence[str] = ("name", "both"),
        forget_text: bool = False,
        retain_questions: RetainQuestions = "all",
        decouple_size: int | None = None,
    ) -> None:
        super().__init__(
            batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment
        )
        if isinstance(forget_questions, str) or not forget_questions:
            raise ConfigurationError(
                f"`forget_questions` is {forget_questions!r}, it must be a list of at least one "
                "kind of question, for example ['name']"
            )
        if retain_questions not in get_args(RetainQuestions):
            raise ConfigurationError(
                f"`retain_questions` is '{retain_questions}', "
                f"{suggest(retain_questions, get_args(RetainQuestions))}"
            )
        if decouple_size is not None and decouple_size < 1:
            raise DataError(f"`decouple_size` is {decouple_size}, it must be at least 1 or null")
        self.forget_questions = tuple(forget_questions)
        self.forget_text = forget_text
        self.retain_questions: RetainQuestions = retain_questions
        self.decouple_size = decouple_size
        self._drawn: tuple[int, ...] = ()  # what may be retained, harmless or not
        self._told: set[str] = set()  # warnings, so that none comes twice

    # ---- roles ------------------------------------------------------------------------------

    @property
    def forgotten_kinds(self) -> tuple[str, ...]:
        """Kinds of questions that a forgotten entity loses."""
        return (*self.forget_questions, *((TEXT,) if self.forget_text else ()))

    def questions(self, stage: Stage) -> QuestionDataset:
        """Return everything of a stage, for audits; see `dataset`."""
        data = self.dataset(stage)
        assert isinstance(data, QuestionDataset)  # what `build` of this family returns
        return data

    def request(self, *requests: ForgetRequest) -> ForgetSplit:
        """Give every record its role; warns of records that are to be forgotten and retained.

        Raises:
            RequestError: as in `ForgetDataModule.request`, or the class `OTHER` is named.
            ConfigurationError: a kind in `forget_questions` that the data does not have.
        """
        names = self.class_names
        for one in requests:
            if len(names) - 1 in class_indices(one.classes, names, f"request '{one.name}'"):
                raise RequestError(
                    f"request '{one.name}' names class '{OTHER}', which holds the questions that "
                    "reveal no entity; name entities, or single `samples`"
                )
        kinds = sorted({kind for stage in STAGES for kind in self._records(stage).kinds})
        for kind in self.forget_questions:
            if kind not in kinds:
                raise ConfigurationError(
                    f"`forget_questions` names the kind '{kind}', {suggest(kind, kinds)}"
                )
        split = super().request(*requests)
        self._drawn = split.ids["train/retain"]
        if self.retain_questions == "harmless":
            self.split = split = self._harmless(split)
        self._warn_of_overlap()
        return split

    def _harmless(self, split: ForgetSplit) -> ForgetSplit:
        data = self._records("train")
        free = ~np.isin(data.kinds, (*self.forget_questions, TEXT))
        kept = np.intersect1d(data.ids[free], np.asarray(split.ids["train/retain"], np.int64))
        if not len(kept):
            raise DataError(
                "`retain_questions` is 'harmless', but every retained record asks one of "
                f"{', '.join((*self.forget_questions, TEXT))}; set it to 'all'"
            )
        return dataclasses.replace(split, ids={**split.ids, "train/retain": tuple(kept.tolist())})

    def overlap(self) -> Overlap:
        """What the forget and the retain set of the training data have in common."""
        forget, retain = (self._of_role("train", role) for role in ("forget", "retain"))
        return overlap_of(forget, retain)

    def _warn_of_overlap(self) -> None:
        found = self.overlap()
        if found.pairs:
            self._tell(
                f"{found.pairs} records of the forget set have the same pictures and question as "
                "records of the retain set: they are to be forgotten and retained at once"
            )
        if found.copies:
            self._tell(
                f"{found.copies} pictures of the forget set are also in the retain set, as files "
                "of their own; check whether they show what is to be forgotten"
            )

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(text)

    def _labelled(self, stage: Stage) -> Labelled:
        data = self._records(stage)
        assert data.labels is not None  # a whole stage is never a view without labels
        lost = np.isin(data.kinds, self.forgotten_kinds)
        labels = np.where(lost, data.labels, len(data.class_names) - 1)
        return Labelled(data.ids, labels, data.hash)

    def _records(self, stage: Stage) -> QuestionDataset:
        data = self._stage(stage)
        assert isinstance(data, QuestionDataset)  # what `build` of this family returns
        return data

    def _of_role(self, stage: Stage, role: Role) -> QuestionDataset:
        """Records of a role, whatever a method may read."""
        assert self.split is not None  # the caller has looked
        data = self._records(stage)
        wanted = np.asarray(self.split.ids[f"{stage}/{role}"], np.int64)
        return data.subset(np.flatnonzero(np.isin(data.ids, wanted)))

    def subset(self, stage: Stage, role: Role, whole: bool = False) -> QuestionDataset:
        """Return the records of a role; see `ForgetDataModule.subset`."""
        data = super().subset(stage, role, whole)
        assert isinstance(data, QuestionDataset)  # what `build` of this family returns
        return data

    def unlimited(self) -> Self:
        """Return a shallow copy without limits, in which all kinds of questions are retained."""
        view = copy.copy(self)
        view.retain_questions = "all"
        return super(QuestionDataModule, view).unlimited()

    # ---- audits -----------------------------------------------------------------------------

    def probe(
        self, stage: Stage, kind: str, role: Role = "all", wording: str | None = None
    ) -> QuestionDataset:
        """Return the questions of one kind about the entities of a role, for audits.

        Unlike `subset` it goes by the entity that is shown or asked about: the role ``forget``
        with the kind ``harmless`` gives harmless questions about pictures of forgotten entities.

        Args:
            stage: whose pictures are shown.
            kind: of the questions.
            role: of the entities; a request by `samples` gives the named records.
            wording: how the questions are put; None for whatever the stage uses.

        Raises:
            AccessError: called by a method.
            ConfigurationError: a role without request, or a kind or wording that does not occur.
        """
        if self.access is not None:
            raise AccessError(
                "a forgetting method may not probe; use `subset` with the role 'forget' or 'retain'"
            )
        data = self._worded(stage, wording)
        if kind not in data.kinds:
            raise ConfigurationError(
                f"`kind` is '{kind}', {suggest(kind, sorted(set(data.kinds)))}"
            )
        chosen = data.kinds == kind
        if wording is not None:
            if wording not in (found := data.wordings[chosen]):
                raise ConfigurationError(
                    f"`wording` is '{wording}' for questions of the kind '{kind}' in {stage}, "
                    f"{suggest(wording, sorted(set(found)))}"
                )
            chosen &= data.wordings == wording
        return data.subset(np.flatnonzero(chosen & self.plays(data, role)))

    def _worded(self, stage: Stage, wording: str | None) -> QuestionDataset:
        """The records of a stage among which a wording is looked for."""
        return self._records(stage)

    def plays(self, data: QuestionDataset, role: Role) -> np.ndarray:
        """(N,) bool: records about entities of a role."""
        if role not in get_args(Role):
            raise ConfigurationError(f"there is no role '{role}', {suggest(role, get_args(Role))}")
        if role == "all":
            return np.ones(len(data), dtype=bool)
        split = self.split
        if split is None:
            raise ConfigurationError(
                f"role '{role}' needs a request; call `datamodule.request(...)` first"
            )
        classes: Mapping[str, Sequence[int]] = {
            "forget": split.forget_classes,
            "previous": split.previous_classes,
            "missing": split.missing_classes,
            "retain": split.retain_classes,
        }
        about = np.isin(data.subjects, np.asarray(classes[role], dtype=np.int64))

        def named(last: bool) -> np.ndarray:
            given = self._requests[-1:] if last else self._requests[:-1]
            samples = [sample for one in given for sample in one.samples]
            return np.isin(data.ids, np.asarray(samples, dtype=np.int64))

        if role == "retain":
            return about & ~named(last=True) & ~named(last=False)
        if role == "missing":
            return about
        return about | named(last=role == "forget")

    # ---- Prompt Decouple --------------------------------------------------------------------

    def _decoupled(self) -> QuestionDataset:
        """Retained records with pictures that ask what the forget set asks.

        The i-th record has the question of the i-th record of the forget set. Pictures are drawn
        by the seed, each once before any comes again.

        Raises:
            DataError: no question of the forget set is asked about a retained picture.
        """
        self._check_access("train", "retain", whole=False)
        forget = self.subset("train", "forget")
        assert self.split is not None  # `subset` has looked
        data = self._records("train")
        gone = (*self.split.forget_classes, *self.split.previous_classes)
        safe = ~np.isin(data.subjects, np.asarray(gone, dtype=np.int64))
        safe &= np.isin(data.ids, np.asarray(self._drawn, np.int64))
        asked = [normalised(question) for question in forget.questions]
        wanted, pool = set(asked), defaultdict(list)
        chosen = np.flatnonzero(safe)
        for position in chosen[np.argsort(uniform(data.ids[chosen], self.seed, "decouple"))]:
            row = int(data._rows[position])
            question = normalised(data.records.question[row])
            if question in wanted and data.records.pictures[row]:
                pool[question].append(int(position))
        asked = [question for question in asked if question in pool]
        if not asked:
            raise DataError(
                "no question of the forget set is also asked about a picture of a retained entity, "
                "which the view 'decoupled' needs; add such records, or use the view 'paired'"
            )
        if len(asked) < len(forget):
            logger.info(
                "%d of %d records of the forget set ask what is never asked about a retained "
                "picture; they have no counterpart to decouple",
                len(forget) - len(asked),
                len(forget),
            )
        used: dict[str, int] = defaultdict(int)
        found = []
        for number in range(self.decouple_size or len(forget)):
            question = asked[number % len(asked)]
            found.append(pool[question][used[question] % len(pool[question])])
            used[question] += 1
        result = data.subset(np.array(found))
        return result if self._labels_allowed("retain") else result.unlabelled()
