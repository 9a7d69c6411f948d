"""Random numbers that depend on what they are for, not on when they are drawn.

Every draw in mmforget comes from a generator keyed by (seed, purpose, keys), so that a result does
not change with the loader order, the number of workers or the number of processes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *keys: int | str) -> int:
    """Derive a 63-bit seed from a base seed, a purpose and any number of keys."""
    text = "/".join(str(part) for part in (seed, purpose, *keys))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, *keys: int | str) -> torch.Generator:
    """Make a CPU generator for one purpose; made on the CPU, its numbers suit every device."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, *keys))
