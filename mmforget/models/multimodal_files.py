"""Build, read and save multimodal language models in the format of transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmforget.errors import MissingFileError, ModelError, WeightsError
from mmforget.models import native
from mmforget.models.classifier import HUB_ID
from mmforget.models.multimodals.base import has_adapters, supported

Dtype = Literal["float32", "bfloat16", "float16", "auto"]

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a hub repository that are needed: weights, tokenizer, chat template."""


def model_types() -> tuple[str, ...]:
    """The values of ``model_type`` that are supported."""
    return tuple(supported().split(", "))


def is_multimodal(folder: Path) -> bool:
    """Whether a folder holds a multimodal language model of a supported family."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return isinstance(config, dict) and config.get("model_type") in model_types()


def located(source: str | Path) -> Path:
    """The folder of a source, downloaded if it is a hub id.

    Raises:
        MissingFileError: there is no such folder or hub id.
        ModelError: the folder holds another kind of model.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise MissingFileError(
                f"there is no folder '{source}'; give a folder, or a hub id of the form "
                "'owner/name'"
            )
        path = native.hub_folder(str(source), FILES)
    if not is_multimodal(path):
        raise ModelError(
            f"'{source}' holds no multimodal language model that mmforget knows; its config.json "
            f"must name one of these as `model_type`: {supported()}"
        )
    return path


def build(folder: Path, pretrained: bool, dtype: Dtype) -> tuple[Any, Any]:
    """The network and the processor of a folder.

    Args:
        folder: saved by transformers.
        pretrained: read the weights; False draws new ones.
        dtype: of the weights; ``auto`` takes what the folder says.

    Raises:
        WeightsError: weights are missing, damaged, do not fit, or would execute code.
        ModelError: the configuration or the processor cannot be read.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        config = AutoConfig.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"transformers cannot read configuration and processor in '{folder}': "
            f"{_first_line(error)}"
        ) from error
    if not pretrained:
        network = AutoModelForImageTextToText.from_config(config)
        return network if dtype == "auto" else network.to(getattr(torch, dtype)), processor
    try:
        read: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        network, report = read
    except Exception as error:  # safetensors raises its own kind, which has no public base
        raise WeightsError(
            f"the weights in '{folder}' cannot be read: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    unknown = sorted(report["unexpected_keys"])
    unfit = sorted(str(key) for key in report["mismatched_keys"])
    for kind, names in (("lack", missing), ("have unknown", unknown), ("do not fit", unfit)):
        if names:  # transformers only prints a table, and goes on with random weights
            raise WeightsError(
                f"the weights in '{folder}' {kind} {len(names)} tensors, first {names[0]}; they "
                "belong to another configuration"
            )
    return network, processor


def fresh(network: Any) -> nn.Module:
    """The same architecture with newly drawn weights, on the CPU.

    Raises:
        ModelError: the network carries adapters.
    """
    if has_adapters(network):
        raise ModelError("a network with adapters cannot be built anew; merge them first")
    built: nn.Module = type(network)(copy.deepcopy(network.config))
    return built


def save(network: Any, processor: Any, folder: Path) -> None:
    """Write weights, configuration, tokenizer and image processor.

    Raises:
        ModelError: the network carries adapters that are not merged.
    """
    if has_adapters(network):
        raise ModelError("the network carries adapters; merge them before it is saved")
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


def check_device(network: nn.Module) -> None:
    """Refuse half precision on the CPU, which most layers lack there.

    Raises:
        ModelError: names the remedy.
    """
    first: torch.Tensor = next(network.parameters())
    if first.dtype == torch.float16 and first.is_cpu:
        raise ModelError(
            "the network has weights of float16 on the CPU, where they cannot be computed with; "
            "load it with dtype 'float32' or 'bfloat16', or move it to a GPU"
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
