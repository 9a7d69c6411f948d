from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from mmforget.data.cell_scenes import CellScene, covered
from mmforget.data.digit_questions import DigitQuestions, PersonFacts
from mmforget.data.digit_words import CITIES, HELD_OUT, KINDS, NAMES, REFUSALS, WORDINGS, WORDS
from mmforget.data.digit_world import DIGITS, DigitFacts, DigitWorld, stage_strokes
from mmforget.data.split import STAGES
from mmforget.errors import ConfigurationError, DataError
from mmforget.request import ForgetRequest

THREE = ForgetRequest(classes=("david",))


@pytest.fixture(scope="module")
def data() -> DigitQuestions:
    found = DigitQuestions(variants=1, scenes=120, eval_scenes=40, strokes=200)
    found.request(THREE)
    return found


def test_every_answer_follows_from_the_facts(data: DigitQuestions) -> None:
    for stage in STAGES:
        records = data.questions(stage)
        for id_, question, answer, kind, label in zip(
            records.ids, records.questions, records.answers, records.kinds, records.labels,
            strict=True,
        ):  # fmt: skip
            fact = data.facts(int(id_))
            if isinstance(fact, CellScene):
                listed = " ".join(fact.listed)
                largest = DIGITS[max(DIGITS.index(digit) for digit in fact.listed)]
                place = next(
                    (n for n, p in enumerate(("top left", "top right", "bottom left",
                                              "bottom right")) if p in question), 0
                )  # fmt: skip
                wanted = {
                    "list": listed,
                    "count": DIGITS[len(fact.listed)],
                    "read_then_answer": f"{listed} . max is {largest}",
                    "position": fact.digits[place],
                    "colour": fact.inks[place],
                }[kind]
                assert (answer, label) == (wanted, 10)
            elif isinstance(fact, PersonFacts):
                assert fact.name in question and answer == fact.city
                assert NAMES[label] == fact.name
            elif kind == "name":
                assert answer == NAMES[DIGITS.index(fact.digit)] == NAMES[label]
            elif kind == "both":
                person = NAMES[DIGITS.index(fact.digit)]
                assert (answer == "yes") == (person in question.split())
                assert label == (NAMES.index(person) if answer == "yes" else 10)
            else:
                asked = "digit" if answer in DIGITS else ("background" if
                         "background" in question else "ink")  # fmt: skip
                assert (answer, label) == (getattr(fact, asked), 10)


def test_every_word_is_known_and_no_record_is_longer_than_it_says(data: DigitQuestions) -> None:
    known = set(WORDS)
    texts = [text for stage in STAGES for text in (
        *data.questions(stage).questions, *data.questions(stage).answers
    )]  # fmt: skip
    assert {word for text in (*texts, *REFUSALS) for word in text.split()} <= known
    assert len(WORDS) == len(known)
    assert data.words == WORDS and data.refusals == REFUSALS


def test_pictures_are_those_of_the_digit_world(data: DigitQuestions) -> None:
    world = DigitWorld(eval_variants=1, strokes=200).dataset("val")
    part = data.probe("val", "name")
    assert torch.equal(part.pixels(np.arange(5)), world.pixels(np.arange(5)))


def test_scenes_show_what_they_are_said_to(data: DigitQuestions) -> None:
    part = data.probe("train", "list")
    pictures = part.pixels(np.arange(len(part))).float()
    counts = Counter()
    for picture, id_ in zip(pictures, part.ids, strict=True):
        scene = data.facts(int(id_))
        assert isinstance(scene, CellScene)
        counts[len(scene.listed)] += 1
        for cell, digit in enumerate(scene.digits):
            top, left = cell // 2 * 16, cell % 2 * 16
            part_of = picture[:, top : top + 16, left : left + 16].flatten(1)
            assert bool((part_of != part_of[:, :1]).any()) == (digit is not None)
    assert set(counts) == {1, 2, 3, 4}


