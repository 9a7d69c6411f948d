"""The pictures of a generator audit: which prompts, how often, and what a judge sees in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmforget.audit.drawing import floats, spread
from mmforget.concept import ConceptSpec, contains, normalised
from mmforget.errors import ConfigurationError, RequestError, suggest
from mmforget.metrics.judge import Judge
from mmforget.seeds import generator

Facts = Mapping[str, str]
"""What is to be seen: factor of the judge -> value."""

CellRole = Literal["target", "synonym", "together", "preserved", "unconditional"]

TOGETHER = 48  # at most this many different sentences that name several facts


@dataclass(frozen=True)
class Cell:
    """Pictures that answer one question.

    Attributes:
        role: ``target`` and ``synonym`` prompts name an erased concept, ``together`` names it with
            other facts, ``preserved`` a concept that must stay, ``unconditional`` nothing.
        word: what they are about.
        rows: (prompt, number of the picture) each; a picture depends on these and the seed only.
        facts: what a judge should see; for ``target`` and ``synonym``, what it should not.
            Empty without a judge.
        others: for ``together``, per row the other facts that were asked for.
    """

    role: CellRole
    word: str
    rows: tuple[tuple[str, int], ...]
    facts: Facts
    others: tuple[Facts, ...] = ()

    @property
    def split(self) -> str:
        """Name in the results."""
        return f"{self.role}/{self.word}" if self.word else self.role


def facts_in(judge: Judge, text: str) -> dict[str, str]:
    """The values of the judge's factors that a text names, as whole words, the longest first."""
    plain, found = normalised(text), {}
    for factor, values in judge.factors.items():
        named = [value for value in values if contains(plain, normalised(value))]
        if named:
            found[factor] = max(named, key=len)
    return found


def known_facts(judge: Judge, field: str, texts: Sequence[str]) -> dict[str, str]:
    """The facts of the first text in which the judge knows any.

    Raises:
        RequestError: it knows none of them; names the nearest value.
    """
    for text in texts:
        found = facts_in(judge, text)
        if found:
            return found
    values = [value for values in judge.factors.values() for value in values]
    raise RequestError(
        f"`{field}` has '{texts[0]}', which the judge cannot see; {suggest(texts[0], values)}"
    )


def plan(
    concepts: Sequence[ConceptSpec],
    judge: Judge | None,
    pictures: int,
    preserved_pictures: int,
    together: str = "",
) -> list[Cell]:
    """Choose the prompts.

    Args:
        concepts: what was erased, and what was to stay.
        judge: None plans the pictures without facts.
        pictures: per erased word.
        preserved_pictures: per preserved concept.
        together: a sentence with factors of the judge in braces, such as ``a {ink} {digit}``.

    Raises:
        RequestError: a concept that the judge cannot see.
        ConfigurationError: `together` names a factor that there is not.
    """
    cells = []
    for concept in concepts:
        facts = known_facts(judge, "concept", concept.words) if judge else {}
        for number, word in enumerate(concept.words):
            role: CellRole = "synonym" if number else "target"
            cells.append(Cell(role, word, spread(concept.prompts(word), pictures), facts))
        if judge is not None and together:
            cells.append(_together(concept, judge, facts, together, pictures))
    kept: dict[str, ConceptSpec] = {}
    for concept in concepts:
        for word in concept.preserve:
            kept.setdefault(word, concept)
    for word, concept in kept.items():
        facts = known_facts(judge, "preserve", [word]) if judge else {}
        cells.append(
            Cell("preserved", word, spread(concept.prompts(word), preserved_pictures), facts)
        )
    cells.append(Cell("unconditional", "", spread([""], preserved_pictures), {}))
    return [cell for cell in cells if cell.rows]


def _together(
    concept: ConceptSpec, judge: Judge, facts: Facts, sentence: str, pictures: int
) -> Cell:
    named = [factor for factor in judge.factors if f"{{{factor}}}" in sentence]
    free = [factor for factor in named if factor not in facts]
    try:
        sentence.format(**{factor: "" for factor in named})
    except (KeyError, IndexError) as error:
        raise ConfigurationError(
            f"`audit.together` is '{sentence}', but the judge has no factor {error}; "
            + suggest(str(error).strip("'"), judge.factors)
        ) from error
    if not free or len(free) == len(named):
        return Cell("together", concept.target, (), facts)
    combinations: list[dict[str, str]] = [{}]
    for factor in free:
        combinations = [
            {**one, factor: value} for one in combinations for value in judge.factors[factor]
        ]
    if len(combinations) > TOGETHER:
        draw = generator(0, "together", concept.target)
        order = torch.randperm(len(combinations), generator=draw)[:TOGETHER].tolist()
        combinations = [combinations[index] for index in order]
    prompts = [sentence.format(**{**facts, **one}) for one in combinations]
    rows = spread(prompts, pictures)
    others = tuple(combinations[index % len(combinations)] for index in range(len(rows)))
    return Cell("together", concept.target, rows, facts, others)


class Readings:
    """What a judge sees in pictures.

    Args:
        judge: reads them.
        pictures: (N, 3, H, W) uint8.
        batch_size: pictures at a time.
    """

    def __init__(self, judge: Judge, pictures: Tensor, batch_size: int = 256) -> None:
        found: dict[str, list[Tensor]] = {factor: [] for factor in judge.factors}
        for part in pictures.split(batch_size):
            for factor, shares in judge(floats(part)).items():
                found[factor].append(shares.argmax(1).cpu())
        self._values = judge.factors
        self._read = {factor: torch.cat(parts) for factor, parts in found.items()}

    def sees(self, facts: Facts) -> Tensor:
        """(N,) bool: all of the facts are seen."""
        return torch.stack(
            [
                self._read[factor] == self._values[factor].index(value)
                for factor, value in facts.items()
            ]
        ).all(0)

    def sees_each(self, facts: Sequence[Facts]) -> Tensor:
        """(N,) bool: each picture shows its own facts."""
        return torch.tensor(
            [
                all(
                    int(self._read[factor][row]) == self._values[factor].index(value)
                    for factor, value in own.items()
                )
                for row, own in enumerate(facts)
            ]
        )
