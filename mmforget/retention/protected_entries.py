"""Entries of weight matrices that shall stay, and what a change of a matrix does to them.

A change is either the product of two low-rank factors, whose entries are computed one by one
without the product ever being formed, or the difference to the weights before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmforget.errors import ConfigurationError, MissingFileError, ModelError, WeightsError

CHUNK = 2**16
"""Entries of a matrix that are computed at once."""


class LowRank(NamedTuple):
    """The change ``B A`` of a matrix, without the scale of the adapter.

    Attributes:
        b: (out, rank).
        a: (rank, in).
    """

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.b.shape[0], self.a.shape[1]

    def entries(self, index: Tensor) -> Tensor:
        """(n,) entries of the product at flat places (n,), in fp32."""
        rows, columns = index // self.a.shape[1], index % self.a.shape[1]
        return (self.b[rows].float() * self.a.T[columns].float()).sum(dim=1)

    def rows(self, first: int, last: int) -> Tensor:
        """(last - first, in) rows of the product, in fp32."""
        return self.b[first:last].float() @ self.a.float()


class Difference(NamedTuple):
    """The change of a matrix that is trained itself.

    Attributes:
        weight: (out, in) as it is.
        before: (out, in) as it was; may lie on another device.
    """

    weight: Tensor
    before: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.weight.shape[0], self.weight.shape[1]

    def entries(self, index: Tensor) -> Tensor:
        """(n,) entries of the difference at flat places (n,), in fp32."""
        before = self.before.flatten()[index.to(self.before.device)].to(self.weight.device)
        return self.weight.flatten()[index].float() - before.float()

    def rows(self, first: int, last: int) -> Tensor:
        """(last - first, in) rows of the difference, in fp32."""
        before = self.before[first:last].to(self.weight.device)
        return self.weight[first:last].float() - before.float()


Change = LowRank | Difference


@torch.no_grad()
def largest_entries(change: Change, share: float, chunk: int = CHUNK) -> Tensor:
    """Flat places of the entries that a change has moved most.

    Args:
        change: of one matrix.
        share: of its entries, above 0 and at most 1; at least one entry.
        chunk: entries that are looked at together.

    Returns:
        (n,) int64 in increasing order; an entry that has not moved is never among them.
    """
    height, width = change.shape
    wanted = max(1, int(share * height * width))
    step = max(1, chunk // width)
    best, places = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for first in range(0, height, step):
        sizes = change.rows(first, min(first + step, height)).abs().flatten()
        here = torch.arange(len(sizes), device=sizes.device) + first * width
        sizes, here = torch.cat([best.to(sizes), sizes]), torch.cat([places.to(here), here])
        best, order = sizes.topk(min(wanted, len(sizes)))
        places = here[order]
    return places[best > 0].sort().values.cpu()


class ProtectedEntries:
    """A set of entries per matrix; the union over all tasks that were added.

    Args:
        places: per name of a layer its flat places, int64 in increasing order.
        shapes: per name the shape (out, in) of its matrix.
    """

    def __init__(
        self,
        places: Mapping[str, Tensor] | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.places = dict(places or {})
        self.shapes = dict(shapes or {})

    def __len__(self) -> int:
        """Number of protected entries."""
        return sum(len(places) for places in self.places.values())

    def add(self, changes: Mapping[str, Change], share: float) -> None:
        """Protect the entries that a task has moved most, in addition to all others.

        Args:
            changes: per name of a layer what the task did to it.
            share: see `largest_entries`.

        Raises:
            WeightsError: a matrix of another shape than before.
        """
        self.check(changes)
        for name, change in changes.items():
            found = largest_entries(change, share)
            known = self.places.get(name, torch.zeros(0, dtype=torch.int64))
            self.places[name] = torch.cat([known, found]).unique()
            self.shapes[name] = change.shape

    def check(self, changes: Mapping[str, Change]) -> None:
        """Refuse changes of other matrices.

        Raises:
            WeightsError: names the layer.
        """
        for name, change in changes.items():
            if name in self.shapes and self.shapes[name] != change.shape:
                raise WeightsError(
                    f"the protected entries of '{name}' belong to a matrix of "
                    f"{self.shapes[name]}, but it has {tuple(change.shape)}; they were made for "
                    "another network"
                )

    def parts(self, changes: Mapping[str, Change], chunk: int = CHUNK) -> Iterator[Tensor]:
        """Terms of `penalty`, whose sum it is; each needs little memory, also with gradients.

        Args:
            changes: per name of a layer how it differs from the end of the last task.
            chunk: entries per term at most.
        """
        held = {name: places for name, places in self.places.items() if name in changes}
        held = {name: places for name, places in held.items() if len(places)}
        for name, places in held.items():
            change = changes[name]
            for part in places.split(chunk):
                index = part.to(change[0].device)
                size: Tensor = checkpoint(_size, change, index, use_reentrant=False)
                yield size / (len(places) * len(held))

    def penalty(self, changes: Mapping[str, Change], chunk: int = CHUNK) -> Tensor:
        """Mean over matrices of the mean size of the change at protected entries.

        Matrices without protected entries, and those that are not changed, are left out.

        Args:
            changes: see `parts`.
            chunk: entries that are computed at once; backward computes them again.

        Returns:
            A scalar with gradient; 0 if nothing is protected.
        """
        self.check(changes)
        found = list(self.parts(changes, chunk))
        return torch.stack(found).sum() if found else torch.zeros(())

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        from safetensors.torch import save_file

        shapes = {
            name: "x".join(str(side) for side in shape) for name, shape in self.shapes.items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.places, file, metadata=shapes)

    @staticmethod
    def load(file: str | Path) -> ProtectedEntries:
        """Read what `save` has written.

        Raises:
            MissingFileError: there is no such file.
            WeightsError: it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(file)
        if not path.is_file():
            raise MissingFileError(
                f"there is no file '{path}' with protected entries; give the one that the task "
                "before has left, or none for a first task"
            )
        try:
            with safe_open(path, framework="pt") as opened:
                places = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                noted = opened.metadata() or {}
            shapes = {name: _shape(noted[name]) for name in places}
        except (SafetensorError, KeyError, ValueError) as error:
            raise WeightsError(
                f"'{path}' holds no protected entries ({error}); give the file that RegLoRA has "
                "written"
            ) from error
        for name, found in places.items():
            height, width = shapes[name]
            if found.dtype != torch.int64 or (
                len(found) and not 0 <= int(found.min()) <= int(found.max()) < height * width
            ):
                raise WeightsError(
                    f"'{path}' has places of '{name}' outside of a matrix of {shapes[name]}; give "
                    "the file that RegLoRA has written"
                )
        return ProtectedEntries(places, shapes)


def _size(change: Change, index: Tensor) -> Tensor:
    return change.entries(index).abs().sum()


def _shape(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def lora_changes(network: nn.Module, adapter: str = "default") -> dict[str, Change]:
    """The changes by a LoRA of peft, by the names of the layers that it adapts.

    Args:
        network: with an adapter that is not merged.
        adapter: its name.

    Raises:
        ModelError: the network has no such adapter.
    """
    prefix = "base_model.model."
    found: dict[str, Change] = {}
    for name, module in network.named_modules():
        factors = [getattr(module, part, None) for part in ("lora_A", "lora_B")]
        if all(isinstance(one, nn.ModuleDict) and adapter in one for one in factors):
            a, b = (one[adapter].weight for one in factors)  # type: ignore[index]
            found[name.removeprefix(prefix)] = LowRank(b.flatten(1), a.flatten(1))
    if not found:
        raise ModelError(
            f"{type(network).__name__} has no LoRA named '{adapter}'; attach one with peft first"
        )
    return found


def check_share(share: float) -> None:
    """Refuse a share of entries that has no meaning.

    Raises:
        ConfigurationError: it does not lie in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigurationError(f"`share` is {share}; it must be above 0 and at most 1")
