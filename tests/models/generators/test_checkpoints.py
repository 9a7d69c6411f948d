"""Checkpoints of others are read without executing what is in them, and written like them."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmforget.errors import MissingFileError, ModelError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.gan import ImageGAN
from mmforget.models.gan_files import load_gan
from mmforget.models.generators import checkpoints
from mmforget.models.generators.checkpoints import export_like, read_checkpoint
from mmforget.models.generators.pickled_networks import read_pickled_network

LATENTS = torch.sin(torch.arange(16.0) * 1.3).reshape(2, 8) * 1.5
WIDTHS = {4: 6, 8: 6, 16: 4}


class Trap:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def persistent(state: bytes) -> bytes:
    """A pickle of {"G_ema": network} with hand-written opcodes for the state."""
    return (
        b"\x80\x04}\x8c\x05G_emactorch_utils.persistence\n_reconstruct_persistent_obj\n"
        b"}\x8c\x05state" + state + b"s\x85Rs."
    )


def rosinality(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same generator under the names, and with the factors, of rosinality's code."""
    new: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if name == "synthesis.b4.const":
            new["input.input"] = value[None]
        elif parts[1].startswith("fc"):
            new[f"style.{int(parts[1][2:]) + 1}.{parts[2]}"] = value
        elif parts[0] == "synthesis" and len(parts) > 3:
            number = {"b4": 0, "b8": 1, "b16": 2}[parts[1]]
            rest = ".".join(parts[3:]).replace("affine", "modulation")
            if parts[2] == "torgb":
                start = f"to_rgbs.{number - 1}" if number else "to_rgb1"
                if rest == "bias":
                    new[f"{start}.bias"] = value[None, :, None, None]
                else:
                    new[f"{start}.conv.{rest}"] = value[None] if rest == "weight" else value
                    if number:
                        new[f"{start}.upsample.kernel"] = weights[f"{parts[0]}.b4.resample_filter"]
                continue
            layer = 2 * (number - 1) + int(parts[2][4])
            start = f"convs.{layer}" if number else "conv1"
            if rest == "weight":
                new[f"{start}.conv.weight"] = value[None] * value[0].numel() ** 0.5
            elif rest.startswith("modulation"):
                new[f"{start}.conv.{rest}"] = value
            elif rest == "noise_strength":
                new[f"{start}.noise.weight"] = value[None]
            elif rest == "bias":
                new[f"{start}.activate.bias"] = value
            elif rest == "noise_const":
                new[f"noises.noise_{layer + 1 if number else 0}"] = value[None, None]
            elif layer % 2 == 0 and number:
                new[f"{start}.conv.blur.kernel"] = 4 * value
    return new


