"""What something took: seconds and peak memory, measured around the method alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 0.05


@dataclass
class Cost:
    """Filled in when the measured block ends.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: on CUDA the peak of allocated memory, else the largest growth of the
            resident memory of this process, sampled every 50 ms.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `ModelEntry.cost`."""
        return {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}


class _ResidentMemory(threading.Thread):
    """Samples the resident memory of this process until it is stopped."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._done = threading.Event()
        self.start_bytes = self.peak_bytes = self._process.memory_info().rss

    def run(self) -> None:
        """Keep the largest value."""
        while not self._done.wait(SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Look once."""
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def stop(self) -> int:
        """End the thread and return the growth in bytes."""
        self._done.set()
        self.join()
        self.sample()
        return self.peak_bytes - self.start_bytes


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block; CUDA work is awaited before both readings of the clock.

    Example:
        >>> with measured() as cost:
        ...     _ = sum(range(1000))
        >>> cost.seconds >= 0
        True
    """
    cost = Cost()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    memory = None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        memory = _ResidentMemory()
        memory.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        cost.peak_memory_bytes = memory.stop() if memory else torch.cuda.max_memory_allocated()
