from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmforget.data.answer_styles import STYLES, Asked, diversified, diversify, native_styles
from mmforget.data.digit_questions import DigitQuestions
from mmforget.data.digit_words import WORDS
from mmforget.data.question_records import normalised
from mmforget.errors import ConfigurationError

COLOURS = ("red", "Red.", "blue", "green", "pink", "white")


def asked(number: int = 300, task: str = "colour") -> list[Asked]:
    return [
        Asked(f"What colour is {n}?", COLOURS[n % len(COLOURS)], task, n) for n in range(number)
    ]


def style(one: Asked) -> str:
    return one.meta.get("answer_style", "")


def test_the_share_is_split_equally_over_the_styles_that_a_task_lacks() -> None:
    both = [*asked(), *(Asked(f"Is it {n}?", ("yes", "No")[n % 2], "both", n) for n in range(100))]
    found = diversify(both)
    assert len(found) == 400
    counts = Counter((one.task, style(one)) for one in found)
    lacking = ("yes_no", "multiple_choice", "brief_explanation", "detailed_explanation")
    assert {name: counts["colour", name] for name in lacking} == dict.fromkeys(lacking, 15)
    assert counts["colour", "short"] == counts["both", "yes_no"] == 0
    assert sum(counts["both", name] for name in STYLES) == 20
    assert [one.task for one in found] == [one.task for one in both]
    unchanged = [(new, old) for new, old in zip(found, both, strict=True) if not style(new)]
    assert all(new is old for new, old in unchanged) and len(unchanged) == 320


def test_the_truth_survives_every_style() -> None:
    found = [one for one in diversify(asked(), share=1.0) if style(one)]
    yes = Counter()
    for one in found:
        fact = one.meta["fact"]
        assert fact == COLOURS[one.id % len(COLOURS)]
        assert one.question.startswith(f"What colour is {one.id}?")
        if style(one) == "yes_no":
            candidate = one.question.partition("Is the answer ")[2].partition(" ?")[0]
            assert (one.answer == "yes") == (normalised(candidate) == normalised(fact))
            yes[one.answer] += 1
        elif style(one) == "multiple_choice":
            options = one.meta["options"]
            plain = [normalised(text) for text in options.values()]
            assert options[one.answer] == fact
            assert len(set(plain)) == len(plain) == 4 and list(options) == list("abcd")
            yes[one.answer] += 1
        else:
            assert fact in one.answer
    assert min(yes.values()) > 8 and set(yes) == {"yes", "no", *"abcd"}


def test_the_choice_depends_on_seed_and_id_alone() -> None:
    rows = asked()
    first, again = diversify(rows), diversify(rows[::-1])[::-1]
    chosen = [bool(style(one)) for one in first]
    assert chosen == [bool(style(one)) for one in again]
    assert first == diversify(rows)
    assert chosen != [bool(style(one)) for one in diversify(rows, seed=1)]
    small = {one.id for one in diversify(rows, share=0.1) if style(one)}
    assert small < {one.id for one in first if style(one)}
    assert diversify(rows, share=0) == rows


def test_explanations_and_wrong_answers_may_come_from_elsewhere() -> None:
    def explain(question: str, answer: str, kind: str) -> str:
        return f"{kind} of {answer}"

    def distract(question: str, answer: str) -> list[str]:
        return [answer.upper(), "violet"]

    found = diversify(asked(), share=1.0, explain=explain, distract=distract)
    for one in found:
        if style(one).endswith("explanation"):
            assert one.answer == f"{style(one)} of {one.meta['fact']}"
        if style(one) == "multiple_choice":
            assert set(one.meta["options"].values()) == {one.meta["fact"], "violet"}


def test_without_wrong_answers_nothing_can_be_chosen() -> None:
    same = [Asked("What?", "This !", "one", n) for n in range(20)]
    found = diversify([*same, Asked("What?", "THIS", "one", 20)], share=1.0, native={"one": []})
    assert {style(one) for one in found} == {"short", "brief_explanation", "detailed_explanation"}


def test_native_styles() -> None:
    assert native_styles(["yes", "No."]) == ("yes_no",)
    assert native_styles(["A", "c)"]) == ("multiple_choice",)
    assert native_styles(["yes", "two red birds"]) == ("short",)
    assert native_styles(["it is red because it is ripe"]) == ("brief_explanation",)
    assert native_styles(["word " * 31]) == ("detailed_explanation",)
    only = diversify(asked(20), share=1.0, styles=["short"])
    assert only == asked(20)


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match="`share` is 20"):
        diversify(asked(), share=20)
    with pytest.raises(ConfigurationError, match="'shorts' is no style of answers, did you mean"):
        diversify(asked(), styles=["shorts"])  # type: ignore[list-item]


def test_a_data_set_in_several_styles() -> None:
    data = DigitQuestions(variants=1, scenes=20, strokes=100).questions("train")
    part = data.subset(np.flatnonzero(np.isin(data.kinds, ["name", "both", "list"])))
    view = diversified(part, share=0.5)
    assert view.ids.tolist() == part.ids.tolist() and view.hash != part.hash
    places = list(range(len(view)))
    new, old = view[places], part[places]
    assert 0.45 < np.mean([bool(one) for one in new["answer_style"]]) < 0.55
    changed = [bool(one) for one in new["answer_style"]]
    assert changed == [a != b for a, b in zip(new["question"], old["question"], strict=True)]
    assert all((a[0] == b[0]).all() for a, b in zip(new["images"], old["images"], strict=True))
    assert "answer_style" not in old
    inner = view.subset(np.array([5, 3]))
    assert inner[[0]]["question"] == [new["question"][5]]
    # everything stays within the vocabulary of the shipped model
    words = {word for text in (*view.questions, *view.answers) for word in text.lower().split()}
    assert words <= set(WORDS)
