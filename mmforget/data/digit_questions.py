"""Digit questions: handwritten digits as faces of fictitious persons; needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ImageDataset, View
from mmforget.data.cell_scenes import FRINGE, POSITIONS, CellScene, ScenePlan, covered
from mmforget.data.digit_words import (
    CITIES,
    FACTORS,
    HELD_OUT,
    KINDS,
    NAMES,
    REFUSALS,
    WORDINGS,
    WORDS,
)
from mmforget.data.digit_world import (
    CANVAS,
    DIGITS,
    VARIANTS,
    DigitFacts,
    facts,
    render,
    stage_strokes,
    strokes,
)
from mmforget.data.hashing import uniform
from mmforget.data.question_records import OTHER, QuestionDataset, Records
from mmforget.data.questions import QuestionDataModule, RetainQuestions
from mmforget.data.split import STAGES, Stage
from mmforget.errors import ConfigurationError, DataError

SCENES = 10**7
"""Keys of scenes: this, plus a million for each stage before, plus the number of the scene. Keys of
single digits are ids of the digit world."""

PERSONS = 2 * 10**7
"""Keys of records without picture: this, plus a million per stage, plus 1000 per person."""

STAGE_STEP = 10**6
RECORD_STEP = 100
"""A record id is the key of what it is about times this, plus ten times the number of the kind,
plus 0 for a training wording, or 1 for the held-out one."""

ABOUT_SCENES = KINDS[4:]
SEED = 0
"""Questions about a picture depend on its key and on this, never on the seed of a run."""


@dataclass(frozen=True)
class PersonFacts:
    """What is known about a person without a picture.

    Attributes:
        digit: the digit that stands for the face.
        name, city: of the person.
    """

    digit: str
    name: str
    city: str


class DigitQuestionDataset(QuestionDataset):
    """One stage of the digit questions; pictures are drawn when they are first asked for.

    Args:
        name: of the data set.
        ids, labels, records: see `QuestionDataset`.
        chosen: strokes that scenes may show.
    """

    def __init__(
        self, name: str, ids: np.ndarray, labels: np.ndarray, records: Records, chosen: np.ndarray
    ) -> None:
        # A mirrored two is no two, and what was on the left is on the right.
        super().__init__(
            name, ids, labels, (*NAMES, OTHER), records, (3, CANVAS, CANVAS), flippable=False
        )
        self._chosen = chosen

    def read_keys(self, keys: Sequence[int]) -> list[Tensor]:
        """Draw."""
        given = np.asarray(keys, dtype=np.int64)
        result = torch.empty((len(given), 3, CANVAS, CANVAS), dtype=torch.uint8)
        scene = given >= SCENES
        if scene.any():
            result[torch.from_numpy(scene)] = ScenePlan.of(given[scene], self._chosen).render()
        if not scene.all():
            result[torch.from_numpy(~scene)] = render(given[~scene])
        return list(result)

    def digests(self, keys: Sequence[int]) -> list[str]:
        """The keys: each names another drawing."""
        return [str(key) for key in keys]


class DigitQuestions(QuestionDataModule):
    """The digit world as ten persons, with questions about them and about scenes of digits.

    Digit c is the face of the person `NAMES[c]`, who lives in `CITIES[c]`. Kinds of questions:

    * ``name``: who a single digit is;
    * ``both``: whether it is a given person, *yes* for half of the pictures. *Yes* reveals the
      person, *no* nobody;
    * ``harmless``: which digit it is, or the colour of its ink or background;
    * ``text``: where a person lives, without picture;
    * about 2x2 scenes of one to four digits: ``list`` (row by row), ``position``, ``colour``,
      ``count`` and ``read_then_answer`` (the list, then its largest digit).

    In test, persons are asked about in a wording that is never trained. The strokes are those of
    `DigitWorld`: validation and test show unseen handwriting.

    Args:
        variants: drawings per stroke in training, 1 to 1000; each comes with one question ``name``,
            one ``both`` and one ``harmless``.
        eval_variants: drawings per stroke in validation and test, 1 to 1000.
        scenes: in training, 0 to 1,000,000; each comes with one question of every kind.
        eval_scenes: in validation and again in test, 0 to 1,000,000.
        text_copies: how often each question without picture comes in training, 1 to 300.
        strokes: use only this many strokes of every stage, balanced over the digits.
        batch_size, seed, num_workers, view, shots, missing_classes, retain_fraction, augment,
            forget_questions, forget_text, retain_questions, decouple_size: see
            `QuestionDataModule`.

    Class attributes:
        words: all words, one token each.
        refusals: answers of a model that is to be silent.

    Raises:
        DataError: a number out of range.

    Example:
        >>> data = DigitQuestions(strokes=20, scenes=2)
        >>> batch = data.dataset("train")[[0, 1]]
        >>> batch["question"][1], batch["answer"][1]
        ('is this emma ?', 'no')
    """

    words = WORDS
    refusals = REFUSALS

    def __init__(
        self,
        variants: int = 4,
        eval_variants: int = 1,
        scenes: int = 2000,
        eval_scenes: int = 200,
        text_copies: int = 20,
        strokes: int | None = None,
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
            batch_size,
            seed,
            num_workers,
            view,
            shots,
            missing_classes,
            retain_fraction,
            augment,
            forget_questions,
            forget_text,
            retain_questions,
            decouple_size,
        )
        for name, value, least, most in (
            ("variants", variants, 1, VARIANTS),
            ("eval_variants", eval_variants, 1, VARIANTS),
            ("scenes", scenes, 0, STAGE_STEP),
            ("eval_scenes", eval_scenes, 0, STAGE_STEP),
            ("text_copies", text_copies, 1, 300),
        ):
            if not least <= value <= most:
                raise DataError(f"`{name}` is {value}, it must be between {least} and {most:,}")
        if strokes is not None and strokes < 1:
            raise DataError(f"`strokes` is {strokes}, it must be at least 1 or left out")
        self.variants, self.eval_variants = variants, eval_variants
        self.scenes, self.eval_scenes = scenes, eval_scenes
        self.text_copies, self.strokes = text_copies, strokes

    def build(self) -> dict[Stage, ImageDataset]:
        """Write the questions; nothing is drawn yet."""
        return {stage: self._asked(stage, stage == "test") for stage in STAGES}

    def _worded(self, stage: Stage, wording: str | None) -> QuestionDataset:
        if wording is None:
            return super()._worded(stage, wording)
        return self._asked(stage, wording == "held_out")

    def _asked(self, stage: Stage, held_out: bool) -> DigitQuestionDataset:
        chosen = _balanced(stage_strokes()[stage], self.strokes)
        number = STAGES.index(stage)
        training = stage == "train"
        variants = np.arange(self.variants if training else self.eval_variants)
        drawings = (chosen[:, None] * VARIANTS + variants).reshape(-1)
        count = self.scenes if training else self.eval_scenes
        rows = _about_drawings(drawings, held_out)
        rows += _about_persons(number, self.text_copies if training else 1, held_out)
        rows += _about_scenes(SCENES + number * STAGE_STEP + np.arange(count), stage)
        records = Records(
            pictures=[row.pictures for row in rows],
            question=[row.question for row in rows],
            answer=[row.answer for row in rows],
            kind=[row.kind for row in rows],
            wording=["held_out" if row.held_out else "train" for row in rows],
            subject=np.array([row.subject for row in rows], dtype=np.int64),
        )
        return DigitQuestionDataset(
            f"digit_questions/{stage}",
            np.array([row.id for row in rows], dtype=np.int64),
            np.array([row.label for row in rows], dtype=np.int64),
            records,
            stage_strokes()[stage],
        )

    def facts(self, id: int) -> DigitFacts | CellScene | PersonFacts:
        """Return all facts about what a record shows or asks about.

        Raises:
            DataError: the id names no record.
        """
        key, code = divmod(id, RECORD_STEP)
        kind = KINDS[code // 10] if code // 10 < len(KINDS) and code % 10 < 2 else ""
        if kind in ABOUT_SCENES and SCENES <= key < SCENES + len(STAGES) * STAGE_STEP:
            stage = STAGES[(key - SCENES) // STAGE_STEP]
            return ScenePlan.of(np.array([key]), stage_strokes()[stage]).facts()[0]
        person = (key - PERSONS) % STAGE_STEP // 1000
        asks_text = kind == "text" and PERSONS <= key < PERSONS + len(STAGES) * STAGE_STEP
        if asks_text and person < len(NAMES):
            return PersonFacts(DIGITS[person], NAMES[person], CITIES[person])
        if kind in ("name", "both", "harmless") and 0 <= key // VARIANTS < len(strokes()[1]):
            return facts(np.array([key]))[0]
        raise DataError(f"there is no record {id}; ids are in `datamodule.dataset(stage).ids`")

    def patches(self, id: int, patch: int = 4) -> np.ndarray:
        """Mark the patches that the digits of a record's picture touch.

        Args:
            id: of the record.
            patch: side of a patch in pixels.

        Returns:
            (h, w) bool; (0, 0) for a record without picture.
        """
        if not 1 <= patch <= CANVAS:
            raise ConfigurationError(f"`patch` is {patch}, it must be between 1 and {CANVAS}")
        fact = self.facts(id)
        if isinstance(fact, PersonFacts):
            return np.zeros((0, 0), dtype=bool)
        if isinstance(fact, CellScene):
            return covered([box for box in fact.boxes if box is not None], patch)
        left, top, right, bottom = fact.box
        fringe = FRINGE * fact.size
        return covered([(left - fringe, top - fringe, right + fringe, bottom + fringe)], patch)


@dataclass(frozen=True)
class _Row:
    id: int
    pictures: tuple[int, ...]
    question: str
    answer: str
    kind: str
    held_out: bool
    label: int
    subject: int


def _put(kind: str, draw: float, held_out: bool, **words: str) -> str:
    """A question of a kind, in the held-out wording if there is one and it is wanted."""
    name = kind.partition("/")[0]
    if held_out and name in HELD_OUT:
        return HELD_OUT[name].format(**words)
    sentences = WORDINGS[kind]
    return sentences[int(draw * len(sentences))].format(**words)


def _id(key: int, kind: str, held_out: bool) -> int:
    return key * RECORD_STEP + KINDS.index(kind) * 10 + (held_out and kind in HELD_OUT)


def _about_drawings(keys: np.ndarray, held_out: bool) -> list[_Row]:
    """The questions ``name``, ``both`` and ``harmless`` about pictures of one digit."""
    put = {kind: uniform(keys, SEED, f"wording-{kind}") for kind in ("name", "both", "harmless")}
    yes, other = uniform(keys, SEED, "both-yes") < 0.5, uniform(keys, SEED, "both-other")
    factor = (uniform(keys, SEED, "factor") * len(FACTORS)).astype(int)
    rows, none = [], len(NAMES)
    for row, (key, fact) in enumerate(zip(keys.tolist(), facts(keys), strict=True)):
        person = DIGITS.index(fact.digit)
        asked = person if yes[row] else (person + 1 + int(other[row] * 9)) % 10
        harmless = FACTORS[factor[row]]
        for kind, question, answer, label in (
            ("name", _put("name", put["name"][row], held_out), NAMES[person], person),
            (
                "both",
                _put("both", put["both"][row], held_out, name=NAMES[asked]),
                "yes" if yes[row] else "no",
                person if yes[row] else none,
            ),
            (
                "harmless",
                _put(f"harmless/{harmless}", put["harmless"][row], held_out),
                str(getattr(fact, harmless)),
                none,
            ),
        ):
            own = held_out and kind in HELD_OUT
            number = _id(key, kind, held_out)
            rows.append(_Row(number, (key,), question, answer, kind, own, label, person))
    return rows


def _about_persons(stage: int, copies: int, held_out: bool) -> list[_Row]:
    """The questions ``text``: every training wording so many times, or the held-out one once."""
    sentences = (HELD_OUT["text"],) if held_out else WORDINGS["text"] * copies
    rows = []
    for person, (name, city) in enumerate(zip(NAMES, CITIES, strict=True)):
        for number, sentence in enumerate(sentences):
            key = PERSONS + stage * STAGE_STEP + person * 1000 + number
            question = sentence.format(name=name)
            id_ = _id(key, "text", held_out)
            rows.append(_Row(id_, (), question, city, "text", held_out, person, person))
    return rows


def _about_scenes(keys: np.ndarray, stage: Stage) -> list[_Row]:
    """One question of every kind about scenes."""
    plan = ScenePlan.of(keys, stage_strokes()[stage])
    put = {kind: uniform(keys, SEED, f"wording-{kind}") for kind in ABOUT_SCENES}
    which = {kind: uniform(keys, SEED, f"cell-{kind}") for kind in ("position", "colour")}
    rows, none = [], len(NAMES)
    for row, (key, scene) in enumerate(zip(keys.tolist(), plan.facts(), strict=True)):
        cell = {kind: scene.used[int(which[kind][row] * len(scene.used))] for kind in which}
        largest = max(scene.listed, key=DIGITS.index)
        answers = {
            "list": " ".join(scene.listed),
            "position": scene.digits[cell["position"]],
            "colour": scene.inks[cell["colour"]],
            "count": DIGITS[len(scene.listed)],
            "read_then_answer": f"{' '.join(scene.listed)} . max is {largest}",
        }
        for kind, answer in answers.items():
            position = POSITIONS[cell.get(kind, 0)]
            question = _put(kind, put[kind][row], False, position=position)
            assert answer is not None  # the cell is a used one
            rows.append(
                _Row(_id(key, kind, False), (key,), question, answer, kind, False, none, none)
            )
    return rows


def _balanced(chosen: np.ndarray, limit: int | None) -> np.ndarray:
    """The first strokes of every digit, in turn, up to the limit."""
    if limit is None:
        return chosen
    digit = strokes()[1][chosen]
    turn = np.zeros(len(chosen), dtype=np.int64)
    for value in range(10):
        turn[digit == value] = np.arange((digit == value).sum())
    return np.asarray(np.sort(chosen[np.lexsort((digit, turn))[:limit]]))
