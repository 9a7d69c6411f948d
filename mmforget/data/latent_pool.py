"""Latents of a generator, sorted by what it draws from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmforget.errors import ConfigurationError
from mmforget.models.base import Latents


class LatentRecords:
    """Latents in memory, in batches for `RecordStream`.

    Args:
        latents: n latents of any space.
        ids: (n,) int64 their numbers in the draw; None counts from 0.
        extra: further tensors with n rows, by name.

    Raises:
        ConfigurationError: there is none, or the sizes differ.
    """

    def __init__(
        self, latents: Latents, ids: Tensor | None = None, extra: dict[str, Tensor] | None = None
    ) -> None:
        ids = torch.arange(len(latents)) if ids is None else ids
        self.latents, self.ids, self.extra = latents, ids, dict(extra or {})
        sizes = {len(latents), len(ids), *(len(value) for value in self.extra.values())}
        if len(sizes) != 1 or not len(latents):
            raise ConfigurationError(
                f"latent records have {sorted(sizes)} rows; all parts need the same number, at "
                "least one"
            )

    def __len__(self) -> int:
        """Count the latents."""
        return len(self.latents)

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """One batch; a negative position ``~p`` gives latent p as padding, with weight 0.

        Returns:
            ``codes``, ``label`` if there are classes, ``id`` (B,), ``weight`` (B,), and what is
            extra.
        """
        given = np.asarray(positions, dtype=np.int64)
        index = torch.from_numpy(np.where(given < 0, ~given, given))
        part = self.latents[index]
        batch = {
            "codes": part.codes,
            "id": self.ids[index],
            "weight": torch.from_numpy((given >= 0).astype(np.float32)),
            **{name: value[index] for name, value in self.extra.items()},
        }
        if part.labels is not None:
            batch["label"] = part.labels
        return batch
