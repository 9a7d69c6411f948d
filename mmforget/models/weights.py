"""Read weights without executing code, and put them into a network only if all of them fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmforget.errors import MissingFileError, WeightsError

WRAPPERS = ("network.", "module.", "_orig_mod.", "model.")
"""Prefixes put before every name by our Lightning checkpoints, data parallelism, compilation and
other people's Lightning modules."""

ADAPTER_MARKS = ("lora_", "base_model.model.")


def read_weights(path: str | Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a file of named tensors on the CPU.

    Args:
        path: a ``.safetensors`` file, or a file written by `torch.save`: a state dict, or a
            checkpoint that holds one under ``state_dict`` or ``model``.
        allow_pickle: execute the code in a pickle. Only for files from a source you trust.

    Raises:
        MissingFileError: there is no such file.
        WeightsError: the file is damaged, holds something other than tensors, or executes code.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no weights file '{path}'; check the path")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(
                f"'{path}' is no intact safetensors file ({error}); copy or download it again"
            ) from error
    return _plain_tensors(path, _unpickle(path, allow_pickle))


def _unpickle(path: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"'{path}' is damaged or would execute code when loaded, so it was not loaded; ask for "
            "a safetensors file, or set `allow_pickle=True` if you trust whoever made it"
        ) from error
    except (RuntimeError, EOFError, ValueError, AttributeError, ImportError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"'{path}' cannot be read as weights ({reason}); copy or download it again"
        ) from error


def _plain_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise WeightsError(
            f"'{path}' holds a {type(content).__name__} and not named tensors; save "
            "`network.state_dict()`"
        )
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"'{path}' holds '{strange[0]}', which is not a tensor; save `network.state_dict()`"
        )
    return content


def put_weights(network: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Replace all weights of a network; nothing is replaced if anything does not fit.

    Args:
        network: the network, changed in place.
        weights: named tensors from `read_weights`. Prefixes that a wrapper has put before every
            name are ignored.
        source: where they come from, for messages.

    Raises:
        WeightsError: names, shapes or values do not fit.
    """
    given = without_wrapper(weights, network)
    expected = network.state_dict()
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        if any(mark in name for name in unexpected for mark in ADAPTER_MARKS):
            raise WeightsError(
                f"'{source}' holds an adapter ('{unexpected[0]}'), not full weights; load the base "
                "model and put the adapter on it"
            )
        raise WeightsError(
            f"'{source}' does not fit {type(network).__name__}: {len(missing)} names are missing"
            f"{_first(missing)}, {len(unexpected)} are unknown{_first(unexpected)}; build the "
            "network with the name and arguments it was trained with"
        )
    for name, value in expected.items():
        if given[name].shape != value.shape:
            raise WeightsError(
                f"'{source}' does not fit {type(network).__name__}: '{name}' has shape "
                f"{tuple(given[name].shape)}, the network needs {tuple(value.shape)}; check "
                "`num_classes` and the network's arguments"
            )
        if given[name].is_floating_point() and not torch.isfinite(given[name]).all():
            raise WeightsError(
                f"'{source}' has values in '{name}' that are not finite; use an earlier checkpoint"
            )
    # `expected` holds version numbers of layers, which safetensors files do not
    expected.update({name: given[name] for name in expected})
    network.load_state_dict(expected)


def without_wrapper(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Drop prefixes that the network itself does not use."""
    expected = network.state_dict()
    changed = True
    while changed:
        changed = False
        for prefix in WRAPPERS:
            known = any(name.startswith(prefix) for name in expected)
            if not known and any(name.startswith(prefix) for name in weights):
                # what lies beside the wrapped network (metrics, normalisation) is not its own
                weights = {
                    name.removeprefix(prefix): value
                    for name, value in weights.items()
                    if name.startswith(prefix)
                }
                changed = True
    return weights


def _first(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def write_weights(network: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write all weights as safetensors; tensors that share memory are written one by one.

    Tied weights are thus stored twice, which lets every library load the file with the names it
    expects. Values are those of the network, whatever its device or layout in memory.
    """
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen or tensor._base is not None:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    save_file(plain, path, metadata={"format": "pt", **(metadata or {})})
