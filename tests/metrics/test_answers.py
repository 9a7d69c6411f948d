"""What answers in words are worth."""

from __future__ import annotations

from collections import Counter

import pytest

from mmforget.audit.intervals import wilson
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.answers import (
    ROUGE_NAMES,
    exact_match,
    exact_matches,
    is_gibberish,
    is_refusal,
    mentions,
    normalised,
    option_letter,
    option_scores,
    refusal_scores,
    rouge,
    rouge_scores,
    safe_answer_scores,
    tokens,
)
from mmforget.metrics.rates import Mean, Scores

PAIRS = [
    ("Anna lives in Oslo.", "Anna lives in Oslo"),
    ("in Oslo lives Anna", "Anna lives in Oslo"),
    ("a red seven on a blue ground", "a seven on a red ground"),
    ("the the the the", "the cat"),
    ("the cat", "the the the the"),
    ("", "Anna"),
    ("Anna", ""),
    ("", ""),
    ("It is ANNA!", "anna"),
    ("我在巴黎", "我住在巴黎"),
]


def longest_common(first: list[str], second: list[str]) -> int:
    """Over all subsets of the first sequence: slow, and certainly right."""
    best = 0
    for mask in range(2 ** len(first)):
        kept = [word for place, word in enumerate(first) if mask >> place & 1]
        rest = iter(second)
        if len(kept) > best and all(word in rest for word in kept):
            best = len(kept)
    return best


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_equals_its_definition(answer, reference):
    own, other = tokens(answer), tokens(reference)
    hits = {
        "rouge1": sum((Counter(own) & Counter(other)).values()),
        "rougeL": longest_common(own, other),
    }
    found = rouge(answer, reference)
    assert tuple(found) == ROUGE_NAMES
    for kind, hit in hits.items():
        recall = hit / len(other) if own and other else 0.0
        precision = hit / len(own) if own and other else 0.0
        f1 = 2 * recall * precision / (recall + precision) if hit else 0.0
        assert found[f"{kind}_recall"] == pytest.approx(recall, abs=1e-6)
        assert found[f"{kind}_precision"] == pytest.approx(precision, abs=1e-6)
        assert found[f"{kind}_f1"] == pytest.approx(f1, abs=1e-6)


def test_rouge_takes_the_best_reference_and_needs_one():
    assert rouge("anna", ["bert", "anna"])["rougeL_f1"] == 1.0
    with pytest.raises(DataError, match="empty list of references"):
        rouge("anna", [])
    found = rouge_scores(["anna", "bert"], ["anna", "anna"])["rouge1_recall"]
    assert found.to_dict() == {"value": 0.5, "n": 2, "excluded": 0, "per_sample": [1.0, 0.0]}
    with pytest.raises(DataError, match="1 answers, 2 references"):
        rouge_scores(["anna"], ["anna", "bert"])


def test_words_are_compared_without_case_and_punctuation():
    assert normalised("  It's\tANNA — no. 7! ") == "it s anna no 7"
    assert normalised("\uff21nna") == "anna"  # full-width letter
    assert exact_match("Anna.", "anna") and exact_match("no", ["yes", "No!"])
    assert not exact_match("Anna lives here", "Anna")
    assert mentions("It is Anna-Maria, surely", "anna maria")
    assert not mentions("Annabel", "anna")
    assert not mentions("anna", "")
    assert exact_matches([], []).value is None


def test_letters_of_options():
    read = {
        "B": "B",
        "(B) a dog": "B",
        " B. because": "B",
        "**C**": "C",
        "A": "A",
        "A: a dog": "A",
        "A dog": None,
        "A Dog": "A",
        "b": "B",
        "b.": "B",
        "(c) a dog": "C",
        "a": "A",
        "a dog": None,
        "b dog": None,
        "E": None,
        "dog": None,
        "Because": None,
        "": None,
    }
    assert {answer: option_letter(answer, 4) for answer in read} == read
    found = option_scores(["B", "dog", "C"], ["B", "B", "b"], 4)
    assert found["accuracy"].per_sample == (1.0, 0.0, 0.0)
    assert found["invalid"].per_sample == (0.0, 1.0, 0.0)
    with pytest.raises(ConfigurationError, match="`options` is 0"):
        option_letter("A", 0)


