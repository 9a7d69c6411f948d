"""LiNeS: changes scaled by depth, on classifiers and on multimodal language models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError, ConfigurationError, DataError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.multimodal import MultimodalLM
from mmforget.models.multimodals.base import family_of
from mmforget.retention.lines import (
    LiNeS,
    Ramp,
    best_scaling,
    blocks_of,
    merge_tasks,
    scaled,
    scaling_curve,
)
from mmforget.testing.tiny_multimodal import tiny_multimodal


def moved(model: Any, seed: int) -> Any:
    """A copy whose floating-point weights have been changed at random."""
    other = copy.deepcopy(model)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=chance)
    return other


def share(before: Any, after: Any, result: Any, name: str) -> float:
    """How much of its change a weight has kept."""
    states = (one.network.state_dict()[name].double() for one in (before, after, result))
    base, tuned, kept = states
    change = tuned - base
    found = ((kept - base) * change).sum() / change.square().sum()
    torch.testing.assert_close(kept, base + found * change, rtol=0, atol=1e-6)
    return float(found)


def block(name: str) -> tuple[str, int] | None:
    part, _, number = name.partition(".")
    return ("blocks", int(number[0])) if part == "blocks" else None


# ---- factors ------------------------------------------------------------------------------------


def test_factors_of_a_ramp():
    names = ["stem.weight", *(f"blocks.{n}.weight" for n in range(3)), "head.weight"]
    found = LiNeS(Ramp(0.2, 0.6)).factors(names, block)
    assert list(found.values()) == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.2])
    assert list(LiNeS(Ramp.up_from(0.4)).factors(names, block).values()) == pytest.approx(
        [0.4, 0.4, 0.7, 1.0, 0.4]
    )
    assert list(LiNeS(Ramp.down_to(0.4)).factors(names, block).values()) == pytest.approx(
        [1.0, 1.0, 0.7, 0.4, 1.0]
    )
    assert Ramp(0.2, 0.6).factor(0, 1) == pytest.approx(0.8)  # a single block: no 0/0


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "smolvlm"])
def test_towers_have_ramps_of_their_own(kind):
    network, _ = tiny_multimodal(kind)
    family = family_of(network)
    names = [name for name, _ in network.named_parameters()]
    ramps = {"vision": Ramp(0.0, 0.5), "language": Ramp(0.2, 0.8)}
    found = LiNeS(ramps, {"projector": 0.7}).factors(names, family.block, family.part)
    expected = {"vision": [0.0, 0.5], "language": [0.2, 0.6, 1.0]}
    seen = set()
    for name, factor in found.items():
        place, part = family.block(name), family.part(name)
        if place is not None:
            assert factor == pytest.approx(expected[place[0]][place[1]]), name
            seen.add(place)
        else:
            outside = {"projector": 0.7, "vision": 0.0}.get(part, 0.2)
            assert factor == pytest.approx(outside), name
            seen.add(part)
    assert {("vision", 1), ("language", 2), "projector"} <= seen
    alone = LiNeS({"language": Ramp(0.0, 0.0)}).factors(names, family.block, family.part)
    assert {alone[n] for n in names if (family.block(n) or "")[0:1] == ("vision",)} == {1.0}


def test_names_that_do_not_exist():
    names = ["blocks.0.weight", "head.weight"]
    with pytest.raises(ConfigurationError, match="`ramp` names 'visoin'"):
        LiNeS({"visoin": Ramp(1, 0)}).factors(names, block)
    with pytest.raises(ConfigurationError, match="`outside` names 'haed', did you mean 'head'"):
        LiNeS(Ramp(1, 0), {"haed": 1.0}).factors(names, block, lambda name: name.split(".")[0])
    with pytest.raises(ConfigurationError, match="none of the weights"):
        LiNeS(Ramp(1, 0)).factors(["head.weight"], block)
    with pytest.raises(ConfigurationError, match="`ramp` is empty"):
        LiNeS({})


# ---- weights ------------------------------------------------------------------------------------


def test_no_scaling_and_full_scaling_are_exact(tiny_model):
    after = moved(tiny_model, 1)
    hashes = state_hash(tiny_model), state_hash(after)
    assert state_hash(LiNeS(Ramp(1.0, 0.0)).apply(tiny_model, after)) == hashes[1]
    assert state_hash(LiNeS(Ramp(0.0, 0.0)).apply(tiny_model, after)) == hashes[0]
    assert (state_hash(tiny_model), state_hash(after)) == hashes


def test_a_classifier_is_scaled_by_its_blocks(tiny_model):
    after = moved(tiny_model, 1)
    result = LiNeS(Ramp(0.25, 0.5)).apply(tiny_model, after)
    assert not result.training
    own, _ = blocks_of(tiny_model)
    names = dict(tiny_model.network.named_parameters())
    assert {own(name) for name in names} == {None, ("blocks", 0), ("blocks", 1)}
    for name in names:
        place = own(name)
        expected = 0.25 if place is None else (0.25, 0.75)[place[1]]
        assert share(tiny_model, after, result, name) == pytest.approx(expected, abs=1e-3), name


def test_a_multimodal_model_is_scaled_by_its_towers():
    network, processor = tiny_multimodal("llava")
    before = MultimodalLM(network, processor)
    after = moved(before, 1)
    lines = LiNeS({"vision": Ramp(0.0, 0.0), "language": Ramp.up_from(0.5)}, {"projector": 1.0})
    result = lines.apply(before, after)
    assert share(before, after, result, "lm_head.weight") == pytest.approx(0.5, abs=1e-3)
    layers = "model.language_model.layers.{}.mlp.down_proj.weight"
    for row, expected in enumerate((0.5, 0.75, 1.0)):
        found = share(before, after, result, layers.format(row))
        assert found == pytest.approx(expected, abs=1e-3)
    state = result.network.state_dict()
    for name, tensor in before.network.state_dict().items():
        if name.startswith("model.vision_tower."):
            assert torch.equal(state[name], tensor)
    projector = "model.multi_modal_projector.linear_1.weight"
    assert torch.equal(state[projector], after.network.state_dict()[projector])


def test_states_that_do_not_fit():
    one = {"a": torch.zeros(2), "n": torch.tensor(3)}
    two = {"a": torch.ones(2), "n": torch.tensor(5)}
    half = scaled(one, two, {"a": 0.5, "n": 0.5})
    assert half["a"].tolist() == [0.5, 0.5] and int(half["n"]) == 5
    with pytest.raises(WeightsError, match="exists in one of the two"):
        scaled({"a": torch.zeros(2)}, two, {})
    with pytest.raises(WeightsError, match="merge the adapters first"):
        scaled(one, two | {"a.lora_A": torch.zeros(1)}, {})
    with pytest.raises(WeightsError, match=r"\(3,\) before"):
        scaled(one | {"a": torch.zeros(3)}, two, {})
    tied = torch.ones(2)
    states = {"a": tied, "b": tied}
    with pytest.raises(ConfigurationError, match="one tied weight"):
        scaled(states, states, {"a": 0.5, "b": 1.0})


def test_a_model_whose_blocks_are_unknown():
    class Bare:
        network = nn.Linear(2, 2)

    with pytest.raises(CapabilityError, match="give a `block` function"):
        blocks_of(Bare())  # type: ignore[arg-type]


# ---- merging and curves -------------------------------------------------------------------------


def flat(model: Any) -> Tensor:
    return torch.cat([weight.detach().double().flatten() for weight in model.network.parameters()])


def test_merging_tasks(tiny_model):
    one, two = moved(tiny_model, 1), moved(tiny_model, 2)
    base = flat(tiny_model)
    vectors = torch.stack([flat(one), flat(two)]) - base
    # the sum has the norm of the sum, so alpha is 1/K: the mean of both changes
    merged = flat(merge_tasks(tiny_model, [one, two], beta=0.0))
    torch.testing.assert_close(merged, base + vectors.mean(0), rtol=0, atol=1e-6)
    mean = flat(merge_tasks(tiny_model, [one, two], beta=0.0, combine="mean"))
    torch.testing.assert_close(mean, base + vectors.mean(0), rtol=0, atol=1e-6)
    largest = torch.where(vectors[0].abs() > vectors[1].abs(), vectors[0], vectors[1])
    alpha = vectors.sum(0).norm() / largest.norm() / 2
    most = flat(merge_tasks(tiny_model, [one, two], beta=0.0, combine="max"))
    torch.testing.assert_close(most, base + alpha * largest, rtol=0, atol=1e-6)
    single = flat(merge_tasks(tiny_model, [one], beta=0.0))
    torch.testing.assert_close(single, flat(one), rtol=0, atol=1e-6)
    deeper = merge_tasks(tiny_model, [one], beta=0.5)
    name = "blocks.1.mlp.fc1.weight"
    assert share(tiny_model, one, deeper, name) == pytest.approx(1.5, abs=1e-3)


def test_merging_what_can_not_be_merged(tiny_model):
    with pytest.raises(DataError, match="at least one"):
        merge_tasks(tiny_model, [], beta=0.0)
    with pytest.raises(ConfigurationError, match="`combine` is 'summ', did you mean 'sum'"):
        merge_tasks(tiny_model, [tiny_model], 0.0, "summ")  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="none of the models differs"):
        merge_tasks(tiny_model, [tiny_model], beta=0.0)


def test_the_curve_of_an_unlearned_model(tiny_model, tiny_data):
    """Unlearning by hand: the row of the forgotten class goes, and all other weights get noise."""
    unlearned = moved(tiny_model, 3)
    with torch.no_grad():
        unlearned.network.head.bias[3] = -100.0
    test = tiny_data.dataset("test")
    batch = test[list(range(len(test)))]
    gone = batch["label"] == 3

    def measure(model: Any) -> dict[str, float]:
        right = (model.logits(batch).argmax(1) == batch["label"]).double()
        return {"forget": right[gone].mean().item(), "utility": right[~gone].mean().item()}

    start = state_hash(unlearned)
    with torch.no_grad():
        rows = scaling_curve(tiny_model, unlearned, measure, alphas=(0.0, 0.5, 1.0), outside=None)
        expected = measure(tiny_model), measure(unlearned)
        nothing = scaling_curve(
            tiny_model, unlearned, measure, (0.0,), ramp=lambda alpha: Ramp(alpha, 0.0)
        )
    assert state_hash(unlearned) == start
    assert [row["alpha"] for row in rows] == [0.0, 0.5, 1.0]
    assert nothing[0] == {"alpha": 0.0, **expected[0]}
    assert rows[-1] == {"alpha": 1.0, **expected[1]}
    assert rows[0]["utility"] >= rows[-1]["utility"]


def test_the_best_scaling():
    rows = [
        {"alpha": 0.0, "target": 0.6, "control": 0.5},
        {"alpha": 0.5, "target": 0.88, "control": 0.45},
        {"alpha": 1.0, "target": 0.9, "control": 0.2},
    ]
    assert best_scaling(rows, tuned=0.9, untuned=0.5)["alpha"] == 0.5
    with pytest.raises(DataError, match="positive references"):
        best_scaling(rows, tuned=0.0, untuned=0.5)
    with pytest.raises(DataError, match="0 rows"):
        best_scaling([], tuned=0.9, untuned=0.5)
