"""Where the class enters a conditional generator: the rows of its tables, one per class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmforget.errors import CapabilityError
from mmforget.models.base import Latents, frozen

TRIED = 4
"""Pictures that are drawn to see which layers read the class."""


@dataclass(frozen=True)
class ClassTable:
    """A layer that reads the class and nothing else in some of its weights.

    Attributes:
        name: qualified name of the layer in the network.
        module: the layer, with a `weight`.
        axis: of the weight, along which the classes lie.
        first: position of class 0 along it; others precede where latent and class are concatenated.
        classes: how many there are.
    """

    name: str
    module: nn.Module
    axis: int
    first: int
    classes: int

    @property
    def parameter(self) -> str:
        """Qualified name of the weight in the network."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def rows(self) -> Tensor:
        """One row per class, (K, numbers); detached."""
        weight: Any = self.module.weight
        part = weight.detach().narrow(self.axis, self.first, self.classes)
        return part.movedim(self.axis, 0).flatten(1)

    @torch.no_grad()
    def write(self, number: int, row: Tensor) -> None:
        """Replace the row of a class, in place."""
        weight: Any = self.module.weight
        place = weight.select(self.axis, self.first + number)
        place.copy_(row.view_as(place))


def class_tables(model: Any) -> list[ClassTable]:
    """Find the layers that read the class, by drawing some pictures and looking at what they read.

    These are `nn.Embedding` layers that read labels, and linear and convolutional layers that read
    one-hot labels, alone or beside something else. Layers whose weight is computed from another one
    (spectral normalisation) are not among them: a row of theirs cannot be replaced by itself.

    Args:
        model: a generator with `num_classes`, such as `ImageGAN`; nothing of it changes.

    Raises:
        CapabilityError: there are no classes, or no such layer.
    """
    count = int(getattr(model, "num_classes", 0))
    who = type(model.network).__name__
    if count < 2:
        raise CapabilityError(
            f"{who} has {count} classes; this needs a conditional generator with at least 2 "
            "(`num_classes`)"
        )
    labels = torch.arange(TRIED) * max(1, count // TRIED) % count
    found: dict[str, ClassTable] = {}
    with ExitStack() as stack, torch.no_grad(), frozen(model.network):
        for name, module in model.network.named_modules():
            if isinstance(module._parameters.get("weight"), nn.Parameter):
                hook = _looking(found, name, labels, count)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        latents = model.draw(TRIED, 0, labels=labels, purpose="-class-tables")
        model.synthesise(latents)
    if not found:
        raise CapabilityError(
            f"no layer of {who} reads the class as a label or as a one-hot row with a weight of "
            "its own; fold parametrizations such as spectral normalisation into the weights first"
        )
    return list(found.values())


def _looking(found: dict[str, ClassTable], name: str, labels: Tensor, count: int) -> Any:
    """A hook that notes a layer if it reads the class."""

    def look(module: Any, args: tuple[Any, ...]) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if given is None or len(given) != len(labels):
            return
        if isinstance(module, nn.Embedding):
            if given.shape == labels.shape and torch.equal(given.cpu(), labels):
                found[name] = ClassTable(name, module, 0, 0, count)
            return
        axis = 0 if isinstance(module, nn.ConvTranspose2d) else 1
        weight = module.weight
        if given.ndim not in (2, 4) or weight.ndim not in (2, 4):
            return
        if weight.shape[axis] != given.shape[1] or given.shape[1] < count:
            return
        hot = nn.functional.one_hot(labels, count).to(given)
        for first in {0, given.shape[1] - count}:
            part = given[:, first : first + count]
            if torch.equal(part, hot[(..., *[None] * (given.ndim - 2))].expand_as(part)):
                found[name] = ClassTable(name, module, axis, first, count)

    return look


@contextmanager
def mixed_classes(tables: list[ClassTable], mixture: Tensor) -> Iterator[None]:
    """Let a generator draw mixtures of its classes for a while, whatever labels it is given.

    Args:
        tables: of the generator.
        mixture: (B, K) weights of the classes, of any sign.
    """
    with ExitStack() as stack:
        for table in tables:
            if isinstance(table.module, nn.Embedding):
                hook = _looked_up(mixture)
                stack.callback(table.module.register_forward_hook(hook).remove)
            else:
                before = _read(table, mixture)
                stack.callback(table.module.register_forward_pre_hook(before).remove)
        yield


def _looked_up(mixture: Tensor) -> Any:
    def look_up(module: Any, args: tuple[Any, ...], found: Tensor) -> Tensor:
        mixed: Tensor = mixture.to(found) @ module.weight[: mixture.shape[1]]
        return mixed

    return look_up


def _read(table: ClassTable, mixture: Tensor) -> Any:
    def read(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given, spread = args[0], mixture.to(args[0])[(..., *[None] * (args[0].ndim - 2))]
        end = table.first + table.classes
        middle = spread.expand(-1, -1, *given.shape[2:])
        return (torch.cat([given[:, : table.first], middle, given[:, end:]], dim=1), *args[1:])

    return read


def same_classes(latents: Latents, number: int) -> Latents:
    """The same latents, all of one class."""
    return Latents(latents.codes, torch.full((len(latents),), number), latents.space)
