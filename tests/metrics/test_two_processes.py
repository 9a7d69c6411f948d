"""Every metric gives the same value in two gloo processes as in one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import Metric

from mmforget.metrics.membership import MembershipAUC
from mmforget.metrics.output import (
    ZRF,
    ActivationDistance,
    Agreement,
    ClassAccuracy,
    JSDivergence,
    KLFromReference,
)
from mmforget.metrics.representation import KNNAccuracy, LinearCKA

Make = Callable[[], Metric]
BATCHES = 5  # odd, so that the two processes have unequal shares


def batches(arguments: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(argument.chunk(BATCHES) for argument in arguments), strict=True))


def cases() -> dict[str, tuple[Make, tuple[Tensor, ...]]]:
    chance = torch.Generator().manual_seed(0)
    a, b = (torch.randn(48, 6, generator=chance) for _ in range(2))
    labels, flag = torch.arange(48) % 5, torch.arange(48) % 2 == 0
    return {
        "js": (JSDivergence, (a, b)),
        "kl": (KLFromReference, (a, b)),
        "activation": (ActivationDistance, (a, b)),
        "agreement": (Agreement, (a, b)),
        "zrf": (ZRF, (a, b)),
        "classes": (lambda: ClassAccuracy(num_classes=6), (a, labels)),
        "cka": (LinearCKA, (a, b)),
        "auc": (MembershipAUC, (a[:, 0], flag)),
        "knn": (lambda: KNNAccuracy(num_classes=5), (a, labels, flag)),
    }


def values(rank: int = 0, world: int = 1) -> dict[str, np.ndarray]:
    found = {}
    for name, (make, arguments) in cases().items():
        metric = make()
        for part in batches(arguments)[rank::world]:
            metric.update(*part)
        found[name] = metric.compute().double().numpy()
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    np.savez(os.path.join(folder, f"{rank}.npz"), **values(rank, 2))  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = values()
    assert len(expected) == len(cases())
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)
