"""Pruning: masks against loops, controls of equal counts, refusals, and the shipped models."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.data.memorized import Captioned, MemorizedPrompt, MemorizedSet
from mmforget.data.planted import planted_memories
from mmforget.errors import ConfigurationError, RequestError, WeightsError
from mmforget.methods.activation_statistics import ActivationStatistics, collect
from mmforget.methods.neuron_ratio_pruning import NeuronRatioPruning, neuron_scores
from mmforget.methods.pruning import PruningMethod
from mmforget.methods.pruning_controls import (
    BaseOnlyPruning,
    LikePruning,
    MagnitudePruning,
    RandomPruning,
)
from mmforget.methods.subspace_pruning import SubspacePruning, candidates, difference_masks
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator, load_generator
from mmforget.models.memory_layers import MemoryLayer, memory_layers
from mmforget.models.weight_edit import WeightEdit
from mmforget.models.weight_mask import WeightMask
from mmforget.testing.tiny_pipelines import tiny_pipeline

CONTROLS: list[type[LikePruning]] = [RandomPruning, MagnitudePruning, BaseOnlyPruning]


def model(kind: Any = "sd", **settings: Any) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind, **settings), steps=3)


def memorized(*prompts: str, retain: tuple[str, ...] = ()) -> MemorizedSet:
    texts = prompts or ("a red cat", "a blue dog")
    return MemorizedSet(tuple(map(MemorizedPrompt, texts)), retain=Captioned(retain))


def subspace(given: DiffusionGenerator, **settings: Any) -> SubspacePruning:
    return SubspacePruning(given, memorized(), **{"ratio": 0.05, "first_steps": 2} | settings)


def made_up(width: int, rows: int = 8) -> tuple[list[MemoryLayer], list[ActivationStatistics]]:
    """A layer, and statistics of two lists of prompts at three times."""
    draw = torch.Generator().manual_seed(width)
    linear = torch.nn.Linear(width, rows)
    linear.weight.data = torch.randn(rows, width, generator=draw)
    linear.weight.data[0, : width // 2] = 0
    layer = MemoryLayer("one", linear, slice(0, width), slice(0, rows))
    times = (900.0, 600.0, 300.0)
    found = [
        ActivationStatistics(
            {"one": {t: torch.rand(width, generator=draw) * count for t in times}},
            {"one": dict.fromkeys(times, count)},
        )
        for count in (10, 40)
    ]
    return [layer], found


def by_loops(layer: MemoryLayer, target: Any, base: Any, ratio: float, least: int) -> Tensor:
    """The mask, weight by weight."""
    weight = layer.module.weight.detach()
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for i in range(len(weight)):
        for j in range(weight.shape[1]):
            votes = 0
            for time in target.times:
                mine = [
                    abs(float(weight[i, k])) * float(target.size("one", time)[k])
                    for k in range(weight.shape[1])
                ]
                theirs = abs(float(weight[i, j])) * float(base.size("one", time)[j])
                rank = sum(value > mine[j] for value in mine)
                votes += rank < int(ratio * len(mine)) and mine[j] > theirs
            mask[i, j] = votes >= least
    return mask


@pytest.mark.parametrize(("combine", "least"), [("union", 1), ("intersection", 3), ("majority", 2)])
def test_masks_equal_those_of_loops(combine: Any, least: int) -> None:
    layers, (target, base) = made_up(20)
    found = difference_masks(layers, target, base, 0.3, combine)["one.weight"]
    assert torch.equal(found, by_loops(layers[0], target, base, 0.3, least))
    assert 0 < int(found.sum()) < 8 * 20


def test_weights_of_zero_are_never_chosen() -> None:
    layers, (target, base) = made_up(20)
    found = difference_masks(layers, target, base, 1.0)["one.weight"]
    assert not found[0, :10].any()
    assert found[0, 10:].any()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("per_prompt", [False, True])
def test_the_chosen_weights_are_zero_and_the_rest_is_untouched(kind: Any, per_prompt: bool) -> None:
    given = model(kind)
    before = {name: value.clone() for name, value in given.network.state_dict().items()}
    method = subspace(given, per_prompt=per_prompt)
    result = method.finalize()
    masks = method.mask.masks
    assert set(masks) == {layer.weight_name for layer in memory_layers(given)}
    for name, after in result.network.state_dict().items():
        expected = before[name].clone()
        if name in masks:
            assert masks[name].any()
            expected[masks[name]] = 0
        assert torch.equal(after, expected), name
    assert state_hash(given) == method._start_hash and not method.no_op
    assert method.cost()["sample_passes"] > 0
    assert method.statistics()["density"]["network"] == method.mask.density()["network"]


def test_flux_keeps_the_columns_that_read_attention() -> None:
    method = subspace(model("flux"), ratio=0.5)
    mask = method.locate_mask().masks["single_transformer_blocks.0.proj_out.weight"]
    assert not mask[:, :32].any()
    assert mask[:, 32:].any()


def test_locating_alone_changes_nothing_and_is_done_once() -> None:
    given = model()
    method = subspace(given, copy=False)
    with pytest.raises(ConfigurationError, match=r"call `method\.finalize"):
        _ = method.mask
    before = state_hash(given)
    mask = method.locate_mask()
    assert state_hash(given) == before
    assert method.locate_mask() is mask
    method.finalize()
    assert state_hash(given) != before
    assert state_hash(method.restore()) == before


def test_the_same_seed_gives_the_same_mask_and_another_one_does_not() -> None:
    one, same, other = (subspace(model(), seed=seed).locate_mask() for seed in (0, 0, 1))
    assert all(torch.equal(one.masks[name], same.masks[name]) for name in one.masks)
    agreement = one.iou(other)
    assert agreement.mean_chance < agreement.mean < 1


def test_one_prompt_alone_equals_pooling_over_it() -> None:
    settings: dict[str, Any] = {"ratio": 0.05, "first_steps": 2}
    one, two = (
        SubspacePruning(model(), memorized("a cat"), per_prompt=p, **settings).locate_mask()
        for p in (False, True)
    )
    assert one.iou(two).mean > 0.98  # a bmm and a row of it may round differently


def test_the_mask_depends_on_the_prompts_and_on_the_base() -> None:
    given = model()
    usual = subspace(given).locate_mask()
    other = SubspacePruning(given, memorized("a church"), ratio=0.05, first_steps=2).locate_mask()
    based = subspace(given, base=["a house", "a tree by van gogh", "a car"]).locate_mask()
    for mask in (other, based):
        assert 0 < usual.iou(mask).mean < 1


def test_mask_and_edit_are_saved_with_their_origin(tmp_path: Path) -> None:
    given = model()
    method = subspace(given)
    result = method.finalize()
    method.save_adapter(tmp_path)
    fresh, other = model(), model()
    mask = WeightMask.load(tmp_path)
    mask.apply(fresh)
    WeightEdit.load(tmp_path).apply(other)
    assert state_hash(fresh) == state_hash(other) == state_hash(result)
    facts = mask.metadata
    assert facts["method"] == "SubspacePruning" and facts["settings"]["ratio"] == 0.05
    assert facts["memorized_hash"] == memorized().hash and facts["config_hash"]
    assert facts["torch"] and facts["diffusers"] and facts["seed"] == 0


def test_crowded_masks_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        subspace(model(), ratio=1.0).locate_mask()
    assert "so much hurts every picture" in caplog.text


def test_almost_empty_masks_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    layers, (target, base) = made_up(200)
    for time in target.times:
        target.squares["one"][time] = base.squares["one"][time] / 8
        target.squares["one"][time][0] *= 4
    with caplog.at_level(logging.WARNING):
        mask = difference_masks(layers, target, base, 0.5)["one.weight"]
    assert "almost nothing is taken out" in caplog.text
    assert not mask[:, 1:].any()


# ---- refusals -----------------------------------------------------------------------------------


def test_layers_that_are_too_narrow_are_named_with_the_smallest_ratio() -> None:
    with pytest.raises(ConfigurationError, match=r"64 inputs of 'down_blocks.*at least 0\.0157"):
        subspace(model(), ratio=0.01)
    layer = memory_layers(model())[0]
    assert candidates(layer, 0.0157) == 1
    with pytest.raises(ConfigurationError, match="less than one"):
        NeuronRatioPruning(model(), memorized(), ratio=0.001, first_steps=None)
    assert candidates(made_up(100)[0][0], 0.29) == 29  # not 28, though 0.29 * 100 rounds down


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan")])
def test_ratios_out_of_range_are_refused(ratio: float) -> None:
    with pytest.raises(ConfigurationError, match="must be above 0"):
        subspace(model(), ratio=ratio)


def test_a_base_that_is_memorized_is_refused() -> None:
    for make in (SubspacePruning, NeuronRatioPruning):
        with pytest.raises(RequestError, match="'A red  cat' is memorized"):
            make(model(), memorized(), base=["a tree", "A red  cat"])
        with pytest.raises(RequestError, match="`base` is empty"):
            make(model(), memorized(), base=[])
        with pytest.raises(RequestError, match="list of texts"):
            make(model(), memorized(), base="a tree")


def test_bad_settings_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"combine": "unions"}, "did you mean 'union'"),
        ({"rows": "alle"}, "did you mean 'all'"),
        ({"first_steps": 4}, "1 to 3"),
        ({"layers": "ffn"}, "`layers` is 'ffn'"),
        ({"per_prompt": True, "rows": "all"}, "per_prompt"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigurationError, match=message):
            subspace(model(), **settings)
    for name in ("score", "across"):
        with pytest.raises(ConfigurationError, match=f"`{name}` is 'x'"):
            NeuronRatioPruning(model(), memorized(), **{name: "x"})


# ---- neurons ------------------------------------------------------------------------------------


def test_neuron_scores_are_those_computed_by_hand() -> None:
    layers, (target, base) = made_up(6)
    ratio = neuron_scores(layers, target, base)["one"]
    contribution = neuron_scores(layers, target, base, "contribution")["one"]
    weight = layers[0].module.weight
    for j in range(6):
        mine, theirs = (
            sum(float(s.squares["one"][t][j]) / count for t in s.times) / 3
            for s, count in ((target, 10), (base, 40))
        )
        assert float(ratio[j]) == pytest.approx(mine / theirs, rel=1e-4)
        expected = (mine**0.5 - theirs**0.5) * float(weight[:, j].norm())
        assert float(contribution[j]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("across", ["layer", "network"])
def test_whole_neurons_with_the_largest_ratios_go(across: Any) -> None:
    given = model()
    retain = ("a tree", "a house by monet", "a street")
    method = NeuronRatioPruning(
        given, memorized(retain=retain), ratio=0.1, across=across, first_steps=2
    )
    assert method.base == retain
    mask = method.locate_mask()
    layers = memory_layers(given)
    statistics = [
        collect(given, p, layers, first_steps=2) for p in (memorized().texts, list(retain))
    ]
    scores = neuron_scores(layers, *statistics)
    together = torch.cat(list(scores.values()))
    least = together.sort(descending=True).values[int(0.1 * len(together)) - 1]
    total = 0
    for layer in layers:
        found = mask.masks[layer.weight_name]
        assert torch.equal(found, found[:1].expand_as(found))
        chosen, own = found[0], scores[layer.name]
        count = int(0.1 * layer.width) if across == "layer" else int((own >= least).sum())
        assert int(chosen.sum()) == min(count, int((own > 1).sum()))
        if chosen.any():
            assert own[chosen].min() > own[~chosen].max()
        total += int(chosen.sum())
    assert mask.unit == "column" and total > 0


# ---- controls -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CONTROLS)
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_controls_take_as_many_from_every_row(make: type[LikePruning], kind: Any) -> None:
    given = model(kind)
    like = subspace(given).locate_mask()
    method = make(given, memorized(), like)
    assert method.control
    mask = method.locate_mask()
    for name, own in like.masks.items():
        assert torch.equal(mask.masks[name].sum(1), own.sum(1))
        outside = mask.masks[name].clone()
        outside[:, like.columns(name)] = False
        assert not outside.any()
    assert mask.iou(like).mean < 1
    assert mask.metadata["method"] == make.__name__


def test_random_control_overlaps_by_chance_and_follows_its_seed() -> None:
    given = model()
    like = subspace(given, ratio=0.2).locate_mask()
    masks = [RandomPruning(given, memorized(), like, seed=s).locate_mask() for s in (0, 0, 1)]
    assert masks[0].iou(masks[1]).mean == 1
    for other in (like, masks[2]):
        found = masks[0].iou(other)
        assert found.mean == pytest.approx(found.mean_chance, abs=0.03)


def test_magnitude_control_takes_the_largest() -> None:
    given = model()
    like = subspace(given).locate_mask()
    mask = MagnitudePruning(given, memorized(), like).locate_mask()
    for name, chosen in mask.masks.items():
        for weights, own in zip(given.network.get_parameter(name).abs(), chosen, strict=True):
            if own.any():
                assert weights[own].min() >= weights[~own].max()


def test_base_only_control_takes_what_the_base_uses() -> None:
    given = model()
    like = subspace(given).locate_mask()
    method = BaseOnlyPruning(given, memorized(), like, base=["a tree"])
    assert method.first_steps == 2  # that of the mask
    mask = method.locate_mask()
    layers = memory_layers(given)
    statistics = collect(given, ["a tree"], layers, first_steps=2)
    for layer in layers:
        used = statistics.mean_square(layer.name, statistics.times).sqrt()
        scores = layer.weight.abs() * used.float()
        for row, own in zip(scores, mask.masks[layer.weight_name], strict=True):
            if own.any():
                assert row[own].min() >= row[~own].max()


@pytest.mark.parametrize("make", CONTROLS)
def test_controls_of_whole_neurons_take_whole_neurons(make: type[LikePruning]) -> None:
    given = model()
    columns = NeuronRatioPruning(given, memorized(), ratio=0.1, first_steps=1).locate_mask()
    found = make(given, memorized(), columns).locate_mask()
    for name, own in columns.masks.items():
        chosen = found.masks[name]
        assert torch.equal(chosen, chosen[:1].expand_as(chosen))
        assert chosen[0].sum() == own[0].sum()
    layers = memory_layers(given)
    masks = {}
    for layer in layers:
        rows = torch.arange(layer.module.out_features) % 5 == 0
        masks[layer.weight_name] = rows[:, None].expand(layer.module.weight.shape).clone()
        masks[f"{layer.name}.bias"] = rows
    like = WeightMask.described(given, masks, state_hash(given.network), unit="row")
    found = make(given, memorized(), like).locate_mask()
    for layer in layers:
        chosen = found.masks[layer.weight_name]
        assert torch.equal(chosen, chosen[:, :1].expand_as(chosen))
        assert int(chosen[:, 0].sum()) == int(masks[layer.weight_name][:, 0].sum())
        assert torch.equal(found.masks[f"{layer.name}.bias"], chosen[:, 0])


@pytest.mark.parametrize("make", CONTROLS)
def test_controls_refuse_masks_of_other_networks(make: type[LikePruning]) -> None:
    like = subspace(model()).locate_mask()
    with pytest.raises(WeightsError, match="weights of the unet differ"):
        make(model(seed=1), memorized(), like)
    with pytest.raises(WeightsError, match="mask of the unet, the model has a transformer"):
        make(model("sd3"), memorized(), like)


# ---- the shipped models -------------------------------------------------------------------------


def correlations(given: DiffusionGenerator, known: MemorizedSet) -> Tensor:
    """(P,) mean normalised correlation with the training picture, two pictures per prompt."""
    images = given.generate(known.texts, n=2, seed=11).flatten(1)
    truth = torch.stack([known.images[one.images[0]] for one in known.prompts])
    truth = truth.flatten(1).repeat_interleave(2, 0)
    centred = [part - part.mean(1, keepdim=True) for part in (images, truth)]
    return torch.cosine_similarity(*centred).view(-1, 2).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memorizing_unet", "memorizing_transformer"])
def test_feed_forward_pruning_leaves_natural_memory_where_it_is(name: str) -> None:
    folder = str(resources.files("mmforget") / "assets" / "digit_world" / name)
    known = planted_memories(retain=64, test=8).of_kind("verbatim")
    given = load_generator(folder, steps=20, guidance=3.0)
    assert correlations(given, known).mean() > 0.8
    methods: list[PruningMethod] = [SubspacePruning(given, known, ratio=0.02)]
    methods.append(RandomPruning(given, known, methods[0].locate_mask()))
    for method in methods:
        result: Any = method.finalize()
        assert correlations(result, known).mean() > 0.6
        assert not method.no_op
