"""Masks of single weights: application, the way back, files, comparison, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, MissingFileError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.memory_layers import memory_layers
from mmforget.models.weight_mask import WeightMask
from mmforget.testing.tiny_pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def model() -> DiffusionGenerator:
    return DiffusionGenerator(tiny_pipeline("sd"))


def random_mask(model: DiffusionGenerator, share: float = 0.1, seed: int = 0) -> WeightMask:
    draw = torch.Generator().manual_seed(seed)
    masks = {
        layer.weight_name: torch.rand(layer.module.weight.shape, generator=draw) < share
        for layer in memory_layers(model)
    }
    return WeightMask.described(model, masks, state_hash(model.network), method="Test")


def mask(**masks: Any) -> WeightMask:
    return WeightMask("unet", {name: torch.tensor(m) for name, m in masks.items()})


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_application_changes_the_chosen_weights_alone(
    model: DiffusionGenerator, factor: float
) -> None:
    found, before = (
        random_mask(model),
        {k: v.clone() for k, v in model.network.state_dict().items()},
    )
    with found.apply(model, factor) as removed:
        assert removed.count == found.count > 0
        for name, after in model.network.state_dict().items():
            expected = before[name].clone()
            if name in found.masks:
                expected[found.masks[name]] *= factor
                assert not torch.equal(after, before[name])
            assert torch.equal(after, expected), name
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())


def test_zeroed_weights_are_as_many_as_the_mask_says(model: DiffusionGenerator) -> None:
    found = random_mask(model)
    names = list(found.masks)
    with found.apply(model):
        zeros = sum(int((model.network.get_parameter(name) == 0).sum()) for name in names)
        # A negative weight must not become a negative zero.
        signs = [model.network.get_parameter(n)[found.masks[n]].signbit().any() for n in names]
    assert zeros == found.count
    assert not any(signs)


def test_restoring_is_exact_for_values_that_arithmetic_would_lose() -> None:
    layer = nn.Linear(4, 2, bias=False)
    odd = torch.tensor([[1e-40, -0.0, 3.0, 1e30], [0.1, -1e-45, 5.0, 7.0]])
    layer.weight.data = odd.clone().T.contiguous().T  # not contiguous
    removed = mask(weight=[[True, True, False, True], [False, True, True, False]]).apply(layer, 0.3)
    assert not torch.equal(layer.weight, odd)
    removed.restore()
    removed.restore()
    assert torch.equal(layer.weight.view(torch.int32), odd.view(torch.int32))


def test_restoring_finds_weights_that_changed_their_type() -> None:
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    removed = mask(weight=[[True, False]]).apply(layer)
    layer.double()
    removed.restore()
    assert torch.equal(layer.weight.float(), before)


def test_file_round_trip_keeps_every_bit(model: DiffusionGenerator, tmp_path: Path) -> None:
    found = random_mask(model, share=0.37)
    found.metadata["columns"] = {next(iter(found.masks)): [0, 7]}
    file = found.save(tmp_path)
    assert file.name == "mmforget_mask.safetensors"
    # One bit per weight, and a header.
    assert file.stat().st_size < sum(m.numel() for m in found.masks.values()) / 8 + 6000
    read = WeightMask.load(tmp_path)
    assert read.metadata == found.metadata and read.component == "unet"
    assert read.masks.keys() == found.masks.keys()
    assert all(torch.equal(read.masks[n], m) for n, m in found.masks.items())
    with read.apply(model):
        pass


def test_masks_whose_size_is_no_multiple_of_eight_survive(tmp_path: Path) -> None:
    found = mask(weight=[[True, False, True]], bias=[True])
    found.save(tmp_path / "one.safetensors")
    read = WeightMask.load(tmp_path / "one.safetensors")
    assert read.masks["weight"].tolist() == [[True, False, True]]
    assert read.masks["bias"].tolist() == [True]


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no weight mask"):
        WeightMask.load(tmp_path)
    file = mask(weight=[[True] * 64]).save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(WeightsError, match="no intact"):
        WeightMask.load(file)
    file.write_bytes(whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 7'))
    with pytest.raises(WeightsError, match="format version 7"):
        WeightMask.load(file)
    file.write_bytes(whole.replace(b'\\"weight\\": [1, 64]', b'\\"weight\\": [1, 99]'))
    with pytest.raises(WeightsError, match="does not hold"):
        WeightMask.load(file)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match="no weight mask of mmforget"):
        WeightMask.load(file)


def test_masks_of_other_networks_are_refused(model: DiffusionGenerator) -> None:
    found, before = random_mask(model), state_hash(model.network)
    other = DiffusionGenerator(tiny_pipeline("sd", seed=1))
    with pytest.raises(WeightsError, match="weights of the unet differ"):
        found.apply(other)
    found.apply(other, check_base=False)
    wide = DiffusionGenerator(tiny_pipeline("sdxl"))
    with pytest.raises(WeightsError, match="configuration"):
        found.apply(wide)
    with pytest.raises(WeightsError, match=r"\(2, 2\), the network's weight is \(1, 2\)"):
        mask(weight=[[True, True], [True, True]]).apply(nn.Linear(2, 1))
    with pytest.raises(WeightsError, match="'nothing', which Linear does not have"):
        mask(nothing=[True]).apply(nn.Linear(2, 1))
    assert state_hash(model.network) == before


def test_bad_values_are_refused_and_nothing_is_changed() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    with pytest.raises(WeightsError, match="not finite"):
        mask(bias=[True, True], weight=[[True, True], [False, False]]).apply(layer)
    assert float(layer.weight.detach()[0, 0]) == 1.0 and bool(layer.bias.any())
    for factor in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="factor"):
            mask(weight=[[True, False], [False, False]]).apply(layer, factor)
    with pytest.raises(WeightsError, match=r"must be torch\.bool"):
        mask(weight=[1.0, float("nan")])
    with pytest.raises(WeightsError, match="without parameters"):
        WeightMask("unet", {})


def test_density_counts_the_columns_that_could_be_chosen() -> None:
    found = mask(a=[[False, True, False, False], [False, True, True, False]], b=[[False, False]])
    found.metadata |= {"columns": {"a": [1, 3]}, "parameters": 30}
    density = found.density()
    assert density == {
        "layers": {"a": 3 / 4, "b": 0.0},
        "chosen_layers": 3 / 6,
        "network": 3 / 30,
    }
    del found.metadata["parameters"]
    assert found.density()["network"] is None


def test_overlap_is_that_of_sets_and_undefined_where_both_are_empty() -> None:
    one = mask(a=[[True, True, False, False]], b=[[False, False]], c=[[True, False]])
    two = mask(a=[[False, True, True, False]], b=[[False, False]])
    found = one.iou(two)
    assert found.layers["a"] == pytest.approx(1 / 3)
    assert math.isnan(found.layers["b"]) and math.isnan(found.chance["b"])
    assert found.layers["c"] == 0.0  # a layer that is missing counts as empty
    assert found.mean == pytest.approx(1 / 6)
    # Two of four each: one in common on average, three in the union.
    assert found.chance["a"] == pytest.approx(1 / 3)
    assert math.isnan(mask(b=[[False]]).iou(mask(b=[[False]])).mean)
    with pytest.raises(WeightsError, match="in one mask"):
        one.iou(mask(a=[[True]]))
    with pytest.raises(WeightsError, match="belongs to the unet"):
        one.iou(WeightMask("transformer", one.masks))


def test_chance_is_what_random_masks_have() -> None:
    def drawn(seed: int) -> WeightMask:
        scores = torch.rand(300, 50, generator=torch.Generator().manual_seed(seed))
        chosen = torch.zeros(300, 60, dtype=torch.bool)
        chosen[:, 10:] = scores.argsort(dim=1) < 8
        return WeightMask("unet", {"a": chosen}, {"columns": {"a": [10, 60]}})

    found = drawn(0).iou(drawn(1))
    assert found.chance["a"] == pytest.approx(8 / (2 * 50 - 8))
    assert found.layers["a"] == pytest.approx(found.chance["a"], abs=0.015)


def test_union_and_intersection() -> None:
    one, two = mask(a=[[True, True, False]]), mask(a=[[False, True, True]], b=[[True]])
    assert one.union(two).masks["a"].tolist() == [[True, True, True]]
    assert one.union(two).masks["b"].tolist() == [[True]]
    assert one.intersection(two).masks["a"].tolist() == [[False, True, False]]
    assert one.intersection(two).count == 1


def test_the_edit_does_what_the_mask_does(model: DiffusionGenerator) -> None:
    found = random_mask(model)
    edit = found.weight_edit(model)
    other = DiffusionGenerator(tiny_pipeline("sd"))
    edit.apply(other)  # checks the base
    with found.apply(model):
        masked: dict[str, Tensor] = {k: v.clone() for k, v in model.network.state_dict().items()}
    assert all(torch.equal(v, masked[k]) for k, v in other.network.state_dict().items())
    assert state_hash(model.network) == edit.metadata["base_hash"]
