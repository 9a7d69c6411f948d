"""Batches of several sets of records, each of which depends on its step and the seed only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from mmforget.seeds import generator


class Records(Protocol):
    """A set of records in memory."""

    def __len__(self) -> int:
        """Count the records."""
        ...

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch with ``weight`` (B,); ``~p`` gives record p as padding of weight 0."""
        ...


class RecordStream(IterableDataset[dict[str, dict[str, Tensor]]]):
    """Batches of several sets of records, each of which depends on its step and the seed only.

    Every set is gone through in permutations of its own, one after another without a gap. That the
    batch of a step is known from its number lets a run be resumed anywhere, also within an epoch.
    An iteration, which Lightning calls an epoch, ends after the first set has been gone through;
    the next one goes on.

    Args:
        records: sets by name; the length of the first counts.
        sizes: records per step and set, over all processes.
        seed: of the permutations.
        first: number of the first step.
    """

    def __init__(
        self,
        records: Mapping[str, Records],
        sizes: Mapping[str, int],
        seed: int,
        first: int = 0,
    ) -> None:
        self.records, self.sizes, self.seed, self.next = records, sizes, seed, first
        self._orders: dict[str, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        """Steps of an iteration."""
        name, first = next(iter(self.records.items()))
        return -(-len(first) // self.sizes[name])

    def positions(self, name: str, step: int) -> Tensor:
        """Records of a set that are used in a step, over all processes."""
        size, total = self.sizes[name], len(self.records[name])
        found, place = [], step * size
        while place < (step + 1) * size:
            number, start = divmod(place, total)
            if self._orders.get(name, (-1,))[0] != number:
                draw = generator(self.seed, f"denoising-{name}", number)
                self._orders[name] = number, torch.randperm(total, generator=draw)
            part = self._orders[name][1][start : start + (step + 1) * size - place]
            found.append(part)
            place += len(part)
        return torch.cat(found)

    def __iter__(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Yield this process's share of the batches; a padded row has weight 0."""
        rank, world = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        for _ in range(len(self)):
            step, self.next = self.next, self.next + 1
            batch = {}
            for name, records in self.records.items():
                rows = self.positions(name, step)
                padding = ~rows[:1].repeat(-len(rows) % world)
                batch[name] = records[torch.cat([rows, padding])[rank::world].tolist()]
            yield batch
