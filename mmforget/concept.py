"""What a concept is: the words that name it, what it becomes, and what must stay."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mmforget.errors import RequestError, suggest

ConceptKind = Literal["object", "style", "person", "unsafe", "memorized", "attribute"]

ANCHORS: Mapping[str, str] = {
    "object": "",
    "style": "art",
    "person": "a person",
    "unsafe": "",
    "memorized": "",
    "attribute": "",
}
"""What a concept becomes if the user names nothing; the empty text is the unconditional image."""

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "object": ("{}", "a photo of {}", "an image of {}", "a picture of {}", "a drawing of {}"),
    "style": ("{}", "a painting in the style of {}", "art by {}", "a picture by {}", "{} style"),
    "person": ("{}", "a photo of {}", "a portrait of {}", "an image of {}", "{} smiling"),
    "unsafe": ("{}", "a photo of {}", "an image of {}", "a person, {}", "a painting of {}"),
    "memorized": ("{}",),
    "attribute": ("{}", "a photo of {}", "an image of {}", "a picture of {}", "a drawing of {}"),
}
"""Sentences in which the concept is looked for, by kind."""


@dataclass(frozen=True)
class ConceptSpec:
    """One concept that a text-conditioned model shall no longer draw.

    Shared by all methods, attacks and metrics. Text is kept as it was written; for comparisons it
    is normalised (NFC, lower case, single spaces).

    Args:
        target: the words that name the concept. Commas do not separate anything.
        synonyms: other words for it; they are erased too and reported separately.
        kind: chooses anchor and templates.
        anchor: what the concept becomes; None takes the default of the kind, the empty text is the
            unconditional image.
        preserve: concepts that must stay, in the words that name them.
        templates: sentences, each with one ``{}``; empty takes those of the kind.
        erase_from: for the kind ``attribute``, the prompt that is kept in use ("a cowboy" when
            "a cowboy hat" is erased).
        weight: importance among several concepts, above 0.

    Raises:
        RequestError: names the field, the value and the remedy.

    Example:
        >>> ConceptSpec("Van Gogh", kind="style").anchor_text
        'art'
    """

    target: str
    synonyms: tuple[str, ...] = ()
    kind: ConceptKind = "object"
    anchor: str | None = None
    preserve: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    erase_from: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConceptKind):
            raise RequestError(
                f"`concept.kind` is '{self.kind}', {suggest(self.kind, get_args(ConceptKind))}"
            )
        for name in ("synonyms", "preserve", "templates"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise RequestError(f"`concept.{name}` is {value!r}, it must be a list of texts")
            object.__setattr__(self, name, tuple(value))
            for text in value:
                _check_text(name, text)
        _check_text("target", self.target)
        if not normalised(self.target):
            raise RequestError("`concept.target` is empty; name the concept that shall be erased")
        for name in ("synonyms", "preserve"):
            self._check_list(name, getattr(self, name))
        self._check_anchor()
        for template in self.templates:
            if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
                raise RequestError(
                    f"`concept.templates` has '{template}', a template needs exactly one '{{}}' "
                    "and no other braces"
                )
        self._check_erase_from()
        if isinstance(self.weight, str | bool) or not 0 < self.weight < math.inf:
            raise RequestError(f"`concept.weight` is {self.weight}, it must be a number above 0")

    def _check_list(self, name: str, values: Sequence[str]) -> None:
        seen: set[str] = set()
        for value in values:
            plain = normalised(value)
            if not plain:
                raise RequestError(f"`concept.{name}` has an empty text; remove it")
            if plain in seen:
                raise RequestError(f"`concept.{name}` has '{value}' twice; remove one")
            seen.add(plain)
        clash = seen & {normalised(self.target)}
        if name == "preserve":
            clash |= seen & {normalised(other) for other in self.synonyms}
        if clash:
            raise RequestError(
                f"`concept.{name}` has '{sorted(clash)[0]}', which is also to be erased; "
                "a concept is either erased or preserved"
            )

    def _check_anchor(self) -> None:
        if self.anchor is not None:
            _check_text("anchor", self.anchor)
        anchor = normalised(self.anchor_text)
        for word in (self.target, *self.synonyms):
            if anchor and contains(anchor, normalised(word)):
                raise RequestError(
                    f"`concept.anchor` is '{self.anchor_text}', which contains the erased "
                    f"'{word}'; choose an anchor without it, or '' for the unconditional image"
                )

    def _check_erase_from(self) -> None:
        if (self.kind == "attribute") != (self.erase_from is not None):
            raise RequestError(
                "`concept.erase_from` belongs to the kind 'attribute': give both, for example "
                "target 'a cowboy hat', erase_from 'a cowboy'"
            )
        if self.erase_from is None:
            return
        _check_text("erase_from", self.erase_from)
        plain = normalised(self.erase_from)
        if not plain:
            raise RequestError("`concept.erase_from` is empty; name what loses the attribute")
        for word in self.words:
            if contains(plain, normalised(word)):
                raise RequestError(
                    f"`concept.erase_from` is '{self.erase_from}', which contains the erased "
                    f"'{word}'; name the thing without its attribute"
                )

    @property
    def words(self) -> tuple[str, ...]:
        """The target and its synonyms."""
        return (self.target, *self.synonyms)

    @property
    def anchor_text(self) -> str:
        """The anchor, or the default of the kind."""
        return ANCHORS[self.kind] if self.anchor is None else self.anchor

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates, or those of the kind."""
        return self.templates or TEMPLATES[self.kind]

    def prompts(self, word: str) -> list[str]:
        """All sentences with a word in them.

        Args:
            word: any text; for the empty one, every sentence becomes the empty text.
        """
        return [sentence.replace("{}", word) if word else "" for sentence in self.sentences]

    def contained(self) -> list[str]:
        """Preserved texts that contain an erased word, which deserves a warning."""
        erased = [normalised(word) for word in self.words]
        return [
            kept
            for kept in self.preserve
            if any(contains(normalised(kept), word) for word in erased)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ConceptSpec:
        """Inverse of `to_dict`.

        Args:
            data: field names and values; those left out take their defaults.

        Raises:
            RequestError: no mapping, an unknown field, or no target.
        """
        if not isinstance(data, Mapping):
            raise RequestError(f"`concept` is {data!r}, it must be a mapping with a `target`")
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise RequestError(f"`concept` has no field '{key}'; {suggest(key, known)}")
        if "target" not in data:
            raise RequestError("`concept.target` is missing; name the concept that shall be erased")
        return cls(**data)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):  # YAML turns a bare 7 into a number and a bare no into False
        raise RequestError(f"`concept.{name}` has {value!r}, which is no text; put it into quotes")