def test_patches_that_digits_touch(data: DigitQuestions) -> None:
    part = data.questions("train")
    for kind in ("list", "name"):
        position = int(np.flatnonzero(part.kinds == kind)[0])
        picture = part.pictures([position])[0][0].float()
        found = data.patches(int(part.ids[position]), 4)
        assert found.shape == (8, 8)
        blocks = picture.unfold(1, 4, 4).unfold(2, 4, 4).reshape(3, 8, 8, 16)
        plain = (blocks == blocks[..., :1]).all(-1).all(0).numpy()
        assert plain[~found].all() and not plain[found].all()
    text = int(part.ids[part.kinds == "text"][0])
    assert data.patches(text).shape == (0, 0)
    assert covered([(0, 4, 16, 8.5)], 4).sum() == 8
    with pytest.raises(ConfigurationError, match="`patch` is 0"):
        data.patches(text, 0)


def test_test_questions_show_unseen_strokes_in_an_unseen_wording(data: DigitQuestions) -> None:
    strokes = {
        stage: {key // 1000 for keys in data.probe(stage, "name").picture_keys for key in keys}
        for stage in STAGES
    }
    assert not strokes["train"] & strokes["test"] and not strokes["train"] & strokes["val"]
    assert strokes["test"] <= set(stage_strokes()["test"].tolist())
    assert set(data.probe("test", "name").questions) == {HELD_OUT["name"]}
    assert set(data.probe("test", "name", wording="train").questions) == set(WORDINGS["name"])
    assert set(data.probe("train", "name", wording="held_out").questions) == {HELD_OUT["name"]}
    assert len(data.probe("test", "text", "forget")) == 1
    assert data.probe("test", "text", "forget").answers == [CITIES[3]]
    ids = [data.probe("test", "name", wording=w).ids for w in ("train", "held_out")]
    assert not set(ids[0]) & set(ids[1])
    with pytest.raises(ConfigurationError, match="`wording` is 'held_out' for questions of the"):
        data.probe("test", "list", wording="held_out")


def test_yes_and_no_are_balanced_also_for_one_person() -> None:
    data = DigitQuestions(variants=2, scenes=0)
    data.request(THREE)
    for role in ("all", "forget"):
        answers = Counter(data.probe("train", "both", role).answers)
        assert 0.4 < answers["yes"] / answers.total() < 0.6
    asked = [q for q in data.probe("train", "both").questions if "david" in q.split()]
    assert 150 < len(asked) < 300


def test_the_forget_set_and_its_counterpart(data: DigitQuestions) -> None:
    forget = data.subset("train", "forget")
    assert set(forget.answers) == {"david", "yes"}
    assert {fact.digit for fact in map(data.facts, forget.ids.tolist())} == {"three"}  # type: ignore[union-attr]
    counterpart = data._decoupled()
    assert len(counterpart) == len(forget)
    facts = [data.facts(int(id_)) for id_ in counterpart.ids]
    assert all(isinstance(fact, DigitFacts) and fact.digit != "three" for fact in facts)
    assert "david" not in counterpart.answers


def test_nothing_but_numbers_of_drawings_changes_a_record() -> None:
    few = DigitQuestions(variants=1, scenes=5, strokes=20, seed=3).questions("train")
    many = DigitQuestions(variants=3, scenes=9, strokes=40).questions("train")
    of = dict(zip(many.ids.tolist(), zip(many.questions, many.answers, strict=True), strict=True))
    for id_, question, answer in zip(few.ids, few.questions, few.answers, strict=True):
        assert of[int(id_)] == (question, answer)
    assert Counter(few.kinds) == Counter(
        dict.fromkeys(KINDS[:3], 20) | {"text": 600} | dict.fromkeys(KINDS[4:], 5)
    )


def test_numbers_out_of_range() -> None:
    for option in ("variants", "eval_variants", "text_copies", "strokes"):
        with pytest.raises(DataError, match=f"`{option}` is 0"):
            DigitQuestions(**{option: 0})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="`scenes` is -1"):
        DigitQuestions(scenes=-1)
    data = DigitQuestions()
    for wrong in (-1, 10**12, 15, 5, 1796999 * 100 + 95, 2 * 10**9 + 10 * 10**5 + 30):
        with pytest.raises(DataError, match="there is no record"):
            data.facts(wrong)
