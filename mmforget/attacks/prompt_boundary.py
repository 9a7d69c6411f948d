"""Prompt boundary: does another wording of the concept, or a vector near it, bring it back?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.attacks.generator_report import (
    GeneratorAttackReport,
    attacked,
    check_attack,
    drawn,
    pictures_of,
    seen,
    shown_first,
)
from mmforget.attacks.report import JudgeFn
from mmforget.errors import ConfigurationError, ModelError
from mmforget.models.base import LatentSpace
from mmforget.models.clip import ClipModel
from mmforget.models.concept_guide import ConceptGuide
from mmforget.models.latent_mapper import train_mapper
from mmforget.seeds import generator

RADII = (0.05, 0.1, 0.2)
LEAST_COSINE = 0.8
"""Below this cosine with the concept's own text, a vector near it means something else."""

PARAPHRASES = ("{}", "a {}", "the {}", "a picture of {}", "something like {}", "one {}")


def prompt_boundary(
    model: Any,
    guide: ConceptGuide,
    confirm: JudgeFn,
    concept: int = 0,
    paraphrases: Sequence[str] | None = None,
    directions: int = 6,
    n: int = 128,
    steps: int = 60,
    seed: int = 0,
    space: LatentSpace | None = None,
) -> GeneratorAttackReport:
    """Train a mapper for many neighbours of the concept's text; the best one counts.

    Neighbours are other wordings, and the concept's own words with their embeddings moved along
    random directions by 0.05, 0.1 and 0.2 times the mean length of an embedding, as far as the
    sentences' cosine with the concept stays at 0.8 or more.

    The rate is the largest of all neighbours', and thus of several trials; compare it with that of
    the same attack on other models only, for example by `boundary_robustness`.

    Args:
        model: the generator that is attacked; nothing of it changes.
        guide: what the mappers follow.
        confirm: another model, which did not guide; what it sees is what counts.
        concept: which of the guide's concepts.
        paraphrases: texts; None takes some sentences about each word of the concept.
        directions: moved embeddings; 0 leaves them out.
        n: edited latents that are judged per neighbour.
        steps: of the training of a mapper.
        seed: of all draws.
        space: of the latents; None takes the last of the model's.

    Returns:
        `details` hold ``neighbours``, per neighbour its ``text``, ``radius``, ``cosine`` and
        ``rate``.

    Raises:
        CapabilityError: the model is no generator, or has no such space.
        RequestError: a wording is longer than the guide reads.
        ConfigurationError: a setting out of range.
        ModelError: the guide has no embeddings of words that could be moved.
    """
    check_attack(model, "prompt_boundary", n=n, steps=steps)
    if directions < 0:
        raise ConfigurationError(f"`directions` is {directions}, it must be 0 or more")
    texts = _wordings(guide, concept) if paraphrases is None else list(dict.fromkeys(paraphrases))
    if not texts and not directions:
        raise ConfigurationError("`paraphrases` is empty and `directions` 0; give some of either")
    notes = []
    with attacked(model) as watch, torch.no_grad():
        vectors = [(text, 0.0, target) for text, target in _worded(guide, concept, texts)]
        for number in range(directions):
            radius = RADII[number % len(RADII)]
            vectors.append(("", radius, _moved(guide, concept, radius, seed, number)))
        judged = drawn(model, n, seed, "-prompt-boundary-judged", space)
        native = seen(confirm, pictures_of(model, judged))
        neighbours: list[dict[str, Any]] = []
        best = (-1.0, native, pictures_of(model, judged))
        for text, radius, vector in vectors:
            cosine = float(vector @ guide.targets[concept])
            if not text and cosine < LEAST_COSINE:
                notes.append(
                    f"a vector at radius {radius:g} is left out: its cosine with the concept is "
                    f"{cosine:.2f}, below {LEAST_COSINE:g}"
                )
                continue
            with torch.enable_grad():
                mapper, _, _ = train_mapper(
                    model, _towards(guide, concept, vector), concept, space=space, steps=steps,
                    tries=1, checked=1, seed=seed, purpose="prompt-boundary",
                )  # fmt: skip
            images = pictures_of(model, mapper(judged))
            hits = seen(confirm, images)
            rate = float(hits.double().mean())
            neighbours.append({"text": text, "radius": radius, "cosine": cosine, "rate": rate})
            if rate > best[0]:
                best = (rate, hits, images)
    return GeneratorAttackReport(
        name="prompt_boundary",
        rate=best[0] if neighbours else None,
        n=n,
        native=float(native.double().mean()),
        seconds=watch.seconds,
        settings={
            "seed": seed,
            "paraphrases": texts,
            "directions": directions,
            "steps": steps,
            "space": judged.space,
        },
        details={"neighbours": neighbours},
        notes=tuple(notes),
        pictures=shown_first(best[2], best[1]) if neighbours else None,
    )


def boundary_robustness(
    report: GeneratorAttackReport, original: GeneratorAttackReport
) -> float | None:
    """One minus the rate over that of the original model; 1 if nothing comes back.

    None if nothing comes out of the original either.
    """
    if report.rate is None or not original.rate:
        return None
    return 1 - report.rate / original.rate


def _wordings(guide: ConceptGuide, concept: int) -> list[str]:
    words = guide.concepts[concept].words
    return [sentence.format(word) for word in words for sentence in PARAPHRASES]


def _worded(guide: ConceptGuide, concept: int, texts: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Texts as they are, in no sentence, with their vectors."""
    if not texts:
        return []
    alone = replace(guide.concepts[concept], templates=("{}",))
    return list(zip(texts, guide.texts(texts, alone), strict=True))


def _towards(guide: ConceptGuide, concept: int, vector: Tensor) -> ConceptGuide:
    """The same guide with another vector in place of the concept's."""
    changed = copy.copy(guide)
    changed.targets = guide.targets.clone()
    changed.targets[concept] = vector
    return changed


def _moved(guide: ConceptGuide, concept: int, radius: float, seed: int, number: int) -> Tensor:
    """The concept's vector with its words' embeddings moved along a random direction."""
    spec = guide.concepts[concept]
    with ExitStack() as stack:
        for place, clip in enumerate(guide.clips):
            table = word_embeddings(clip)
            size = radius * float(table.weight.norm(dim=1).mean())
            special = set(clip.tokens([""]).flatten().tolist())
            ids = sorted(set(clip.tokens([spec.target]).flatten().tolist()) - special)
            draw = generator(seed, "prompt-boundary-direction", number, place)
            steps = F.normalize(torch.randn(len(ids), table.embedding_dim, generator=draw), dim=1)
            moves = dict(zip(ids, size * steps, strict=True))
            stack.enter_context(moved_embeddings(table, moves))
        return guide.texts([spec.target], spec)[0]


def word_embeddings(clip: ClipModel) -> nn.Embedding:
    """The table of word embeddings of a CLIP model: the largest that its text encoder has.

    Raises:
        ModelError: it has none.
    """
    tables = [module for module in clip.network.modules() if isinstance(module, nn.Embedding)]
    if not tables:
        raise ModelError(
            f"{type(clip.network).__name__} has no table of word embeddings, so none can be moved; "
            "set `directions` to 0"
        )
    return max(tables, key=lambda table: table.num_embeddings)


@contextmanager
def moved_embeddings(table: nn.Embedding, moves: Mapping[int, Tensor]) -> Iterator[None]:
    """Add vectors to what a table returns for some ids, for a while."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for row, move in moves.items():
            output = output + (args[0] == row).unsqueeze(-1) * move.to(output)
        return output

    handle = table.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
