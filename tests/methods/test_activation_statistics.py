"""Sums of squared inputs: against brute force, per family and sampler, without side effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmforget.errors import (
    ConfigurationError,
    DivergenceError,
    ModelError,
    RequestError,
    WeightsError,
)
from mmforget.methods.activation_statistics import collect, collect_each
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.memory_layers import MemoryLayer, memory_layers
from mmforget.seeds import generator
from mmforget.testing.tiny_pipelines import tiny_pipeline

PROMPTS = ["a red cat", "a blue dog"]


def model(kind: Any = "sd", steps: int = 2, **settings: Any) -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline(kind, **settings), steps=steps)


def every_row(
    given: DiffusionGenerator, layer: MemoryLayer, prompts: list[str], which: str
) -> dict[float, Tensor]:
    """All input rows of a layer per time, kept whole."""
    kept: dict[float, list[Tensor]] = {}
    now: list[Any] = []

    def hear(module: Any, arguments: Any) -> None:
        time, rows = now[-1]
        inputs = arguments[0][rows if which == "conditional" else slice(None)]
        kept.setdefault(time, []).append(inputs[..., layer.columns].flatten(0, -2).double())

    handle = layer.module.register_forward_pre_hook(hear)
    noise = torch.stack(
        [torch.randn(given.latent_shape, generator=generator(0, "locating", n)) for n in range(2)]
    )
    with torch.no_grad():
        given.sample(
            noise,
            given.encode(prompts),
            given.unconditional(),
            before=lambda time, rows: now.append((time, rows)),
        )
    handle.remove()
    return {time: torch.cat(rows) for time, rows in kept.items()}


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3", "sd35", "flux"])
@pytest.mark.parametrize("rows", ["conditional", "all"])
def test_sums_equal_those_over_all_rows_kept(kind: Any, rows: Any) -> None:
    given = model(kind)
    layers = memory_layers(given)
    found = collect(given, PROMPTS, layers, rows=rows)
    for layer in (layers[0], layers[-1]):
        reference = every_row(given, layer, PROMPTS, rows)
        assert tuple(reference) == found.times and len(found.times) == 2
        for time, inputs in reference.items():
            unit = inputs / inputs.norm(dim=1, keepdim=True)
            assert found.rows[layer.name][time] == len(unit)
            expected = unit.square().sum(0)
            assert torch.allclose(found.squares[layer.name][time].double(), expected, rtol=1e-4)
            rms = found.size(layer.name, time).double()
            assert torch.allclose(rms, (expected / len(unit)).sqrt(), rtol=1e-4)
            whole = found.size(layer.name, time, average=False).double()
            assert torch.allclose(whole, expected.sqrt(), rtol=1e-4)


def test_without_row_norm_lengths_count() -> None:
    given = model()
    layer = memory_layers(given)[1]
    found = collect(given, PROMPTS, [layer], row_norm=False)
    for time, inputs in every_row(given, layer, PROMPTS, "conditional").items():
        expected = inputs.square().sum(0)
        assert torch.allclose(found.squares[layer.name][time].double(), expected, rtol=1e-4)


def test_batches_do_not_matter_and_parts_add_up() -> None:
    given, prompts = model(steps=3), [*PROMPTS, "a tree", "", "a house"]
    layers = memory_layers(given)
    whole, parts = (collect(given, prompts, layers, batch_size=n) for n in (8, 2))
    each = list(collect_each(given, prompts, layers, batch_size=3))
    assert len(each) == 5 and whole.passes == sum(one.passes for one in each)
    for layer in layers:
        for time in whole.times:
            expected = whole.squares[layer.name][time]
            assert torch.allclose(parts.squares[layer.name][time], expected, rtol=1e-4)
            summed = torch.stack([one.squares[layer.name][time] for one in each]).sum(0)
            assert torch.allclose(summed, expected, rtol=1e-3)
            assert sum(one.rows[layer.name][time] for one in each) == whole.rows[layer.name][time]


def test_embeddings_give_what_their_prompts_give() -> None:
    given = model("sdxl")
    layers = memory_layers(given)
    one, two = (collect(given, p, layers) for p in (PROMPTS, given.encode(PROMPTS)))
    assert all(
        torch.equal(one.squares[layer.name][t], two.squares[layer.name][t])
        for layer in layers
        for t in one.times
    )


def test_halves_of_guidance_are_not_mixed() -> None:
    given = model(steps=1)
    layers = memory_layers(given)
    found = {}
    for rows in ("conditional", "all"):
        for label, empty in (("plain", ""), ("other", "a church by van gogh")):
            row = given.encode([empty])
            given.unconditional = lambda row=row: row  # type: ignore[method-assign]
            statistics = collect(given, PROMPTS, layers, rows=rows)  # type: ignore[arg-type]
            found[rows, label] = statistics.squares[layers[0].name][statistics.times[0]]
    assert torch.equal(found["conditional", "plain"], found["conditional", "other"])
    assert not torch.allclose(found["all", "plain"], found["all", "other"], rtol=1e-3)


def test_the_empty_prompt_needs_no_guidance_and_gives_the_same() -> None:
    given = model(steps=2)
    layers = memory_layers(given)
    fast = collect(given, ["", ""], layers)
    slow = collect(given, given.encode(["", ""]), layers)
    assert (fast.passes, slow.passes) == (4, 8)
    for layer in layers:
        for time in fast.times:
            one, two = fast.squares[layer.name][time], slow.squares[layer.name][time]
            assert torch.allclose(one, two, rtol=1e-3)


@pytest.mark.parametrize("scheduler", ["DDIM", "HeunDiscrete", "PNDM", "EulerAncestralDiscrete"])
def test_samplers_that_repeat_a_time_add_up_there(scheduler: str) -> None:
    import diffusers

    given = model(steps=4)
    base = given.pipeline.scheduler.config
    given.pipeline.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(base)
    layers = memory_layers(given)
    found = collect(given, PROMPTS, layers)
    again = collect(given, ["a tree"], layers)
    found.check_against(again)
    _, times = given.schedule(4, torch.zeros(1, *given.latent_shape))
    distinct = list(dict.fromkeys(times.tolist()))
    assert list(found.times) == pytest.approx(distinct)
    tokens = list(found.rows[layers[0].name].values())
    per_pass = tokens[0] // times.tolist().count(times[0].item())
    assert sum(tokens) == per_pass * len(times)
    first = collect(given, PROMPTS, layers, first_steps=2)
    assert first.times == found.times[:2]
    for time in first.times:
        one, two = (s.squares[layers[0].name][time] for s in (first, found))
        assert torch.equal(one, two)


def test_the_model_is_left_as_it_was() -> None:
    given = model()
    given.train()
    given.network.mid_block.eval()
    modes = [module.training for module in given.modules()]
    before = state_hash(given)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    collect(given, PROMPTS, memory_layers(given), first_steps=1)
    for _ in collect_each(given, PROMPTS, memory_layers(given)):
        assert not any(m._forward_pre_hooks for m in given.network.modules())
    assert torch.equal(torch.rand(3), expected)
    assert state_hash(given) == before
    assert [module.training for module in given.modules()] == modes
    assert all(p.grad is None for p in given.parameters())
    assert not any(m._forward_pre_hooks for m in given.network.modules())


def test_noise_is_shared_by_number_and_changes_with_the_seed() -> None:
    given = model(steps=1)
    layer = memory_layers(given)[0]

    def found(prompts: list[str], **settings: Any) -> Tensor:
        statistics = collect(given, prompts, [layer], **settings)
        return statistics.size(layer.name, statistics.times[0])

    twice = found(["a cat", "a cat"], numbers=[3, 3])
    assert torch.allclose(twice, found(["a cat"], numbers=[3]), rtol=1e-4)
    assert not torch.allclose(twice, found(["a cat"], numbers=[4]), rtol=1e-3)
    assert not torch.allclose(twice, found(["a cat"], numbers=[3], seed=1), rtol=1e-3)


def test_half_precision_is_added_up_in_higher_precision() -> None:
    given = model(steps=1)
    layer = memory_layers(given)[0]
    found = collect(given, PROMPTS, [layer])
    given.network.to(torch.bfloat16)
    with pytest.raises(ModelError, match="single precision"):
        collect(given, PROMPTS, [layer])
    assert found.squares[layer.name][found.times[0]].dtype in (torch.float32, torch.float64)


def test_inputs_that_are_not_finite_are_reported() -> None:
    given = model()
    layer = memory_layers(given)[1]
    name = layer.name.replace("net.2", "net.0.proj")
    given.network.get_submodule(name).weight.data[0, 0] = float("inf")
    with pytest.raises(DivergenceError, match=r"'.*ff\.net\.2' are not finite"):
        collect(given, PROMPTS, [layer])


def test_layers_that_are_never_called_are_reported() -> None:
    given = model()
    stray = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match="'stray' was never called"):
        collect(given, PROMPTS, [MemoryLayer("stray", stray, slice(0, 3), slice(0, 3))])


def test_bad_settings_are_refused() -> None:
    given = model()
    layers = memory_layers(given)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"first_steps": 0}, "`first_steps` is 0"),
        ({"first_steps": 3}, "1 to 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"rows": "condition"}, "did you mean 'conditional'"),
        ({"numbers": [1]}, "1 entries for 2 prompts"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigurationError, match=message):
            collect(given, PROMPTS, layers, **settings)
    with pytest.raises(ConfigurationError, match="`layers` is empty"):
        collect(given, PROMPTS, [])
    with pytest.raises(RequestError, match="no prompts"):
        collect(given, [], layers)
    with pytest.raises(ConfigurationError, match="prompt by prompt"):
        list(collect_each(given, PROMPTS, layers, rows="all"))


def test_statistics_that_do_not_match_are_refused() -> None:
    given = model()
    layers = memory_layers(given)
    found = collect(given, PROMPTS, layers)
    with pytest.raises(ConfigurationError, match="lack the time"):
        found.check_against(collect(given, PROMPTS, layers, first_steps=1))
    with pytest.raises(WeightsError, match="lack the layer"):
        found.check_against(collect(given, PROMPTS, layers[:1]))
    other = collect(given, PROMPTS, layers)
    other.squares[layers[0].name] = {t: torch.zeros(3) for t in other.times}
    with pytest.raises(WeightsError, match="same network"):
        found.check_against(other)
