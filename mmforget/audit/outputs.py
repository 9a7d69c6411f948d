"""What a model answers on a data set, computed once; all metrics are functions of these arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmforget.data.base import ImageDataset
from mmforget.errors import CapabilityError, DataError, ModelError
from mmforget.models.base import HasFeatures, HasLogits, Model, state_hash


@dataclass(frozen=True)
class Outputs:
    """Cached outputs of one model on one data set, in ascending order of the ids, on the CPU.

    Attributes:
        logits: (N, C) float32.
        features: (N, d) float32, what enters the head; None if the model does not show it.
        label: (N,) int64.
        id: (N,) int64.
    """

    logits: Tensor
    features: Tensor | None
    label: Tensor
    id: Tensor

    def __len__(self) -> int:
        return len(self.id)

    def select(self, mask: np.ndarray | Tensor) -> Outputs:
        """The samples where `mask` (N,) is True."""
        chosen = torch.as_tensor(mask)
        features = None if self.features is None else self.features[chosen]
        return Outputs(self.logits[chosen], features, self.label[chosen], self.id[chosen])

    def of(self, ids: np.ndarray) -> Outputs:
        """The samples with these ids, in ascending order."""
        return self.select(np.isin(self.id.numpy(), ids))

    @property
    def correct(self) -> Tensor:
        """(N,) bool: the label is predicted."""
        return self.logits.argmax(1) == self.label


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode and give each its own mode back; no gradients inside."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def collect(model: Model, dataset: ImageDataset, batch_size: int = 256) -> Outputs:
    """Run one model once over a data set; see `collect_all`."""
    return collect_all([model], dataset, batch_size)[0]


def collect_all(
    models: Sequence[Model], dataset: ImageDataset, batch_size: int = 256
) -> list[Outputs]:
    """Run every model once over a data set, decoding each image once.

    Full precision, eval mode (restored afterwards), no gradients. With `torch.distributed` the
    samples are divided among the processes, and every process gets the outputs of all of them.

    Args:
        models: offer `HasLogits`, and `HasFeatures` if they can.
        dataset: labelled images.
        batch_size: on each process.

    Returns:
        One `Outputs` per model, in order.

    Raises:
        CapabilityError: a model has no class scores.
        DataError: the data has no labels, or no samples.
        ModelError: a model changed its own weights or buffers while it was evaluated.
    """
    if dataset.labels is None:
        raise DataError(f"'{dataset.name}' has no labels; an audit needs labelled data")
    if not len(dataset.ids):
        raise DataError(f"'{dataset.name}' has no samples; an audit needs some")
    for model in models:
        if not isinstance(model, HasLogits):
            raise CapabilityError(
                f"the audit needs HasLogits, which {type(model).__name__} does not offer"
            )
    hashes = [state_hash(model) for model in models]
    world, rank = _world()
    positions = np.arange(len(dataset.ids))[rank::world]
    parts: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in models]
    for start in range(0, len(positions), batch_size):
        batch = dataset[positions[start : start + batch_size].tolist()]
        for model, found in zip(models, parts, strict=True):
            found.append(_forward(model, batch["image"]))
    for model, before in zip(models, hashes, strict=True):
        if state_hash(model) != before:
            raise ModelError(
                f"{type(model).__name__} changed its weights or buffers while it was evaluated; "
                "its forward pass must not do so in eval mode"
            )
    return [_assemble(found, dataset, positions, world) for found in parts]


def _forward(model: Model, image: Tensor) -> tuple[Tensor, Tensor | None]:
    device = model.device
    batch = {"image": image.to(device)}
    with evaluating(model), torch.autocast(device.type, enabled=False):
        features = model.features(batch) if isinstance(model, HasFeatures) else None
        assert isinstance(model, HasLogits)  # checked by the caller
        logits = model.logits(batch, features=features)
    shown = None if features is None else features.float().cpu()
    return logits.float().cpu(), shown


def _assemble(
    parts: list[tuple[Tensor, Tensor | None]],
    dataset: ImageDataset,
    positions: np.ndarray,
    world: int,
) -> Outputs:
    logits = torch.cat([part[0] for part in parts]) if parts else None
    features = [part[1] for part in parts if part[1] is not None]
    own = (positions, logits, torch.cat(features) if features else None)
    gathered: list[tuple[np.ndarray, Tensor | None, Tensor | None]] = [own]
    if world > 1:
        gathered = [own] * world
        torch.distributed.all_gather_object(gathered, own)
    places = np.concatenate([part[0] for part in gathered])
    order = torch.as_tensor(np.argsort(dataset.ids[places], kind="stable"))
    logit_parts = [part[1] for part in gathered if part[1] is not None]
    feature_parts = [part[2] for part in gathered if part[2] is not None]
    ordered = places[order.numpy()]
    assert dataset.labels is not None  # refused by the caller
    return Outputs(
        logits=torch.cat(logit_parts)[order],
        features=torch.cat(feature_parts)[order] if feature_parts else None,
        label=torch.as_tensor(dataset.labels[ordered]).long(),
        id=torch.as_tensor(dataset.ids[ordered]).long(),
    )


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
