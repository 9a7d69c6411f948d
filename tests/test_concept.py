"""What a concept may be, and that every contradiction is found before any work is done."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest

from mmforget.concept import ANCHORS, TEMPLATES, ConceptSpec, check_together, contains, normalised
from mmforget.errors import RequestError


def test_defaults_of_the_kinds() -> None:
    for kind, anchor in ANCHORS.items():
        more = {"target": "a hat", "erase_from": "a man"} if kind == "attribute" else {}
        spec = ConceptSpec(**({"target": "x", "kind": kind} | more))
        assert spec.anchor_text == anchor and spec.sentences == TEMPLATES[kind]
    assert ConceptSpec("x", kind="style", anchor="").anchor_text == ""
    assert ConceptSpec("x", templates=["see {}"]).sentences == ("see {}",)


def test_words_and_prompts() -> None:
    spec = ConceptSpec("Van Gogh", synonyms=["Vincent"], templates=["{}", "art by {}"])
    assert spec.words == ("Van Gogh", "Vincent")
    assert spec.prompts("Van Gogh") == ["Van Gogh", "art by Van Gogh"]
    assert spec.prompts("") == ["", ""]
    assert spec.prompts("a {} and {x}") == ["a {} and {x}", "art by a {} and {x}"]


def test_spelling_is_kept_and_commas_separate_nothing() -> None:
    assert ConceptSpec(" Van Gogh, Picasso ").words == (" Van Gogh, Picasso ",)


def test_all_containers_of_texts_become_tuples() -> None:
    spec = ConceptSpec("x", synonyms=["y"], preserve=["z"], templates=["{}"])
    assert hash(spec) == hash(ConceptSpec("x", ("y",), preserve=("z",), templates=("{}",)))


def test_plain_data() -> None:
    spec = ConceptSpec(
        "hat", ["cap"], "attribute", "", ["dog"], ["a {}"], erase_from="a cowboy", weight=2.0
    )
    data = json.loads(json.dumps(spec.to_dict()))
    assert ConceptSpec.from_dict(data) == spec
    assert data["synonyms"] == ["cap"]
    assert ConceptSpec.from_dict({"target": "x"}) == ConceptSpec("x")


ACCENT = "Monét"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"target": ""}, "`concept.target` is empty"),
        ({"target": " \t\n "}, "`concept.target` is empty"),
        ({"target": 7}, "`concept.target` has 7, which is no text; put it into quotes"),
        ({"target": None}, "`concept.target` has None"),
        ({"target": ["a", "b"]}, "`concept.target` has"),
        ({}, "`concept.target` is missing"),
        ({"target": "x", "synonym": ["y"]}, "no field 'synonym'; did you mean 'synonyms'"),
        ({"target": "x", "synonyms": "y"}, "`concept.synonyms` is 'y', it must be a list"),
        ({"target": "x", "preserve": None}, "`concept.preserve` is None, it must be a list"),
        ({"target": "x", "templates": "{}"}, "`concept.templates` is '{}', it must be a list"),
        ({"target": "x", "synonyms": [7]}, "`concept.synonyms` has 7, which is no text"),
        ({"target": "x", "preserve": [False]}, "`concept.preserve` has False, which is no text"),
        ({"target": "x", "synonyms": ["y", " "]}, "`concept.synonyms` has an empty text"),
        ({"target": "x", "synonyms": ["y", "Y "]}, "`concept.synonyms` has 'Y ' twice"),
        ({"target": "Seven", "synonyms": ["seven"]}, "`concept.synonyms` has 'seven', which is al"),
        ({"target": "x", "preserve": ["a", "a"]}, "`concept.preserve` has 'a' twice"),
        ({"target": "Seven", "preserve": ["SEVEN"]}, "`concept.preserve` has 'seven', which is al"),
        ({"target": "x", "synonyms": ["7"], "preserve": ["7"]}, "`concept.preserve` has '7'"),
        (
            {"target": ACCENT, "preserve": [unicodedata.normalize("NFD", ACCENT)]},
            "which is also to be erased",
        ),
        ({"target": "x", "kind": "styles"}, "`concept.kind` is 'styles', did you mean 'style'"),
        ({"target": "x", "kind": ["style"]}, "`concept.kind` is"),
        (
            {"target": "art", "kind": "style"},
            "`concept.anchor` is 'art', which contains the erased",
        ),
        ({"target": "dog", "anchor": "Dog"}, "`concept.anchor` is 'Dog', which contains"),
        ({"target": "dog", "anchor": "a big dog"}, "`concept.anchor` is 'a big dog', which"),
        ({"target": "dog", "anchor": "a cat (no dog)."}, "which contains the erased 'dog'"),
        ({"target": "x", "synonyms": ["cat"], "anchor": "a cat"}, "contains the erased 'cat'"),
        ({"target": "x", "anchor": 7}, "`concept.anchor` has 7, which is no text"),
        ({"target": "x", "templates": ["a photo"]}, "`concept.templates` has 'a photo', a temp"),
        ({"target": "x", "templates": ["{} {}"]}, "needs exactly one '{}' and no other braces"),
        ({"target": "x", "templates": ["{ink} {}"]}, "has '{ink} {}', a template needs"),
        ({"target": "x", "templates": ["{0}"]}, "has '{0}', a template needs"),
        ({"target": "hat", "kind": "attribute"}, "`concept.erase_from` belongs to the kind"),
        ({"target": "hat", "erase_from": "a man"}, "`concept.erase_from` belongs to the kind"),
        (
            {"target": "hat", "kind": "attribute", "erase_from": " "},
            "`concept.erase_from` is empty",
        ),
        (
            {"target": "hat", "kind": "attribute", "erase_from": "a man with a hat"},
            "`concept.erase_from` is 'a man with a hat', which contains the erased 'hat'",
        ),
        ({"target": "x", "weight": 0}, "`concept.weight` is 0, it must be a number above 0"),
        ({"target": "x", "weight": -1.0}, "`concept.weight` is -1.0"),
        ({"target": "x", "weight": float("nan")}, "`concept.weight` is nan"),
        ({"target": "x", "weight": float("inf")}, "`concept.weight` is inf"),
        ({"target": "x", "weight": "2"}, "`concept.weight` is 2"),
        ("seven", "`concept` is 'seven', it must be a mapping"),
    ],
)
def test_mistakes(data: Any, message: str) -> None:
    with pytest.raises(RequestError) as error:
        ConceptSpec.from_dict(data)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_containment_is_no_mistake() -> None:
    """But it is told, so that a method can warn."""
    spec = ConceptSpec("seven", ["7"], preserve=["a seven-up", "eight", "seventy", "7 dwarfs"])
    assert spec.contained() == ["a seven-up", "7 dwarfs"]
    assert ConceptSpec("art deco", kind="style").anchor_text == "art"
    assert ConceptSpec("cat", anchor="catalogue").anchor_text == "catalogue"


def test_comparisons() -> None:
    assert normalised("  A  Straße\n") == "a strasse"
    assert normalised(unicodedata.normalize("NFD", ACCENT)) == normalised(ACCENT.upper())
    assert contains("c++, and rust", "c++") and not contains("abc", "b")


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "`concepts` is empty"),
        ([ConceptSpec("a"), ConceptSpec("A ")], "`concepts` erases 'A ' twice, for 'a' and 'A '"),
        ([ConceptSpec("a", ["c"]), ConceptSpec("b", ["c"])], "erases 'c' twice, for 'a' and 'b'"),
        ([ConceptSpec("a", preserve=["b"]), ConceptSpec("b")], "`preserve` of 'a' has 'b', which"),
        (
            [ConceptSpec("a", preserve=["7"]), ConceptSpec("seven", ["7"])],
            "is to be erased for 'seven'",
        ),
        (
            [ConceptSpec("dog", anchor="cat"), ConceptSpec("cat", anchor="dog")],
            "`concept.anchor` of 'dog' is 'cat', but 'cat' is to be erased too",
        ),
        (
            [ConceptSpec("dog", anchor="a red cat"), ConceptSpec("lion", ["cat"])],
            "`concept.anchor` of 'dog' is 'a red cat', but 'lion' is to be erased too",
        ),
    ],
)
def test_concepts_that_contradict_each_other(concepts: list[ConceptSpec], message: str) -> None:
    for order in (concepts, concepts[::-1]):
        with pytest.raises(RequestError) as error:
            check_together(order)
        assert "\n" not in str(error.value)
    with pytest.raises(RequestError) as error:
        check_together(concepts)
    assert message in str(error.value)


def test_concepts_that_go_together() -> None:
    shared = [ConceptSpec("dog", anchor="animal"), ConceptSpec("cat", anchor="animal")]
    check_together([*shared, ConceptSpec("car", preserve=["animal", "a catalogue"])])
