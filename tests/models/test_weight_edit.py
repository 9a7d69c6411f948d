"""Weight edits: files, LoRA for diffusers and kohya, application, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmforget.errors import ConfigurationError, MissingFileError, WeightsError
from mmforget.models.base import state_hash
from mmforget.models.diffusion import DiffusionGenerator
from mmforget.models.weight_edit import LORA_FILE, WeightEdit, load_lora
from mmforget.testing.tiny_pipelines import tiny_pipeline

KINDS = ("sd", "sdxl", "sd3", "sd35", "flux")


def edit_of(model: DiffusionGenerator, seed: int = 0, **metadata: Any) -> WeightEdit:
    """Random factors for all text layers, of rank 2 and, for the first layer, 3."""
    draw = torch.Generator().manual_seed(seed)
    factors, widths = {}, {}
    for number, layer in enumerate(model.text_layers()):
        rank = 3 if number == 0 else 2
        up = 0.2 * torch.randn(layer.module.out_features, rank, generator=draw)
        down = 0.2 * torch.randn(rank, layer.columns, generator=draw)
        factors[layer.name] = up, down
        widths[layer.name] = layer.module.in_features
    facts = {"family": model.family.name, "widths": widths, **metadata}
    return WeightEdit(model.component, factors, {}, facts)


@torch.no_grad()
def answer(model: DiffusionGenerator) -> torch.Tensor:
    return model.predict(
        model.noise(["x"], 2, 0), torch.tensor(400), model.encode(["a cat", "a red house"])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_lora_in_diffusers_equals_dense_edit(kind: Any, tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline(kind))
    pipe, plain, edit = model.pipeline, answer(model), edit_of(model)
    edited = DiffusionGenerator(tiny_pipeline(kind))
    edit.apply(edited)
    dense = answer(edited)
    assert (dense - plain).abs().max() > 1e-3
    edit.save_lora(tmp_path)

    pipe.load_lora_weights(str(tmp_path), adapter_name="edit")
    assert torch.allclose(answer(model), dense, atol=1e-5)
    pipe.set_adapters("edit", 0.5)
    half = DiffusionGenerator(tiny_pipeline(kind))
    edit.apply(half, scale=0.5)
    assert torch.allclose(answer(model), answer(half), atol=1e-5)
    pipe.disable_lora()
    assert torch.equal(answer(model), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_comes_back(kind: Any, tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline(kind))
    edit = edit_of(model)
    dense_model = DiffusionGenerator(tiny_pipeline(kind))
    edit.apply(dense_model)
    file = edit.save_lora(tmp_path, naming="kohya")
    names = load_file(file)
    assert all(name.startswith("lora_unet_") and "." in name for name in names)
    assert {name.split(".", 1)[1] for name in names} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    found = WeightEdit.load(file)
    assert set(found.factors) == set(edit.factors)
    for name, (up, down) in edit.factors.items():
        assert torch.allclose(found.factors[name][0], up, rtol=1e-6)
        assert torch.equal(found.factors[name][1][:, : down.shape[1]], down)

    # Without our header, as other programs write it, the model's names resolve the layers.
    bare = tmp_path / "bare.safetensors"
    save_file(names, bare)
    with pytest.raises(WeightsError, match="pass `model`"):
        WeightEdit.load(bare)
    assert set(WeightEdit.load(bare, model).factors) == set(edit.factors)
    load_lora(model, bare)
    assert torch.allclose(answer(model), answer(dense_model), atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_loads_kohya_of_unets(kind: Any, tmp_path: Path) -> None:
    model, dense_model = (DiffusionGenerator(tiny_pipeline(kind)) for _ in range(2))
    edit = edit_of(model)
    edit.apply(dense_model)
    edit.save_lora(tmp_path, naming="kohya")
    model.pipeline.load_lora_weights(str(tmp_path))
    assert torch.allclose(answer(model), answer(dense_model), atol=1e-5)


def test_two_loras_stack(tmp_path: Path) -> None:
    model, dense_model = (DiffusionGenerator(tiny_pipeline("sd")) for _ in range(2))
    one, two = edit_of(model, 1), edit_of(model, 2)
    for edit in (one, two):
        edit.apply(dense_model)
    one.save_lora(tmp_path / "one")
    two.save(tmp_path / "two")
    load_lora(model, tmp_path / "one", "one")
    load_lora(model, tmp_path / "two", "two")
    model.pipeline.set_adapters(["one", "two"], [1.0, 1.0])
    assert torch.allclose(answer(model), answer(dense_model), atol=1e-5)
    with pytest.raises(ConfigurationError, match="taken"):
        load_lora(model, tmp_path / "two", "two")


def test_alpha_is_scale(tmp_path: Path) -> None:
    model, dense_model = (DiffusionGenerator(tiny_pipeline("sd")) for _ in range(2))
    edit = edit_of(model)
    names = load_file(edit.save_lora(tmp_path, naming="kohya"))
    save_file(
        {k: v / 2 if k.endswith("alpha") else v for k, v in names.items()},
        tmp_path / "half.safetensors",
    )
    edit.apply(dense_model, scale=0.5)
    WeightEdit.load(tmp_path / "half.safetensors", model).apply(model)
    assert torch.allclose(answer(model), answer(dense_model), atol=1e-6)


def test_file_keeps_everything(tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline("sdxl"))
    edit = edit_of(model, concepts=[{"target": "Van Gogh — naïve"}], base_hash="0")
    found = WeightEdit.load(edit.save(tmp_path))
    assert found.metadata == edit.metadata
    assert found.component == "unet" and found.kind == "lora"
    for name, pair in edit.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, found.factors[name], strict=True))


def test_shared_factor_is_stored_once(tmp_path: Path) -> None:
    down = torch.randn(2, 32)
    edit = WeightEdit("unet", {name: (torch.randn(4, 2), down) for name in "abc"})
    assert edit.size_bytes == 4 * (3 * 8 + 64)
    found = WeightEdit.load(edit.save(tmp_path))
    assert found.size_bytes == edit.size_bytes
    assert all(torch.equal(pair[1], down) for pair in found.factors.values())


def test_replace_round_trip_and_scale(tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    changed = {n: before[n] + 1 for n in ("conv_in.weight", "conv_in.bias")}
    edit = WeightEdit("unet", tensors=changed, metadata={"base_hash": state_hash(model.network)})
    loaded = WeightEdit.load(edit.save(tmp_path / "a.safetensors"))
    loaded.apply(model.pipeline)
    assert torch.equal(model.network.conv_in.bias, changed["conv_in.bias"])
    assert torch.equal(model.network.conv_out.weight, before["conv_out.weight"])
    with pytest.raises(WeightsError, match="another base"):
        loaded.apply(model.pipeline)
    model.network.load_state_dict(before)
    loaded.apply(model.network, scale=0.25)
    assert torch.allclose(model.network.conv_in.weight, before["conv_in.weight"] + 0.25)
    with pytest.raises(ConfigurationError, match="to_lora"):
        loaded.save_lora(tmp_path)


def test_apply_and_take_back_in_half_precision() -> None:
    model = DiffusionGenerator(tiny_pipeline("sd").to(torch.float16))
    before = copy.deepcopy(model.network.state_dict())
    edit = edit_of(model)
    edit.apply(model)
    name = model.text_layers()[0].name
    up, down = edit.factors[name]
    want = (before[f"{name}.weight"].double() + up.double() @ down.double()).half()
    assert torch.equal(model.network.get_parameter(f"{name}.weight"), want)
    huge = WeightEdit("unet", {name: (up * 1e6, down * 1e6)})
    with pytest.raises(WeightsError, match="not finite in float16"):
        huge.apply(model)
    assert torch.equal(model.network.get_parameter(f"{name}.weight"), want)


@torch.no_grad()
@pytest.mark.parametrize("rank,exact", [(2, True), (1, False)])
def test_to_lora_reports_its_error(rank: int, exact: bool) -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    draw = torch.Generator().manual_seed(0)
    dense, name = {}, model.text_layers()[0].name + ".weight"
    for key in (name, "conv_in.weight"):
        weight = model.network.get_parameter(key).detach()
        flat = weight.flatten(1)
        shift = torch.randn(len(flat), 2, generator=draw) @ torch.randn(
            2, flat.shape[1], generator=draw
        )
        dense[key] = weight + shift.reshape(weight.shape)
    edit = WeightEdit("unet", tensors=dense)
    lora = edit.to_lora(model, rank)
    assert lora.rank == rank
    other = DiffusionGenerator(tiny_pipeline("sd"))
    lora.apply(other)
    missing = sum(
        float((other.network.get_parameter(k) - v).square().sum()) for k, v in dense.items()
    )
    total = sum(
        float((model.network.get_parameter(k) - v).square().sum()) for k, v in dense.items()
    )
    assert lora.metadata["relative_error"] == pytest.approx((missing / total) ** 0.5, abs=1e-5)
    assert (lora.metadata["relative_error"] < 1e-5) is exact


def test_lora_of_a_convolution_loads(tmp_path: Path) -> None:
    model, dense_model = (DiffusionGenerator(tiny_pipeline("sd")) for _ in range(2))
    weight = model.network.conv_in.weight.detach()
    shift = torch.randn(len(weight), 1) @ torch.randn(1, weight[0].numel())
    lora = WeightEdit("unet", tensors={"conv_in.weight": weight + shift.reshape(weight.shape)})
    lora = lora.to_lora(model, 1)
    lora.apply(dense_model)
    lora.save_lora(tmp_path)
    load_lora(model, tmp_path)
    assert torch.allclose(answer(model), answer(dense_model), atol=1e-5)


def test_bias_has_no_low_rank_form() -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    bias = model.network.conv_in.bias.detach() + 1
    with pytest.raises(WeightsError, match=r"conv_in\.bias.*low-rank"):
        WeightEdit("unet", tensors={"conv_in.bias": bias}).to_lora(model, 1)


def test_another_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    edit = edit_of(model, base_hash=state_hash(model.network))
    other = DiffusionGenerator(tiny_pipeline("sd", seed=1))
    before = state_hash(other.network)
    edit.save_lora(tmp_path)
    for use in (lambda: edit.apply(other), lambda: load_lora(other, tmp_path)):
        with pytest.raises(WeightsError, match="another base"):
            use()
    assert state_hash(other.network) == before
    edit.apply(other, check_base=False)
    assert state_hash(other.network) != before


@pytest.mark.parametrize("change", ["unknown", "shape", "component"])
def test_what_does_not_fit_is_named(change: str, tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    edit = edit_of(model)
    first = next(iter(edit.factors))
    if change == "unknown":
        edit.factors["mid_block.nothing"] = edit.factors[first]
        wrong = "mid_block.nothing"
    elif change == "shape":
        up, down = edit.factors[first]
        edit.factors[first] = up[:-1], down
        wrong = first
    else:
        edit.component, wrong = "transformer", "transformer"
    before = state_hash(model.network)
    edit.save_lora(tmp_path)
    for use in (lambda: edit.apply(model.pipeline), lambda: load_lora(model, tmp_path)):
        with pytest.raises(WeightsError, match=wrong) as caught:
            use()
        assert "another base" in str(caught.value) and "\n" not in str(caught.value)
    assert state_hash(model.network) == before


def test_load_lora_passes_text_encoders_to_diffusers(tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    encoder = model.pipeline.text_encoder
    name = next(n for n, _ in encoder.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    tensors = edit_of(model).lora_state_dict()
    tensors[f"text_encoder.{name}.lora_A.weight"] = torch.randn(2, 32)
    tensors[f"text_encoder.{name}.lora_B.weight"] = torch.randn(32, 2)
    save_file(tensors, tmp_path / "both.safetensors")
    plain = model.encode(["a cat"]).states
    load_lora(model, tmp_path / "both.safetensors", "both")
    assert not torch.equal(model.encode(["a cat"]).states, plain)
    model.pipeline.unload_lora_weights()

    tensors["text_encoder.nothing.lora_A.weight"] = torch.randn(2, 32)
    tensors["text_encoder.nothing.lora_B.weight"] = torch.randn(32, 2)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(WeightsError, match="nothing"):
        load_lora(model, tmp_path / "odd.safetensors", "odd")


def test_broken_files(tmp_path: Path) -> None:
    model = DiffusionGenerator(tiny_pipeline("sd"))
    file = edit_of(model).save(tmp_path)
    content = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: len(content) // 2])
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"a": 1}))
    newer = tmp_path / "newer.safetensors"
    newer.write_bytes(content.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'))
    renamed = tmp_path / "renamed.safetensors"
    tensors = load_file(file)
    tensors["a typo"] = tensors.pop(next(iter(tensors)))
    with safe_open(file, "pt") as opened:
        save_file(tensors, renamed, metadata=opened.metadata())
    for path, word in (
        (cut, "intact"),
        (pickled, "intact"),
        (tmp_path / "weights.pt", "never opened"),
        (newer, "format version 9"),
        (renamed, "a typo"),
    ):
        with pytest.raises(WeightsError, match=word) as caught:
            WeightEdit.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(MissingFileError, match="check the path"):
        WeightEdit.load(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match=r"lora_B.*missing"):
        half = {k: v for k, v in edit_of(model).lora_state_dict().items() if "lora_A" in k}
        save_file(half, tmp_path / "half.safetensors")
        WeightEdit.load(tmp_path / "half.safetensors")


def test_empty_edit_and_unknown_naming(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="change nothing"):
        WeightEdit("unet")
    edit = WeightEdit("unet", {"a": (torch.ones(2, 1), torch.ones(1, 2))})
    with pytest.raises(ConfigurationError, match="kohya"):
        edit.save_lora(tmp_path, naming="kohja")  # type: ignore[arg-type]
    assert not (tmp_path / LORA_FILE).exists()
