"""A layer of a dynamic cache from which keys can be taken away."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mmforget.errors import CapabilityError


@functools.cache
def evicting_layer() -> Any:
    """The class `EvictingLayer`; a function, so that transformers is imported only when needed."""
    from transformers.cache_utils import DynamicLayer

    class EvictingLayer(DynamicLayer):  # type: ignore[misc]
        """Holds some of the keys, but tells the length of the whole sequence.

        transformers derives positions and masks of the next token from that length, so they grow
        on as if nothing had been taken away. Keys are stored with their positions applied. The
        masks that come in cover the whole sequence and are brought to the keys that are here by
        `fitted_mask`.

        Attributes:
            owner: what evicts from this layer.
            logical: tokens seen, L.
            positions: (B, G, n) place in the sequence of every key, ascending; None while all are
                here. G key heads, or 1 where they share their places.
            alive: (B, G, n) bool; False fills up sequences that keep fewer keys than others.
            complete: whether all are alive.
            real: (B, L) bool, False for padding.
            visual: (B, L) bool, or None where nobody asked.
            score: (B, G, n) of the policy.
            limit: (B,) keys that may stay.
        """

        keys: Any  # tensors, once there are any
        values: Any
        owner: Any
        positions: Tensor | None
        alive: Tensor | None
        real: Tensor | None
        visual: Tensor | None
        score: Tensor | None
        limit: Tensor | None

        def __init__(self, owner: Any = None) -> None:
            super().__init__()
            self.owner = owner
            self._clear()

        def _clear(self) -> None:
            self.logical, self.complete = 0, True
            self.positions = self.alive = self.real = self.visual = None
            self.score = self.limit = None

        # ---- what transformers calls ------------------------------------------------------------

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            """Append keys and values."""
            new, start = key_states.shape[-2], self.logical
            self.logical += new
            if self.positions is not None and self.alive is not None:
                places = torch.arange(start, self.logical, device=self.positions.device)
                shape = (*self.positions.shape[:2], new)
                self.positions = torch.cat([self.positions, places.expand(shape)], dim=-1)
                self.alive = torch.cat([self.alive, self.alive.new_ones(shape)], dim=-1)
            return super().update(key_states, value_states, *args, **kwargs)

        def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
            """Tokens seen, whether or not their keys are still here."""
            return int(self.logical)

        def reset(self) -> None:
            """Forget everything."""
            super().reset()
            self._clear()

        def crop(self, *_args: Any, **_kwargs: Any) -> None:
            """Refuse: what was evicted cannot come back."""
            raise CapabilityError(
                "a cache that evicts keys cannot be shortened, as assisted and speculative "
                "decoding want it; generate without an assistant"
            )

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Follow the beams."""
            self.batch_select_indices(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            """Take some sequences of the batch."""
            super().batch_select_indices(indices.to(self.keys.device))
            self._each(lambda part: part[indices.to(part.device)])

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Repeat every sequence of the batch."""
            super().batch_repeat_interleave(repeats)
            self._each(lambda part: part.repeat_interleave(repeats, dim=0))

        def _each(self, change: Any) -> None:
            for name in ("positions", "alive", "real", "visual", "score", "limit"):
                part = getattr(self, name)
                setattr(self, name, None if part is None else change(part))

        # ---- what the eviction calls ------------------------------------------------------------

        def note(self, real: Tensor, visual: Tensor | None) -> None:
            """Remember of the latest tokens (B, Q) which are no padding, and which visual."""
            self.real = real if self.real is None else torch.cat([self.real, real], dim=1)
            if visual is not None:
                before = [] if self.visual is None else [self.visual]
                self.visual = torch.cat([*before, visual], dim=1)

        def slots(self, groups: int) -> tuple[Tensor, Tensor]:
            """Place (B, G, n) of every key, and whether it is there and no padding."""
            assert self.real is not None  # `note` came first
            if self.positions is None or self.alive is None:
                places = torch.arange(self.logical, device=self.real.device)
                shape = (len(self.real), groups, -1)
                return places.expand(len(self.real), groups, -1), self.real[:, None].expand(shape)
            return self.positions, self.alive & self.at_slots(self.real, self.positions)

        @staticmethod
        def at_slots(flags: Tensor, positions: Tensor) -> Tensor:
            """Bring flags of places (B, L) to keys (B, G, n)."""
            return flags[:, None].expand(-1, positions.shape[1], -1).gather(-1, positions)

        def keep(self, index: Tensor, alive: Tensor, score: Tensor, drop: bool) -> None:
            """Take away all keys but some.

            Args:
                index: (B, G, n) of the keys that stay, ascending.
                alive: (B, G, n) False for those that only fill up.
                score: (B, G, n before).
                drop: free the memory; else the keys are only hidden.
            """
            places, _ = self.slots(index.shape[1])
            if drop:
                self.positions, self.alive = places.gather(-1, index), alive
                self.score = score.gather(-1, index)
                wide = index.expand(-1, self.keys.shape[1], -1)[..., None]
                self.keys = self.keys.gather(2, wide.expand(-1, -1, -1, self.keys.shape[-1]))
                self.values = self.values.gather(2, wide.expand(-1, -1, -1, self.values.shape[-1]))
            else:
                self.positions, self.score = places, score
                self.alive = torch.zeros_like(places, dtype=torch.bool).scatter(-1, index, alive)
            self.complete = bool(self.alive.all())

        def fitted_mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
            """Bring a mask of the whole sequence to the keys that are here.

            Args:
                mask: None, bool or additive (B, 1, Q, L).
                query: (B, H, Q, d).

            Returns:
                (B, 1 or H, Q, n), or None where every key may be seen.
            """
            if self.positions is None or self.alive is None:
                return mask
            heads, queries = query.shape[1:3]
            if mask is None:
                if queries == 1 and self.complete:
                    return None
                rows = torch.arange(self.logical - queries, self.logical, device=query.device)
                fitted = self.positions[:, :, None] <= rows[:, None]
            elif mask.shape[1] > 1:
                return mask  # was fitted before
            else:
                wide = self.positions[:, :, None].expand(-1, -1, queries, -1)
                shape = (len(query), wide.shape[1], -1, -1)
                fitted = mask.expand(shape).gather(-1, wide)
            if fitted.dtype == torch.bool:
                fitted = fitted & self.alive[:, :, None]
            else:
                hidden = torch.finfo(fitted.dtype).min
                fitted = fitted.masked_fill(~self.alive[:, :, None], hidden)
            if fitted.shape[1] == 1:
                return fitted
            return fitted.repeat_interleave(heads // fitted.shape[1], dim=1)

    return EvictingLayer