def normalised(text: str) -> str:
    """NFC, lower case, single spaces: how texts are compared, never how they are used."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def contains(text: str, part: str) -> bool:
    """Whether normalised words occur in a normalised text, as whole words.

    Args:
        text: where to look; punctuation may stand beside the words.
        part: the words.
    """
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def check_together(concepts: Sequence[ConceptSpec]) -> None:
    """Refuse concepts that contradict each other.

    Args:
        concepts: to be erased from one model.

    Raises:
        RequestError: none at all, one is erased twice, erased by one and preserved by another,
            or two are each other's anchor.
    """
    if not concepts:
        raise RequestError("`concepts` is empty; name at least one concept to erase")
    owner: dict[str, str] = {}
    for concept in concepts:
        for word in concept.words:
            if normalised(word) in owner:
                raise RequestError(
                    f"`concepts` erases '{word}' twice, for '{owner[normalised(word)]}' and "
                    f"'{concept.target}'; remove one"
                )
            owner[normalised(word)] = concept.target
    for concept in concepts:
        for kept in concept.preserve:
            if normalised(kept) in owner:
                raise RequestError(
                    f"`preserve` of '{concept.target}' has '{kept}', which is to be erased for "
                    f"'{owner[normalised(kept)]}'; a concept is either erased or preserved"
                )
        anchor = normalised(concept.anchor_text)
        for word, target in owner.items():
            if anchor and contains(anchor, word):
                raise RequestError(
                    f"`concept.anchor` of '{concept.target}' is '{concept.anchor_text}', but "
                    f"'{target}' is to be erased too; choose another anchor"
                )
