import json
from importlib import resources
from itertools import combinations

import pytest
import torch

from mmforget.attacks.locality import (
    activation_distance,
    embedding_spread,
    memory_locality,
    weight_agreement,
)
from mmforget.data.memorized import MemorizedPrompt, MemorizedSet
from mmforget.data.planted import planted_memories
from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.copying import load_similarity
from mmforget.models.base import PromptEmbedding, state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.embedding_search import EmbeddingSearch
from mmforget.models.memory_layers import memory_layers
from mmforget.models.weight_mask import WeightMask
from mmforget.seeds import generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

UNET = resources.files("mmforget") / "assets" / "digit_world" / "memorizing_unet"
NCC = load_similarity("ncc")


def mask(*rows, name="a.weight"):
    return WeightMask("unet", {name: torch.tensor(rows, dtype=torch.bool)})


def test_spread_is_the_mean_distance():
    states = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])[:, None]
    assert embedding_spread(PromptEmbedding(states)) == pytest.approx((5 + 8 + 5) / 3)
    assert embedding_spread(PromptEmbedding(states[:1])) is None


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_activations_are_compared_at_one_noise_and_the_first_time(kind):
    model = DiffusionGenerator(tiny_pipeline(kind), steps=3)
    embedding = model.encode(["a red cat", "the blue dog", "banana"])
    layers = memory_layers(model)
    found = activation_distance(model, embedding, layers, seed=4)
    noise = torch.randn(model.latent_shape, generator=generator(4, "locality-noise"))
    seen = [{} for _ in range(3)]

    def watch(layer, row):
        def hook(module, inputs):
            seen[row].setdefault(layer.name, inputs[0][..., layer.columns])

        return layer.module.register_forward_pre_hook(hook)

    for row in range(3):
        handles = [watch(layer, row) for layer in layers]
        with torch.no_grad():
            model.sample(noise[None], embedding[row : row + 1], model.unconditional())
        for handle in handles:
            handle.remove()
    for layer in layers:
        inputs = [one[layer.name] for one in seen]
        distances = [float((a - b).norm()) for a, b in combinations(inputs, 2)]
        assert found[layer.name] == pytest.approx(sum(distances) / 3, rel=1e-3)
    assert activation_distance(model, embedding[:1], layers)[layers[0].name] is None
    assert not any(layer.module._forward_pre_hooks for layer in layers)


def test_masks_that_are_both_empty_are_no_agreement():
    empty, one, two = mask([0, 0, 0, 0]), mask([1, 1, 0, 0]), mask([0, 1, 1, 0])
    assert weight_agreement([empty, empty]) == {"a.weight": {"agreement": None, "chance": None}}
    found = weight_agreement([one, two])["a.weight"]
    assert found["agreement"] == pytest.approx(1 / 3)
    assert found["chance"] == pytest.approx(1 / 3)  # 2 * 2 / 4 of 4 - 1
    # Three pairs: one and one, and twice one and nothing.
    found = weight_agreement([one, one, empty])["a.weight"]
    assert found["agreement"] == pytest.approx(1 / 3)
    assert weight_agreement([one]) == {"a.weight": {"agreement": None, "chance": None}}


def test_several_ways_lead_to_one_picture():
    model = load_generator(str(UNET), steps=8)
    memories, before = planted_memories(8, 8).only([0, 2]), state_hash(model)
    settings = EmbeddingSearch(budgets=(20,), batch_size=4)
    found = memory_locality(
        model, memories, NCC, count=2, settings=settings, ratio=0.02, first_steps=3
    )
    assert found.embeddings == {"amber-lantern": 2, "silent-willow": 2} and not found.left_out
    # The embeddings are as far apart as their starts, yet cause similar activations.
    assert found.spread["same"] > 0.5 * found.spread["starts"] > found.spread["prompts"]
    for values in found.activations.values():
        assert 0 < values["same"] < values["different"]
    for values in found.agreement.values():
        assert values["same"] > values["different"] > 0 and 0 < values["chance"] < 0.1
    assert state_hash(model) == before and all(p.grad is None for p in model.parameters())
    assert json.loads(json.dumps(found.to_dict()))["left_out"] == []


def test_pictures_that_do_not_come_out_are_left_out():
    model = DiffusionGenerator(tiny_pipeline("sd"), steps=2)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    memories = MemorizedSet((MemorizedPrompt("a red cat", ("x",)),), {"x": image})
    quick = EmbeddingSearch(budgets=(1,), batch_size=1)
    given = {"count": 2, "settings": quick, "ratio": 0.1, "first_steps": 1}
    found = memory_locality(model, memories, NCC, **given)
    assert found.left_out == ("x",) and found.embeddings == {"x": 0}
    assert found.spread == {"same": None, "starts": None, "prompts": None}
    assert all(value is None for row in found.agreement.values() for value in row.values())
    easy = memory_locality(model, memories, NCC, thresholds={"x": -1.0}, **given)
    assert easy.embeddings == {"x": 2} and easy.spread["same"] > 0
    for setting, kind, message in (
        ({"count": 1}, ConfigurationError, "`count` is 1"),
        ({"settings": EmbeddingSearch(init="trigger")}, ConfigurationError, "use 'random'"),
        ({"ratio": 0.001}, ConfigurationError, "`ratio` is 0.001"),
        ({"layers": "ff"}, ConfigurationError, "`layers` is 'ff'"),
        ({"thresholds": {"y": 0.5}}, DataError, "no entry for the picture 'x'"),
    ):
        with pytest.raises(kind, match=message):
            memory_locality(model, memories, NCC, **{**given, **setting})
    with pytest.raises(DataError, match="no memorized prompt"):
        memory_locality(model, MemorizedSet((MemorizedPrompt("a"),)), NCC, **given)
