"""One low-rank adapter per request: apply it to another copy of the model, or withdraw it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmforget.errors import MissingFileError, WeightsError
from mmforget.models.base import Sites


def apply_adapter(model: Sites, folder: Path | str) -> None:
    """Add the change of one request to the weights: ``W + s B A`` at every adapted layer.

    Args:
        model: a model of the architecture that the adapter was made for; edited in place.
        folder: a peft adapter folder (`adapter_config.json`, `adapter_model.safetensors`).

    Raises:
        MissingFileError: the folder or one of its files does not exist.
        WeightsError: a tensor is missing, unknown, not finite, or of another shape; the model is
            not changed then.
    """
    _add(model, Path(folder), +1.0)


def withdraw_adapter(model: Sites, folder: Path | str) -> None:
    """Subtract the change of one request: the model then remembers what that request erased.

    The other requests of a sequence stay in force, since their changes add up.

    Args:
        model: a model whose weights contain the adapter; edited in place, exact to rounding.
        folder: a peft adapter folder.

    Raises:
        MissingFileError, WeightsError: see `apply_adapter`.
    """
    _add(model, Path(folder), -1.0)


@torch.no_grad()
def _add(model: Sites, folder: Path, sign: float) -> None:
    for layer, delta in adapter_deltas(model.network, folder):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        change = sign * delta.to(weight.device, torch.float32)
        weight.copy_((weight.float() + change).to(weight.dtype))


def adapter_deltas(network: nn.Module, folder: Path) -> list[tuple[nn.Module, Tensor]]:
    """Read an adapter and compute the weight change of every layer, checking each tensor first.

    Returns:
        Pairs of a layer of `network` and the change of its weight, in float32.

    Raises:
        MissingFileError, WeightsError: see `apply_adapter`.
    """
    config, tensors = _read(folder)
    scale = config["lora_alpha"] / config["r"]
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = sorted(k[len(prefix) : -len(suffix)] for k in tensors if k.endswith(suffix))
    expected = {f"{prefix}{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if not names or set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise WeightsError(f"the adapter '{folder}' has missing or unknown tensors: {odd[:3]}")
    deltas = []
    for name in names:
        try:
            layer = network.get_submodule(name)
        except AttributeError as error:
            raise WeightsError(
                f"the adapter '{folder}' changes the layer '{name}', which the model does not "
                "have; it was made for another architecture"
            ) from error
        a = tensors[f"{prefix}{name}.lora_A.weight"].float()
        b = tensors[f"{prefix}{name}.lora_B.weight"].float()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if (b.shape[0], a[0].numel(), b.shape[1]) != (
            weight.shape[0],
            weight[0].numel(),
            a.shape[0],
        ):
            raise WeightsError(
                f"the adapter '{folder}' does not fit the layer '{name}': A {tuple(a.shape)} and "
                f"B {tuple(b.shape)} for a weight {tuple(weight.shape)}"
            )
        delta = scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
        if not torch.isfinite(delta).all():
            raise WeightsError(f"the adapter '{folder}' has non-finite values at '{name}'")
        deltas.append((layer, delta))
    return deltas


def _read(folder: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    paths = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in paths:
        if not path.is_file():
            raise MissingFileError(f"no adapter at '{folder}': '{path.name}' is missing")
    try:
        return json.loads(paths[0].read_text()), load_file(paths[1])
    except (json.JSONDecodeError, SafetensorError) as error:
        raise WeightsError(f"the adapter '{folder}' is corrupted ({error})") from error
