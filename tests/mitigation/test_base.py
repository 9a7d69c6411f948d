"""Drawing under a mitigation: the same noise as without, and nothing left behind in the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch

from mmforget.errors import ConfigurationError, DivergenceError, RequestError
from mmforget.mitigation import (
    AttentionReweighting,
    EmbeddingNoise,
    EmbeddingOptimisation,
    PromptMitigation,
    TokenRandomisation,
    mitigated_pictures,
)
from mmforget.mitigation.base import Before, Key
from mmforget.models.base import PromptEmbedding, state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.testing.tiny_pipelines import TinyKind, tiny_pipeline

PROMPTS = ["a red cat", "a dog"]


def made(kind: TinyKind = "sd", **settings: Any) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), **({"steps": 2} | settings))


@pytest.mark.parametrize("kind", get_args(TinyKind))
def test_no_mitigation_gives_the_pictures_of_the_model(kind: TinyKind) -> None:
    model = made(kind)
    found = mitigated_pictures(model, PromptMitigation(), PROMPTS, 2, seed=3)
    assert torch.equal(found, model.generate(PROMPTS, 2, seed=3))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize(
    "mitigation",
    [PromptMitigation(), EmbeddingNoise(0.5), AttentionReweighting(2.0), TokenRandomisation()],
)
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(
    mitigation: PromptMitigation, batch_size: int
) -> None:
    model = made()
    whole = mitigated_pictures(model, mitigation, PROMPTS, 2, seed=3)
    alone = mitigated_pictures(model, mitigation, PROMPTS[1:], 2, seed=3)
    parts = mitigated_pictures(model, mitigation, PROMPTS, 2, seed=3, batch_size=batch_size)
    assert torch.allclose(parts, whole, atol=1e-4) and torch.allclose(alone, whole[2:], atol=1e-4)


@pytest.mark.parametrize(
    "mitigation",
    [
        EmbeddingNoise(1.0),
        AttentionReweighting(3.0),
        TokenRandomisation(),
        EmbeddingOptimisation(0.0, n=1, iterations=4),
    ],
)
def test_mitigations_change_pictures_but_neither_weights_nor_later_pictures(
    mitigation: PromptMitigation,
) -> None:
    model = made()
    before, plain = state_hash(model), model.generate(PROMPTS, 1, seed=1)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    found = mitigated_pictures(model, mitigation, PROMPTS, 1, seed=1)
    assert found.shape == plain.shape and not torch.allclose(found, plain, atol=1e-3)
    assert state_hash(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.generate(PROMPTS, 1, seed=1), plain)
    assert torch.equal(mitigated_pictures(model, mitigation, PROMPTS, 1, seed=1), found)


def test_settings_are_plain_data() -> None:
    assert EmbeddingNoise(0.2).to_dict() == {"mitigation": "EmbeddingNoise", "std": 0.2}
    assert TokenRandomisation("repeats", 2).to_dict() == {
        "mitigation": "TokenRandomisation",
        "insert": "repeats",
        "count": 2,
    }


def test_progress_counts_pictures() -> None:
    seen: list[int] = []
    mitigated_pictures(made(), PromptMitigation(), PROMPTS, 3, batch_size=2, progress=seen.append)
    assert seen == [2, 3, 5, 6]


def test_the_rows_that_are_read_are_those_of_the_batch() -> None:
    asked: list[tuple[str, ...]] = []
    seen: list[slice] = []

    @dataclass(frozen=True)
    class Watching(PromptMitigation):
        @contextmanager
        def reading(
            self, model: DiffusionGenerator, prompts: Sequence[str]
        ) -> Iterator[Before | None]:
            asked.append(tuple(prompts))
            yield lambda time, rows: seen.append(rows)

    mitigated_pictures(made(), Watching(), PROMPTS, 1, batch_size=2)
    assert asked == [tuple(PROMPTS)] and seen == [slice(2, 4)] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"n": 0}, "`n` is 0"), ({"batch_size": 0}, "`batch_size`"), ({"steps": 0}, "`steps`")],
)
def test_numbers_below_1_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        mitigated_pictures(made(), PromptMitigation(), PROMPTS, **settings)  # type: ignore[arg-type]


def test_prompts_are_checked_before_any_work() -> None:
    for prompts in ([], ["cat " * 40]):
        with pytest.raises(RequestError):
            mitigated_pictures(made(), PromptMitigation(), prompts)


def test_pictures_that_are_not_finite_are_refused() -> None:
    @dataclass(frozen=True)
    class Broken(PromptMitigation):
        def embedding(
            self, model: DiffusionGenerator, keys: Sequence[Key], seed: int = 0
        ) -> PromptEmbedding:
            found = super().embedding(model, keys, seed)
            return PromptEmbedding(found.states * float("nan"))

    with pytest.raises(DivergenceError, match="a red cat"):
        mitigated_pictures(made(), Broken(), PROMPTS)
