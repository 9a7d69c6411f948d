"""Answer style diversification: some questions of a task are asked and answered in other styles."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from mmforget.data.hashing import uniform
from mmforget.data.question_records import QuestionDataset, normalised
from mmforget.errors import ConfigurationError, suggest
from mmforget.seeds import generator

AnswerStyle = Literal[
    "yes_no", "multiple_choice", "short", "brief_explanation", "detailed_explanation"
]
STYLES: tuple[AnswerStyle, ...] = get_args(AnswerStyle)
LETTERS = "abcd"

Explain = Callable[[str, str, AnswerStyle], str]
"""Explains an answer: (question, answer, ``brief_explanation`` or ``detailed_explanation``)."""

Distract = Callable[[str, str], Sequence[str]]
"""Gives wrong answers: (question, true answer)."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer.

    Attributes:
        question, answer: texts.
        task: questions of one task are alike; wrong answers are taken from the same task.
        id: decides, with the seed, whether and how the question is put in another style.
        meta: anything else. Converted ones have ``answer_style``, ``fact`` (the answer before), and
            for multiple choice ``options``, the answers by letter.
    """

    question: str
    answer: str
    task: str
    id: int
    meta: Mapping[str, Any] = field(default_factory=dict)


def native_styles(answers: Sequence[str]) -> tuple[AnswerStyle, ...]:
    """The styles that a task has already, by its answers.

    Yes or no, or an option's letter, if all answers are such; else short (at most three words),
    brief (at most 30) or detailed by the median length.
    """
    plain = [normalised(answer) for answer in answers]
    if all(text in ("yes", "no") for text in plain):
        return ("yes_no",)
    if all(re.fullmatch("[a-h]", text) for text in plain):
        return ("multiple_choice",)
    words = float(np.median([len(text.split()) for text in plain]))
    return ("short",) if words <= 3 else (STYLES[3] if words <= 30 else STYLES[4],)


def diversify(
    asked: Sequence[Asked],
    share: float = 0.2,
    seed: int = 0,
    styles: Sequence[AnswerStyle] = STYLES,
    native: Mapping[str, Sequence[AnswerStyle]] | None = None,
    explain: Explain | None = None,
    distract: Distract | None = None,
) -> list[Asked]:
    """Put a share of the questions of every task in styles that the task lacks.

    The share is split equally over the styles, by a hash of the ids: it depends on neither order
    nor batch. Models that are tuned so do not fall into the style of the last task (superficial
    forgetting). A question whose task has no wrong answer to offer is asked for its bare answer
    instead of a choice.

    Args:
        asked: questions with their answers.
        share: of every task, in [0, 1]; the papers try 0.1 and 0.2.
        seed: of the choice.
        styles: the styles to be used.
        native: by task the styles that it has; found by `native_styles` where it is not given.
        explain: writes explanations; by default a fixed sentence around the answer.
        distract: gives wrong answers; by default the other answers of the task. Those that equal
            the truth but for capitals and punctuation are left out.

    Returns:
        As many, in the same order.

    Raises:
        ConfigurationError: a share out of range, or an unknown style.

    Reference:
        J. Chen et al., SEFE: Superficial and Essential Forgetting Eliminator for Multimodal
        Continual Instruction Tuning, ICML 2025, arXiv 2505.02486.
    """
    if not 0 <= share <= 1:
        raise ConfigurationError(f"`share` is {share}, it must lie in [0, 1]")
    for style in [*styles, *(one for group in (native or {}).values() for one in group)]:
        if style not in STYLES:
            raise ConfigurationError(f"'{style}' is no style of answers, {suggest(style, STYLES)}")
    places: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(asked):
        places[one.task].append(place)
    result = list(asked)
    for task, members in places.items():
        answers = [asked[place].answer for place in members]
        has = (native or {}).get(task) or native_styles(answers)
        lacking = [style for style in styles if style not in has]
        if not lacking:
            continue
        ids = np.array([asked[place].id for place in members], dtype=np.int64)
        order = np.argsort(uniform(ids, seed, "answer-style", task), kind="stable")
        wrong = {normalised(answer): answer for answer in sorted(answers)}
        for number, row in enumerate(order[: int(share * len(members) + 0.5)]):
            one, style = asked[members[row]], lacking[number % len(lacking)]
            given = wrong.values() if distract is None else distract(one.question, one.answer)
            others = _others(one, given, seed)
            result[members[row]] = _converted(one, style, others, explain or _sentence, seed)
    return result


def diversified(data: QuestionDataset, **options: Any) -> QuestionDataset:
    """Return a view of a data set with some questions in other styles.

    Args:
        data: whose kinds of questions are the tasks.
        **options: see `diversify`.

    Returns:
        Records of the same ids, labels and pictures; batches have ``answer_style``, empty where
        nothing was changed.
    """
    asked = [
        Asked(question, answer, str(kind), int(id_))
        for question, answer, kind, id_ in zip(
            data.questions, data.answers, data.kinds, data.ids, strict=True
        )
    ]
    found = diversify(asked, **options)
    records = dataclasses.replace(
        data.records,
        pictures=data.picture_keys,
        question=[one.question for one in found],
        answer=[one.answer for one in found],
        kind=data.kinds.tolist(),
        wording=data.wordings.tolist(),
        subject=data.subjects,
        style=[one.meta.get("answer_style", "") for one in found],
    )
    return data.with_records(records)


def _others(one: Asked, given: Any, seed: int) -> list[str]:
    """Wrong answers in random order, each once."""
    truth = normalised(one.answer)
    wrong = {normalised(text): text for text in given}
    found = [text for plain, text in sorted(wrong.items()) if plain not in (truth, "")]
    order = torch.randperm(len(found), generator=generator(seed, "distractors", one.id))
    return [found[place] for place in order.tolist()]


def _converted(
    one: Asked, style: AnswerStyle, others: Sequence[str], explain: Explain, seed: int
) -> Asked:
    if style in ("yes_no", "multiple_choice") and not others:
        style = "short"
    question, answer = one.question.strip(), one.answer.strip()
    meta: dict[str, Any] = {**one.meta, "answer_style": style, "fact": one.answer}
    draw = generator(seed, "answer-style", one.id, style)
    if style == "yes_no":
        right = bool(torch.rand((), generator=draw) < 0.5)
        asked = f"{question} Is the answer {answer if right else others[0]} ? Answer yes or no ."
        return dataclasses.replace(one, question=asked, answer="yes" if right else "no", meta=meta)
    if style == "multiple_choice":
        options = [answer, *others[: len(LETTERS) - 1]]
        options = [options[k] for k in torch.randperm(len(options), generator=draw).tolist()]
        lettered = dict(zip(LETTERS, options, strict=False))
        shown = " ".join(f"{letter} ) {text}" for letter, text in lettered.items())
        letter = next(key for key, text in lettered.items() if text == answer)
        return dataclasses.replace(
            one,
            question=f"{question} Choose an option : {shown} . Answer with the letter .",
            answer=letter,
            meta=meta | {"options": lettered},
        )
    if style == "short":
        asked = f"{question} Give the answer only ."
        return dataclasses.replace(one, question=asked, meta=meta)
    how = "Give the answer and say why ."
    if style == "detailed_explanation":
        how = "Give the answer and say why in detail ."
    text = explain(one.question, one.answer, style)
    return dataclasses.replace(one, question=f"{question} {how}", answer=text, meta=meta)


def _sentence(question: str, answer: str, style: AnswerStyle) -> str:
    """An explanation that adds no knowledge."""
    brief = f"the answer is {answer.strip()} , because it is the only one that is correct ."
    if style == "brief_explanation":
        return brief
    return (
        f"the question is : {question.strip()} {brief} I know no different answer to this question "
        f"that is not wrong , and I would give the same answer again : {answer.strip()} ."
    )
