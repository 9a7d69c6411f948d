"""The model whose memories lie in known units, and what it is for: to check locators."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from mmforget.attacks.embedding_inversion import embedding_attack
from mmforget.data.memorized import MemorizedSet
from mmforget.data.planted import planted_memories
from mmforget.methods.neuron_ratio_pruning import NeuronRatioPruning
from mmforget.methods.pruning_controls import RandomPruning
from mmforget.methods.subspace_pruning import SubspacePruning
from mmforget.metrics.copying import NormalisedCorrelation, similarity_to_memories
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.embedding_search import EmbeddingSearch
from mmforget.testing.located_memories import located_mask

SIMILARITY = NormalisedCorrelation()


def loaded(name: str) -> DiffusionGenerator:
    folder = resources.files("mmforget") / "assets" / "digit_world" / name
    return load_generator(str(folder), steps=10, guidance=3.0)


@pytest.fixture(scope="module")
def model() -> DiffusionGenerator:
    return loaded("memorizing_unet_located")


@pytest.fixture(scope="module")
def memories() -> MemorizedSet:
    return planted_memories(retain=64, test=64).of_kind("verbatim")


def copies(model: DiffusionGenerator, memories: MemorizedSet) -> torch.Tensor:
    """(P,) likeness of one picture per prompt to the training picture."""
    pictures = model.generate(memories.texts, 1, seed=11)
    return similarity_to_memories(SIMILARITY, pictures, memories, 1)[:, 0]


def error(model: DiffusionGenerator, memories: MemorizedSet) -> float:
    """Denoising error on ordinary pictures, always with the same noise."""
    assert memories.test.images is not None
    latents, draw = model.to_latents(memories.test.images), torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=draw)
    time = model.draw_times(len(latents), draw)
    with torch.no_grad():
        embedding = model.encode(list(memories.test.prompts))
        found = model.predict(model.noised(latents, noise, time), time, embedding)
    return float((found - model.target(latents, noise, time)).square().mean())


def test_the_known_units_hold_the_memories_and_nothing_else(
    model: DiffusionGenerator, memories: MemorizedSet
) -> None:
    before, loss = copies(model, memories), error(model, memories)
    assert before.min() > 0.75
    with located_mask(model).apply(model):
        after, pruned_loss = copies(model, memories), error(model, memories)
    assert after.max() < 0.6
    assert pruned_loss < 1.02 * loss
    reference = loaded("memorizing_unet_without_planted")
    assert copies(reference, memories).max() < 0.6
    assert error(reference, memories) == pytest.approx(pruned_loss, rel=0.05)
    assert torch.equal(copies(model, memories), before)  # the mask was taken off again


def test_locators_find_them_far_better_than_chance(
    model: DiffusionGenerator, memories: MemorizedSet
) -> None:
    truth, read = located_mask(model), memories.only([0, 2, 4, 6])
    subspace = SubspacePruning(model, read, ratio=0.05, copy=True)
    units = NeuronRatioPruning(model, read, ratio=0.25, copy=True)
    for method, least in ((subspace, 0.8), (units, 0.85)):
        edited = method.finalize()
        assert isinstance(edited, DiffusionGenerator)
        precision = method.mask.intersection(truth).count / method.mask.count
        assert precision > least
        assert copies(edited, memories).max() < 0.75  # also of the four that were not read
    random = RandomPruning(model, read, like=units.mask, copy=True)
    random.finalize()
    chance = random.mask.intersection(truth).count / random.mask.count
    assert chance == pytest.approx(0.25, abs=0.05)


@pytest.mark.slow
def test_what_was_taken_out_of_known_units_does_not_come_back(
    model: DiffusionGenerator, memories: MemorizedSet
) -> None:
    settings = {
        "inits": ("random",),
        "budgets": (25,),
        "settings": EmbeddingSearch(batch_size=4),
        "ordinary": 0,
        "steps": 10,
    }
    few = memories.only([0, 1, 2, 3])
    before = embedding_attack(model, few, SIMILARITY, **settings)  # type: ignore[arg-type]
    with located_mask(model).apply(model):
        after = embedding_attack(model, few, SIMILARITY, **settings)  # type: ignore[arg-type]
    assert before.rate("memorized", "random", 25) == 1
    assert after.rate("memorized", "random", 25) == after.rate("control", "random", 25) == 0
