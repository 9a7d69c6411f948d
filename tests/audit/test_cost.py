from __future__ import annotations

import time

import pytest
import torch

from mmforget.audit.cost import measured


def test_seconds_and_memory_of_a_block() -> None:
    with measured() as cost:
        # More than malloc ever takes from memory that it has kept, which would be no growth.
        block = torch.ones(24_000_000)  # 96 MB
        time.sleep(0.12)
    assert 0.12 <= cost.seconds < 5
    assert 90e6 < cost.peak_memory_bytes < 400e6
    assert cost.to_dict() == {
        "seconds": cost.seconds,
        "peak_memory_bytes": cost.peak_memory_bytes,
    }
    assert block.sum() > 0


def test_cost_is_known_after_an_error() -> None:
    with pytest.raises(KeyError), measured() as cost:
        time.sleep(0.02)
        raise KeyError
    assert cost.seconds >= 0.02
