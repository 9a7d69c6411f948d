"""What a model offers to forgetting methods: small protocols, checked at run time.

A method names in `requires` the capabilities that it needs; a model offers one by having its
methods. A model never knows a method, and a method never names a concrete model class.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mmforget.errors import CapabilityError

Batch = Mapping[str, Any]
"""A batch: ``image`` (B, 3, H, W) float in [0, 1]; ``label`` (B,) int64, absent where a method may
not read labels; ``id`` (B,) int64; ``weight`` (B,) float, 1 for a sample and 0 for the padding that
makes the batches of several processes equally long."""

SiteKind = Literal["ffn", "attention", "all"]


class Site(NamedTuple):
    """One weight layer inside a network.

    Attributes:
        name: qualified name, valid for `torch.nn.Module.get_submodule` on `Sites.network`.
        module: the layer (`nn.Linear` or `nn.Conv2d`).
        block: qualified name of the block it belongs to; the layers of one block form one group.
    """

    name: str
    module: nn.Module
    block: str


@runtime_checkable
class HasLoss(Protocol):
    """The family's own training loss, one value per sample."""

    def loss(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B,) losses. `features` of the same batch, if given, spare the forward pass."""
        ...


@runtime_checkable
class HasLogits(Protocol):
    """Class scores."""

    num_classes: int

    def logits(self, batch: Batch, features: Tensor | None = None) -> Tensor:
        """Return (B, C) logits. `features` of the same batch, if given, spare the forward pass."""
        ...


@runtime_checkable
class HasFeatures(Protocol):
    """The representation that enters the head."""

    num_features: int

    def features(self, batch: Batch) -> Tensor:
        """Return (B, d) features, before any head dropout."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """The last layer, which maps features to class scores."""

    @property
    def head(self) -> nn.Module:
        """The head; methods that forget in the features keep it frozen."""
        ...


@runtime_checkable
class Sites(Protocol):
    """Layers of the network by their function."""

    network: nn.Module

    def sites(self, kind: SiteKind) -> list[Site]:
        """Return the layers in forward order; raise `CapabilityError` if there is none."""
        ...


class Model(LightningModule):
    """Base of all model families: a Lightning module that owns one native `network`."""

    network: nn.Module

    @abstractmethod
    def save_native(self, folder: Path) -> None:
        """Write the weights in the format of the library that owns the network.

        Args:
            folder: an existing, empty folder.
        """

    @abstractmethod
    def fresh(self, seed: int) -> Self:
        """Build the same architecture with newly drawn weights, none of them inherited.

        Raises:
            ModelError: the network was given as an object, so nobody knows how it is built.
        """


def check_capabilities(method: str, model: nn.Module, requires: tuple[type, ...]) -> None:
    """Refuse a model that lacks what a method needs.

    Raises:
        CapabilityError: names the method, the model and everything that is missing.
    """
    missing = [need.__name__ for need in requires if not isinstance(model, need)]
    if missing:
        raise CapabilityError(
            f"{method} needs {' and '.join(missing)}, which {type(model).__name__} does not offer; "
            "choose another method (`mmforget list methods`) or implement the protocol"
        )


def state_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
