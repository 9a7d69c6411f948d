"""NeMo: activations, similarity, blocking, search and refinement, and what it does to a memory."""

from __future__ import annotations

import logging
from importlib import resources
from typing import Any

import pytest
import torch

from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import planted_memories
from mmforget.errors import CapabilityError, ConfigurationError, RequestError
from mmforget.methods.nemo import NeMo, similarity
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

BASE = ("a tree", "a house", "a street by monet", "a car on the street", "a banana")


def model(kind: Any = "sd") -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind), steps=3)


def memorized(*prompts: str) -> MemorizedSet:
    texts = prompts or ("a red cat", "a blue dog")
    return MemorizedSet(tuple(map(MemorizedPrompt, texts)), retain=Captioned(BASE))


def nemo(given: DiffusionGenerator, **settings: Any) -> NeMo:
    return NeMo(given, memorized(), **{"seeds": 2, "threshold": 2.0} | settings)


@torch.no_grad()
def test_activations_are_mean_magnitudes_of_values() -> None:
    given = model()
    method = nemo(given)
    names = [layer.name.split(".")[0] for layer in method.layers]
    assert names == ["down_blocks", "mid_block"]
    found = method._activations(["a red cat"])[0]
    states = given.encode(["a red cat"]).states[0]
    expected = []
    for layer in method.layers:
        weight = layer.module.weight
        for row in weight:
            expected.append(sum(abs(float(row @ token)) for token in states) / len(states))
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-3)


def test_neurons_far_from_ordinary_prompts_are_blocked() -> None:
    given = model()
    method = nemo(given, search=False, threshold=1.5, blocks="all")
    mask = method.locate_mask()
    ordinary, own = method._activations(BASE), method._activations(memorized().texts)
    far = ((own - ordinary.mean(0)).abs() > 1.5 * ordinary.std(0)).any(0)
    assert 0 < int(far.sum()) < len(far)
    chosen = torch.cat([mask.masks[f"{layer.name}.weight"][:, 0] for layer in method.layers])
    assert torch.equal(chosen, far)
    assert mask.unit == "row" and method.statistics()["neurons"]["chosen"] == int(far.sum())
    result: Any = method.finalize()
    for layer in method.layers:
        weight = result.network.get_parameter(f"{layer.name}.weight")
        assert torch.equal((weight == 0).all(1), mask.masks[f"{layer.name}.weight"][:, 0])


def test_biases_of_blocked_neurons_go_too() -> None:
    method = nemo(model("sd3"), search=False, threshold=1.0)
    mask = method.locate_mask()
    name = "transformer_blocks.0.attn.add_v_proj"
    assert torch.equal(mask.masks[f"{name}.bias"], mask.masks[f"{name}.weight"][:, 0])
    assert mask.masks[f"{name}.bias"].any()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@torch.no_grad()
def test_blocking_a_row_of_the_batch_equals_zeroing_its_weights(kind: Any) -> None:
    given = model(kind)
    method = nemo(given, blocks="all")
    embedding = given.encode(["a red cat", "a blue dog"])
    width = sum(layer.module.out_features for layer in method.layers)
    blocked = torch.zeros(2, width, dtype=torch.bool)
    blocked[1, ::2] = True
    plain = method._all_changes(embedding, None)
    found = method._all_changes(embedding, blocked)
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    assert not torch.allclose(found[1], plain[1], atol=1e-5)
    with method._as_mask(blocked[1]).apply(method.model, check_base=False):
        zeroed = method._all_changes(embedding, None)
    assert torch.allclose(found[1], zeroed[1], atol=1e-5)
    assert not any(m._forward_hooks for m in method.model.network.modules())


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_search_ends_where_the_prediction_has_changed_enough(kind: Any) -> None:
    given = model(kind)
    before = state_hash(given)
    # A random network hardly listens to its text, so that little change must do.
    method = nemo(given, limit=0.9999, refine=False, blocks="all", at_step=1)
    method.locate_mask()
    facts = method.statistics()
    assert facts["neurons"]["chosen"] == facts["neurons_before_refinement"] > 0
    assert facts["calls"] >= 2 and facts["limit"] == 0.9999
    assert state_hash(given) == before
    assert method.cost()["forget_sample_passes"] > 0