@pytest.fixture
def weights(stylegan2_shapes: Any, fill: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = fill(stylegan2_shapes(WIDTHS))
    return found


@pytest.fixture
def pickled(nvidia_pickle: Any, weights: dict[str, Tensor]) -> Path:
    found: Path = nvidia_pickle.write(weights, {"z_dim": 8, "synthesis_kwargs": {}})
    return found


# ---- pickles of NVIDIA's code -------------------------------------------------------------------


def test_a_pickle_is_read_bit_by_bit_without_the_code_in_it(
    pickled: Path, weights: dict[str, Tensor]
) -> None:
    before = set(sys.modules)
    found = read_pickled_network(pickled)
    assert {name.partition(".")[0] for name in set(sys.modules) - before}.isdisjoint(
        {"torch_utils", "dnnlib", "training"}
    )
    assert set(found.weights) == set(weights)
    assert all(torch.equal(found.weights[name], value) for name, value in weights.items())
    assert found.class_name == "Generator" and found.arguments["z_dim"] == 8


def test_a_planted_command_is_refused_by_name(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "trap.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Trap(trace)}))
    with pytest.raises(WeightsError, match=r"mkdir"):
        load_gan(path)
    assert not trace.exists()


def test_a_command_inside_of_a_tensor_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    inner = io.BytesIO()
    torch.save(Trap(trace), inner)
    data = inner.getvalue()
    load = (
        b"ctorch.storage\n_load_from_bytes\nB" + len(data).to_bytes(4, "little") + data + b"\x85R"
    )
    path = tmp_path / "trap.pkl"
    path.write_bytes(b"\x80\x04}\x8c\x05G_ema" + load + b"s.")
    with pytest.raises(WeightsError, match="mkdir"):
        load_gan(path)
    assert not trace.exists()


def test_unknown_names_builtins_and_tensorflow_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    for module, name in (("builtins", "eval"), ("torch_utils.ops", "anything"),
                         ("torch", "load"), ("__builtin__", "getattr")):  # fmt: skip
        path.write_bytes(f"c{module}\n{name}\n.".encode())
        with pytest.raises(WeightsError, match=name):
            read_checkpoint(path)
    path.write_bytes(b"cdnnlib.tflib.network\nNetwork\n.")
    with pytest.raises(WeightsError, match="TensorFlow"):
        read_checkpoint(path)


def test_forged_modules_and_tensors_do_not_exhaust_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "forged.pkl"
    # a module that holds itself
    path.write_bytes(
        persistent(b"}q\x00\x8c\x08_modules}\x8c\x01ah\x01ss").replace(b"R", b"Rq\x01")
    )
    with pytest.raises(WeightsError):
        read_checkpoint(path)
    # every module holds the next one twice: 2 ** 60 paths
    state = b"}"
    for _ in range(60):
        state = (
            b"}\x8c\x08_modules}(\x8c\x01actorch_utils.persistence\n_reconstruct_persistent_obj\n"
            b"}\x8c\x05state" + state + b"s\x85Rq\x02\x8c\x01bh\x02us"
        )
    path.write_bytes(persistent(state))
    with pytest.raises(WeightsError):
        read_checkpoint(path)
    # one number, and a tensor of a million million numbers on top of it
    stored = io.BytesIO()
    with warnings.catch_warnings():  # torch warns about storages, which old files hold
        warnings.simplefilter("ignore")
        torch.save(torch.zeros(1).storage(), stored)
    data = stored.getvalue()
    load = (
        b"ctorch.storage\n_load_from_bytes\nB" + len(data).to_bytes(4, "little") + data + b"\x85R"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + load
        + b"K\x00(J\x40\x42\x0f\x00J\x40\x42\x0f\x00tK\x00K\x00\x86\x89NtR"
    )
    path.write_bytes(persistent(b"}\x8c\x0b_parameters}\x8c\x01w" + tensor + b"ss"))
    with pytest.raises(WeightsError, match="larger than its data"):
        read_checkpoint(path)
    # a place in the memo that would need many gigabytes
    path.write_bytes(b"\x80\x04}r\xff\xff\xff\x7f.")
    with pytest.raises(WeightsError, match="G_ema"):
        read_checkpoint(path)


def test_damaged_large_and_missing_files_are_refused(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half.pkl"
    half.write_bytes(pickled.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot be read as a pickled network"):
        read_checkpoint(half)
    with pytest.raises(MissingFileError):
        read_checkpoint(tmp_path / "none.pkl")
    monkeypatch.setattr(checkpoints, "LARGEST", 1000)
    with pytest.raises(WeightsError, match="GiB"):
        read_checkpoint(pickled)


def test_variants_that_are_not_built_are_refused(
    nvidia_pickle: Any, weights: dict[str, Tensor]
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"synthesis_kwargs": {"architecture": "resnet"}}, "architecture"),
        ({"use_noise": False}, "use_noise"),
        ({"mapping_kwargs": {"something": 1}}, "something"),
    ]
    for arguments, name in cases:
        with pytest.raises(ModelError, match=name):
            read_checkpoint(nvidia_pickle.write(weights, arguments))
    strange = weights | {"synthesis.b8.skip.weight": torch.zeros(6, 6, 1, 1)}
    with pytest.raises(ModelError, match="skip"):
        read_checkpoint(nvidia_pickle.write(strange, {}))
    sharp = weights | {"synthesis.b8.resample_filter": torch.eye(4)}
    with pytest.raises(ModelError, match="filters"):
        read_checkpoint(nvidia_pickle.write(sharp, {}))
    with pytest.raises(WeightsError, match="G_ema"):
        read_checkpoint(nvidia_pickle.write(weights, {}, key="G"))


# ---- files of torch -----------------------------------------------------------------------------


@torch.no_grad()
def test_rosinality_and_nvidia_files_of_the_same_generator_draw_the_same(
    pickled: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = load_gan(pickled, check=False).network
    average = weights["mapping.w_avg"]
    torch.save({"g_ema": rosinality(weights), "latent_avg": average}, tmp_path / "converted.pt")
    trainer = {"g_ema": rosinality(weights), "g": {}, "args": argparse.Namespace(size=16)}
    torch.save(trainer, tmp_path / "trainer.pt")
    for name in ("converted.pt", "trainer.pt"):
        model = load_gan(tmp_path / name, check=False)
        images = expected(LATENTS)
        torch.testing.assert_close(model.network(LATENTS), images, rtol=1e-4, atol=1e-2)
        assert model.latent_spaces == ("z", "w", "w+")
    torch.testing.assert_close(
        load_gan(tmp_path / "converted.pt", check=False).network.mean_style(), average
    )
    styles = model.network.map_latents(model.draw(2000, 3).codes)
    torch.testing.assert_close(
        model.network.mean_style(), styles.mean(dim=0), rtol=0, atol=0.1 * float(styles.std())
    )


def test_state_dicts_with_known_names_are_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "a.pt")
    torch.save({"state_dict": weights}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pt", "b.pt"):
        found = read_checkpoint(tmp_path / name)
        assert found.network == "stylegan2" and found.network_args["channels"] == [6, 6, 4]


def test_incomplete_and_misshapen_state_dicts_are_refused(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({n: v for n, v in weights.items() if not n.endswith("resample_filter")}, path)
    with pytest.raises(WeightsError, match="resample_filter"):
        read_checkpoint(path)
    save_file({n: v for n, v in weights.items() if n != "mapping.fc0.weight"}, path)
    with pytest.raises(WeightsError, match=r"mapping\.fc0"):
        read_checkpoint(path)
    torch.save(rosinality(weights) | {"style.1.weight": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="shapes"):
        read_checkpoint(tmp_path / "a.pt")


def test_whole_objects_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "module.pt")
    with pytest.raises(WeightsError, match=r"Sequential.*state_dict"):
        load_gan(tmp_path / "module.pt")
    trace = tmp_path / "trace"
    torch.save({"g_ema": Trap(trace)}, tmp_path / "trap.pt")
    with pytest.raises(WeightsError, match="mkdir"):
        load_gan(tmp_path / "trap.pt")
    assert not trace.exists()


def test_other_formats_and_unknown_networks_say_what_to_do(tmp_path: Path) -> None:
    for name, what in (("a.onnx", "ONNX"), ("a.keras", "Keras"), ("a.h5", "Keras")):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(WeightsError, match=what):
            load_gan(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    with pytest.raises(WeightsError, match="TorchScript"):
        load_gan(tmp_path / "program.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ModelError, match="`network`"):
        load_gan(tmp_path / "mine.pth")
    torch.save({"GAN": {}, "version": "1.5"}, tmp_path / "model_3.pt")
    with pytest.raises(ModelError, match="lucidrains"):
        load_gan(tmp_path / "model_3.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="list"):
        load_gan(tmp_path / "list.pt")


# ---- writing ------------------------------------------------------------------------------------


def test_an_untouched_generator_is_written_bit_by_bit_under_the_names_of_the_file(
    pickled: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_gan(pickled, check=False)
    written = load_file(export_like(model, pickled, tmp_path / "new.safetensors"))
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], value) for name, value in weights.items())
    theirs = rosinality(weights)
    torch.save({"g_ema": theirs}, tmp_path / "old.pt")
    model = load_gan(tmp_path / "old.pt", check=False)
    content = torch.load(
        export_like(model, tmp_path / "old.pt", tmp_path / "new.pt"), weights_only=True
    )
    assert set(content["g_ema"]) == set(theirs)
    assert all(torch.equal(content["g_ema"][name], value) for name, value in theirs.items())


@torch.no_grad()
def test_a_changed_generator_comes_back_from_its_file_as_it_was(
    pickled: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"g_ema": rosinality(weights)}, tmp_path / "old.pt")
    for original, target in ((pickled, "new.safetensors"), (tmp_path / "old.pt", "new.pt")):
        model = load_gan(original, check=False)
        before = model.network(LATENTS)
        for parameter in model.network.parameters():
            parameter += 0.01
        again = load_gan(export_like(model, original, tmp_path / target), check=False)
        assert state_hash(again.network) == state_hash(model.network)
        assert not torch.allclose(model.network(LATENTS), before)


def test_a_generator_of_another_file_or_a_wrong_ending_is_refused(
    pickled: Path, tmp_path: Path
) -> None:
    other = ImageGAN("dcgan", {"latent_size": 8, "channels": (8, 8)})
    with pytest.raises(WeightsError, match="does not belong"):
        export_like(other, pickled, tmp_path / "new.pt")
    with pytest.raises(ModelError, match="target"):
        export_like(other, pickled, tmp_path / "new.pkl")
