"""Every metric of generated pictures gives the same value in two gloo processes as in one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torchmetrics import Metric

from mmforget.data.digit_world import DIGITS, render, stage_strokes
from mmforget.metrics.clip import CLIPScore, ConceptProbability
from mmforget.metrics.distribution import FeatureNetwork, FrechetDistance, KernelDistance
from mmforget.metrics.judge import ClipJudge, ConceptRates, load_judge
from mmforget.metrics.perceptual import PairedChange, PerceptualDistance
from mmforget.metrics.vacuous import VacuousCheck
from mmforget.models.clip import load_clip

COUNT, BATCHES = 30, 5  # an odd number of batches, so that the shares are unequal
Case = tuple[Callable[[], Metric], Callable[[Metric, torch.Tensor], None]]


def cases() -> dict[str, Case]:
    """Per metric how it is made, and how the pictures of some rows are added to it."""
    images = render(stage_strokes()["test"][:COUNT] * 1000).float() / 255
    edited = images + 0.2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    edited = edited.clamp(0, 1)
    edited[3], edited[4], edited[20] = 0, 0.5, images[20]
    clip, judge = load_clip(), load_judge()
    zero_shot = ClipJudge(clip, {"digit": DIGITS}, {"digit": ("the digit {}",)})
    features = FeatureNetwork(lambda x: x.unflatten(2, (4, 8)).mean((3, 4)).flatten(1), "cells")
    texts = [f"the digit {DIGITS[row % 10]}" for row in range(COUNT)]

    def both(metric: Any, rows: torch.Tensor) -> None:
        metric.update(images[rows], reference=True)
        metric.update(edited[rows], reference=False)

    def numbered(metric: Any, rows: torch.Tensor) -> None:
        metric.update(images[rows], reference=True, ids=rows)
        metric.update(edited[rows], reference=False, ids=rows)

    def grouped(metric: Any, rows: torch.Tensor) -> None:
        for row in rows.tolist():
            pair = (images[row : row + 1], edited[row : row + 1])
            metric.update(*pair, "even" if row % 2 == 0 else "odd")

    def counted(metric: Any, rows: torch.Tensor) -> None:
        metric.update(edited[rows], rows % 10, "plain")

    return {
        "score": (
            lambda: CLIPScore(clip),
            lambda m, rows: m.update(edited[rows], [texts[row] for row in rows.tolist()]),
        ),
        "probability": (
            lambda: ConceptProbability(zero_shot, "digit", "seven"),
            lambda m, rows: m.update(edited[rows]),
        ),
        "frechet": (lambda: FrechetDistance(features), both),
        "kernel": (lambda: KernelDistance(features), both),
        "subsets": (lambda: KernelDistance(features, subsets=5, subset_size=10), numbered),
        "perceptual": (PerceptualDistance, lambda m, rows: m.update(images[rows], edited[rows])),
        "change": (lambda: PairedChange(["even", "odd"]), grouped),
        "vacuous": (VacuousCheck, lambda m, rows: m.update(edited[rows], images[rows])),
        "rates": (lambda: ConceptRates(judge, "digit", ["plain", "unused"]), counted),
    }


def values(rank: int = 0, world: int = 1, batches: int = BATCHES) -> dict[str, np.ndarray]:
    found = {}
    for name, (make, update) in cases().items():
        metric = make()
        for rows in torch.arange(COUNT).chunk(batches)[rank::world]:
            update(metric, rows)
        value = metric.compute()
        parts = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}/{key}": part.double().numpy() for key, part in parts.items()}
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    np.savez(os.path.join(folder, f"{rank}.npz"), **values(rank, 2))  # type: ignore[arg-type]
    # One batch in all: the second process has no pictures.
    np.savez(os.path.join(folder, f"one-{rank}.npz"), **values(rank, 2, 1))  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = values()
    assert {name.split("/")[0] for name in expected} == set(cases())
    for file in ("0.npz", "1.npz", "one-0.npz", "one-1.npz"):
        found = np.load(tmp_path / file)
        assert set(found) == set(expected)
        for name, value in expected.items():
            # embeddings differ in the last bits with the size of a batch
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=f"{file} {name}")
