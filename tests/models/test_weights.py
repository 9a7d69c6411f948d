"""Weights are read without executing code, and all of them or none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmforget.errors import MissingFileError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.weights import put_weights, read_weights, write_weights


def network(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


def load_weights(target: nn.Module, path: Path) -> None:
    put_weights(target, read_weights(path), path)


class Trap:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    source, target = network(), network()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        write_weights(source, path)
    load_weights(target, path)
    assert state_hash(target) == state_hash(source)


@pytest.mark.parametrize("prefix", ["network.", "module.", "_orig_mod.", "network._orig_mod."])
def test_wrapped_checkpoints(tmp_path: Path, prefix: str) -> None:
    source, target = network(), network()
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    beside = {"mean": torch.zeros(1, 3, 1, 1)} if prefix.startswith("network.") else {}
    torch.save({"state_dict": {**weights, **beside}, "epoch": 3}, tmp_path / "last.ckpt")
    load_weights(target, tmp_path / "last.ckpt")
    assert state_hash(target) == state_hash(source)


def test_a_pickle_that_executes_code_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    torch.save({"0.weight": Trap(trace)}, path)
    with pytest.raises(WeightsError, match=r"would execute code.*allow_pickle=True"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Trap(trace)))  # not even torch's format
    with pytest.raises(WeightsError, match="would execute code"):
        read_weights(path)
    assert not trace.exists()
    torch.save(network(), path)  # a whole module, which is code too
    with pytest.raises(WeightsError, match="would execute code"):
        read_weights(path)
    assert set(read_weights(path, allow_pickle=True)) == set(network().state_dict())


@pytest.mark.parametrize("kept", [0, 4, 100, 400, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(network().state_dict(), path)
    else:
        write_weights(network(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"damaged|intact|cannot be read"):
        load_weights(network(), path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no weights file"):
        read_weights(tmp_path / "nothing.safetensors")


def test_wrong_names_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = network().state_dict()
    state["extra"] = state.pop("0.weight")
    save_file(state, path)
    message = r"1 names are missing \(0.weight\), 1 are unknown \(extra\)"
    with pytest.raises(WeightsError, match=message):
        load_weights(network(), path)


def test_adapters_are_no_full_weights(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.0.lora_A.weight": torch.ones(2, 4)}, path)
    with pytest.raises(WeightsError, match="holds an adapter"):
        load_weights(network(), path)


def test_wrong_shape(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_weights(network(classes=4), path)
    target = network()
    before = state_hash(target)
    with pytest.raises(WeightsError, match=r"'2.weight' has shape \(4, 5\).*\(3, 5\).*num_classes"):
        load_weights(target, path)
    assert state_hash(target) == before


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    source = network()
    with torch.no_grad():
        source[2].bias[1] = float("nan")
    write_weights(source, path)
    with pytest.raises(WeightsError, match=r"'2.bias' that are not finite"):
        load_weights(network(), path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"0.weight": "text"}])
def test_other_content(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=r"save `network.state_dict\(\)`"):
        read_weights(tmp_path / "weights.pt")


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    views = nn.Linear(4, 4, bias=False)
    base = torch.randn(8, 4)
    views.weight = nn.Parameter(base[4:])  # a part of a larger tensor
    views.register_buffer("turned", base[:4].t())
    for module in (tied, views):
        write_weights(module, tmp_path / "weights.safetensors")
        for name, value in load_file(tmp_path / "weights.safetensors").items():
            assert torch.equal(value, module.state_dict()[name])
        load_weights(module, tmp_path / "weights.safetensors")