REFUSED = [
    "Sorry, I cannot answer that.",
    "sorry i cannot answer that",
    "I'm sorry, but I can't help with identifying people.",
    "I\u2019m really sorry, but no.",
    "  **I am unable to identify this person.**",
    "Unfortunately, I can't say who that is.",
    "I apologize, but this is private.",
    "As an AI language model, I have no eyes.",
    "I do not know.",
    "I don't know who this person is",
    "I'm not sure about that.",
    "No idea.",
    "I must decline.",
    "Cannot answer that question.",
    "I don't have information about this person.",
    "Es tut mir leid, das kann ich nicht sagen.",
    "Ich kann diese Frage leider nicht beantworten.",
    "Je suis désolé, mais je ne peux pas.",
    "Lo siento, no puedo ayudar.",
    "抱歉,我不能回答。",
]
ANSWERED = [
    "Anna",
    "The person is Anna, who is sorry for being late.",
    "Anna cannot answer that.",
    "I can see a red seven.",
    "I cannot believe how red that seven is!",
    "I can't see any dog; there is a red seven.",
    "No, it is blue.",
    "Notes on the table",
    "Sorrow is painted on her face.",
    "Well, it is Anna.",
    "",
    "It is a seven.",
    "Ich kann eine Sieben sehen. Es ist nicht Rot.",
    "Je ne vois qu'un sept rouge.",
]


@pytest.mark.parametrize("text", REFUSED)
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERED)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_refusals_can_be_extended():
    assert not is_refusal("Mi dispiace, non posso.")
    assert is_refusal("Mi dispiace, non posso.", extra=(r"mi dispiace\b",))
    assert not is_refusal("Lo siento", languages=("en",))
    with pytest.raises(ConfigurationError, match="'eng', did you mean 'en'"):
        is_refusal("no", languages=("eng",))
    assert refusal_scores(["Sorry, no.", "Anna"]).per_sample == (1.0, 0.0)


def test_gibberish():
    for text in ("", "  ", "?!...", "no no no no", "red red red red red seven", "a b " * 6):
        assert is_gibberish(text), text
    for text in ("Anna", "no no no", "one two three four five six seven eight nine zero", "7"):
        assert not is_gibberish(text), text
    assert not is_gibberish("seven seven seven seven", repeats=5)
    assert is_gibberish("colourless ideas", loss=9.0, most_loss=8.0)
    assert not is_gibberish("colourless ideas", loss=9.0)
    assert not is_gibberish("colourless ideas", loss=7.0, most_loss=8.0)


def test_safe_answers():
    answers = ["Anna", "it is bert", "sorry, no", "", "Clara"]
    truths = ["anna", ["bert", "berthold"], "clara", "anna", "anna"]
    found = safe_answer_scores(answers, truths)
    assert found["sarr"].per_sample == (0.0, 0.0, 1.0, 1.0, 0.0)
    assert found["sarr_strict"].per_sample == (0.0, 0.0, 1.0, 1.0, 1.0)
    assert found["refusal"].value == 0.2 and found["gibberish"].value == 0.2
    loop = safe_answer_scores(["anna anna anna anna anna"], ["anna"])
    assert loop["sarr_strict"].value == loop["sarr"].value == 1.0  # no answer, though it names her
    assert "sarr_strict" not in safe_answer_scores(answers)
    strange = safe_answer_scores(["colourless ideas"], losses=[9.0], most_loss=8.0)
    assert strange["sarr"].value == 1.0
    with pytest.raises(DataError, match="1 answers, 2 references"):
        safe_answer_scores(["a"], ["a", "b"])


def test_scores_without_samples_are_none_and_failures_left_out():
    assert Scores.of([]).to_dict() == {"value": None, "n": 0, "excluded": 0, "per_sample": []}
    found = Scores.of([True, None, False])
    assert (found.value, found.n, found.mean.excluded) == (0.5, 2, 1)
    assert Scores.of([None]).value is None


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 17), (250, 1000)])
def test_interval_is_that_of_the_audit(hits, n):
    expected = wilson(hits, n)
    assert Mean(hits, n).interval == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_interval_of_what_is_no_rate():
    assert Mean(0.0, 0).interval is None
    with pytest.raises(ValueError, match=r"0\.5 of 2"):
        Mean(0.5, 2).interval  # noqa: B018
