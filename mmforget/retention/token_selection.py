"""Which positions of a sequence later decoder layers still see, and what they get of the rest.

A `Selection` holds for one forward pass, of a prompt or of one decoded token, the queries that go
on and the keys that they may look at. Positions are those of the full sequence and are never
renumbered, so rotary positions and cached keys stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SeenKeys:
    """The keys that the pruned layers hold in their cache.

    Attributes:
        places: (B, M) positions in the full sequence.
        valid: (B, M) False for keys that nobody may look at.
        seen: number of tokens of the full sequence so far.
    """

    places: Tensor
    valid: Tensor
    seen: int

    @classmethod
    def all(cls, batch: int, seen: int, device: torch.device) -> SeenKeys:
        """Every token so far."""
        places = torch.arange(seen, device=device).expand(batch, -1)
        return cls(places, torch.ones_like(places, dtype=torch.bool), seen)


@dataclass
class Selection:
    """The queries of one forward pass that go on, and the keys that they may look at.

    Attributes:
        kept: (B, Q) bool, what goes on of the Q new tokens.
        queries: (B, R) ascending rows of the new tokens, None for all. Rows with fewer kept tokens
            than R begin with dropped ones, which nobody looks at.
        keys: of the cache with the new ones, which come last.
    """

    kept: Tensor
    queries: Tensor | None
    keys: SeenKeys
    _masks: dict[int, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, kept: Tensor, before: SeenKeys, drop: bool) -> Selection:
        """Choose among new tokens.

        Args:
            kept: (B, Q) bool.
            before: keys of the cache.
            drop: whether dropped tokens leave the sequence; else they are only hidden.
        """
        batch, number = kept.shape
        queries, valid = None, kept
        places = torch.arange(number, device=kept.device).expand(batch, -1)
        if drop and not bool(kept.all()):
            most = int(kept.sum(dim=1).max())
            queries = torch.sort(kept.int(), dim=1, stable=True).indices[:, number - most :]
            places, valid = queries, kept.gather(1, queries)
        keys = SeenKeys(
            torch.cat((before.places, places + before.seen), dim=1),
            torch.cat((before.valid, valid), dim=1),
            before.seen + number,
        )
        return cls(kept, queries, keys)

    def states(self, hidden: Tensor) -> Tensor:
        """Take the rows that go on out of (B, Q, D)."""
        if self.queries is None:
            return hidden
        return hidden.gather(1, self.queries[..., None].expand(-1, -1, hidden.shape[-1]))

    def positions(self, part: Tensor) -> Tensor:
        """Take the rows that go on out of cosines or sines (..., B or 1, Q, d)."""
        if self.queries is None:
            return part
        part = part.expand(*part.shape[:-3], len(self.queries), *part.shape[-2:])
        place = self.queries[..., None].expand(*part.shape[:-2], -1, part.shape[-1])
        return part.gather(-2, place)

    def numbers(self, position_ids: Tensor) -> Tensor:
        """Take the rows that go on out of position numbers (B or 1, Q)."""
        if self.queries is None:
            return position_ids
        return position_ids.expand(len(self.queries), -1).gather(1, self.queries)

    def mask(self, mask: Tensor | None, additive: bool, dtype: torch.dtype) -> Tensor | None:
        """The attention mask of a pruned layer, from that of a full one.

        Args:
            mask: None (causal), bool or additive (B or 1, 1, Q, L), or (B, L) of padding.
            additive: whether a mask that has to be made is an additive one.
            dtype: of an additive one.
        """
        found = self._masks.get(id(mask))  # the same for all layers of a kind
        if found is None:
            found = self._masks[id(mask)] = (mask, self._mask(mask, additive, dtype))
        return found[1]

    def _mask(self, mask: Tensor | None, additive: bool, dtype: torch.dtype) -> Tensor | None:
        places, valid = self.keys.places, self.keys.valid
        batch, number = self.kept.shape
        first = self.keys.seen - number
        queries = self.queries
        if queries is None:
            queries = torch.arange(number, device=places.device).expand(batch, -1)
        if mask is None:
            rows = queries.shape[1]
            if bool(valid.all()) and (rows == 1 or rows == places.shape[1]):
                return None
            mask = places[:, None, None, :] <= (queries + first)[:, None, :, None]
            if additive:
                lowest = torch.finfo(dtype).min
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
        elif mask.dim() == 2:
            return mask.gather(1, places) * valid.to(mask.dtype)
        else:
            mask = mask.expand(batch, -1, -1, -1)
            heads = mask.shape[1]
            if self.queries is not None:
                row = queries[:, None, :, None].expand(-1, heads, -1, mask.shape[-1])
                mask = mask.gather(2, row)
            column = places[:, None, None, :].expand(-1, heads, mask.shape[2], -1)
            mask = mask.gather(3, column)
        itself = places[:, None, :] == (queries + first)[:, :, None]
        hidden = (~valid[:, None, :] & ~itself)[:, None]  # a row that sees nothing gives no number
        if mask.dtype == torch.bool:
            return mask & ~hidden
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    def restored(self, states: Tensor) -> Tensor:
        """Bring (B, R, D) back to the length of the input, (B, Q, D).

        A dropped token gets the state of the last kept one before it, so that what follows the
        picture is predicted by what precedes it; zeros where there is none.
        """
        order = self.kept.long().cumsum(dim=1) - 1
        if self.queries is None:
            source = torch.where(self.kept, 1, 0) * torch.arange(
                self.kept.shape[1], device=order.device
            )
            source = source.cummax(dim=1).values
        else:
            spare = self.queries.shape[1] - self.kept.sum(dim=1, keepdim=True)
            source = (order + spare).clamp(min=0)
        found = states.gather(1, source[..., None].expand(-1, -1, states.shape[-1]))
        return found.masked_fill((order < 0)[..., None], 0.0)


def positional(args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "hidden_states") -> Any:
    """The first argument of a layer, however it was given."""
    return args[0] if args else kwargs[name]