def test_refinement_keeps_what_the_change_needs() -> None:
    given = model()
    settings: dict[str, Any] = {"limit": 0.9999, "blocks": "all", "at_step": 1, "max_calls": 500}
    whole = nemo(given, refine=False, **settings)
    refined = nemo(given, **settings)
    one, two = whole.locate_mask(), refined.locate_mask()
    assert 0 < two.count < one.count
    assert two.intersection(one).count == two.count
    # Every prompt's refined set still changes its prediction as much as the search asked for.
    calls = refined.statistics()["calls"]
    limited = nemo(given, **settings | {"max_calls": whole.statistics()["calls"]}).locate_mask()
    assert limited.count == one.count
    assert calls > whole.statistics()["calls"]


def test_similarity_is_one_for_equals_and_ignores_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    for side in (4, 8, 16, 64):
        one = torch.randn(3, 4, side, side, generator=draw)
        two = torch.randn(3, 4, side, side, generator=draw)
        assert similarity(one, one).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
        assert similarity(one, 3 * one + 5).tolist() == pytest.approx([1.0] * 3, abs=1e-3)
        assert similarity(one, two).max() < 0.7
        near = similarity(one, one + 0.1 * two)
        assert bool((near > similarity(one, one + two)).all())


def test_small_latents_use_one_scale_by_the_definition() -> None:
    draw = torch.Generator().manual_seed(1)
    one, two = torch.rand(2, 1, 1, 8, 8, generator=draw).unbind(0)
    one, two = ((x - x.min()) / (x.max() - x.min()) for x in (one, two))
    total, c1, c2 = [], 0.01**2, 0.03**2
    wide = [torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect") for x in (one, two)]
    for row in range(8):
        for column in range(8):
            a, b = (x[0, 0, row : row + 3, column : column + 3] for x in wide)
            mean, other = a.mean(), b.mean()
            covariance = ((a - mean) * (b - other)).mean()
            spread = a.var(unbiased=False) + b.var(unbiased=False)
            total.append(
                (2 * mean * other + c1)
                * (2 * covariance + c2)
                / ((mean**2 + other**2 + c1) * (spread + c2))
            )
    expected = float(torch.stack(total).mean())
    assert float(similarity(one, two)) == pytest.approx(expected, abs=1e-3)


def test_prompts_that_do_not_look_memorized_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        method = nemo(model(), limit=0.999, refine=False)
        method.locate_mask()
    assert "2 of 2 prompts, such as 'a red cat', agree among seeds no more" in caplog.text
    assert "only 5 ordinary prompts" in caplog.text
    assert method.statistics()["looked_memorized"] == 0


def test_bad_settings_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"blocks": "al"}, "did you mean 'all'"),
        ({"seeds": 1}, "at least 2"),
        ({"threshold_step": 0.0}, "positive"),
        ({"threshold": 0.5}, "below `threshold_min`"),
        ({"limit": 1.0}, "between 0 and 1"),
        ({"at_step": 4}, "1 to 3"),
        ({"max_calls": 0}, "`max_calls` is 0"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigurationError, match=message):
            nemo(model(), **settings)
    with pytest.raises(RequestError, match="is memorized"):
        nemo(model(), base=["a tree", "a red cat"])
    with pytest.raises(RequestError, match="there are 0"):
        NeMo(model(), MemorizedSet((MemorizedPrompt("a cat"),)))


def test_networks_without_text_values_are_refused() -> None:
    from mmforget.models.memory_layers import memory_layers

    with pytest.raises(CapabilityError, match="no layers of kind 'cross_value'"):
        memory_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "cross_value")


@pytest.mark.slow
def test_value_neurons_hide_what_the_shipped_model_has_memorized() -> None:
    folder = resources.files("mmforget") / "assets" / "digit_world" / "memorizing_unet"
    known = planted_memories(retain=256, test=8).of_kind("verbatim")
    given = load_generator(str(folder), steps=20, guidance=3.0)
    method = NeMo(given, known, blocks="all", threshold=2.0, search=False)
    result: Any = method.finalize()
    truth = torch.stack([known.images[one.images[0]] for one in known.prompts]).flatten(1)
    for found, low, high in ((given, 0.8, 1.0), (result, -0.2, 0.5)):
        images = found.generate(known.texts, seed=11).flatten(1)
        pair = [part - part.mean(1, keepdim=True) for part in (images, truth)]
        assert low < torch.cosine_similarity(*pair).mean() < high
