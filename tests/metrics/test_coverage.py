"""Precision, recall, density, coverage and diversity, by hand and by brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from mmforget.errors import ConfigurationError, DataError
from mmforget.metrics.coverage import (
    DensityCoverage,
    PairwiseDiversity,
    PrecisionRecall,
    density_coverage,
    neighbour_radii,
    pairwise_diversity,
    precision_recall,
)
from mmforget.metrics.distribution import FeatureNetwork

LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
OTHERS = torch.tensor([[0.5], [3.0], [40.0]], dtype=torch.float64)


def points(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=source, dtype=torch.float64) + shift


def as_images(values: torch.Tensor) -> torch.Tensor:
    """Pictures whose mean colours are the values."""
    return values.float()[:, :, None, None].expand(-1, 3, 2, 2)


@pytest.fixture
def colours() -> FeatureNetwork:
    return FeatureNetwork(lambda images: images.mean(dim=(2, 3)), "colours")


def test_radii_reach_to_the_kth_neighbour():
    assert neighbour_radii(LINE, 1).tolist() == [1, 1, 1, 8]
    assert neighbour_radii(LINE, 2).tolist() == [2, 1, 2, 9]


def test_four_points_by_hand():
    # balls around 0, 1, 2 and 10 with the radii 1, 1, 1 and 8
    precision, recall = precision_recall(LINE, OTHERS, k=1)
    # 0.5 lies in the first two, 3 in the last two, 40 in none
    assert precision.item() == pytest.approx(2 / 3)
    # balls around 0.5, 3 and 40 with the radii 2.5, 2.5 and 37 hold all four
    assert recall.item() == 1
    density, coverage = density_coverage(LINE, OTHERS, k=1)
    assert density.item() == pytest.approx(4 / 3)
    assert coverage.item() == 1
    density, coverage = density_coverage(LINE, OTHERS[2:], k=1)
    assert (density.item(), coverage.item()) == (0, 0)


def test_they_agree_with_plain_loops():
    real, made, k = points(16, 0), points(12, 1, 0.7), 4

    def radius(rows: torch.Tensor, row: int) -> float:
        return sorted(float((rows[row] - other).norm()) for other in rows)[k]

    def inside(rows: torch.Tensor, row: int, point: torch.Tensor) -> bool:
        return float((rows[row] - point).norm()) <= radius(rows, row)

    table = [[inside(real, i, point) for i in range(len(real))] for point in made]
    back = [[inside(made, i, point) for i in range(len(made))] for point in real]
    precision, recall = precision_recall(real, made, k)
    density, coverage = density_coverage(real, made, k)
    assert precision.item() == pytest.approx(sum(map(any, table)) / len(made))
    assert recall.item() == pytest.approx(sum(map(any, back)) / len(real))
    assert density.item() == pytest.approx(sum(map(sum, table)) / (k * len(made)))
    assert coverage.item() == pytest.approx(
        sum(any(column) for column in zip(*table, strict=True)) / len(real)
    )
    assert 0 < recall < 1


def test_a_generator_that_collapses_loses_recall_coverage_and_diversity():
    real = points(200, 0)
    healthy, collapsed = points(200, 1), points(1, 1).expand(200, 3) + 0.01 * points(200, 2)
    assert precision_recall(real, healthy)[1] > 0.8 > 0.1 > precision_recall(real, collapsed)[1]
    assert density_coverage(real, healthy)[1] > 0.8 > 0.2 > density_coverage(real, collapsed)[1]
    assert pairwise_diversity(healthy) > 50 * pairwise_diversity(collapsed)


def test_diversity_by_hand():
    assert pairwise_diversity(LINE).item() == pytest.approx((1 + 2 + 10 + 1 + 9 + 8) / 6)
    assert pairwise_diversity(torch.ones(5, 2)).item() == 0


def test_large_sets_are_taken_in_parts(monkeypatch):
    real, made = points(50, 0), points(45, 1)
    whole = (*precision_recall(real, made), *density_coverage(real, made), pairwise_diversity(made))
    monkeypatch.setattr("mmforget.metrics.coverage.ROWS_AT_A_TIME", 7)
    parts = (*precision_recall(real, made), *density_coverage(real, made), pairwise_diversity(made))
    assert torch.allclose(torch.stack(whole), torch.stack(parts))


def test_the_metrics_gather_features_batch_by_batch(colours):
    real, made = points(20, 0).sigmoid(), points(15, 1).sigmoid()
    features = [colours(as_images(values)) for values in (real, made)]
    pair, cover = PrecisionRecall(colours, k=2), DensityCoverage(colours, k=2)
    spread = PairwiseDiversity(colours)
    for metric in (pair, cover):
        for part in as_images(real).split(6):
            metric.update(part, reference=True)
        metric.update(as_images(made), reference=False)
        metric.update(as_images(made)[:0], reference=False)
    spread.update(as_images(made[:5]))
    spread.update(as_images(made[5:]))
    expected = precision_recall(*features, k=2)
    assert list(pair.compute().values()) == pytest.approx([float(value) for value in expected])
    expected = density_coverage(*features, k=2)
    assert list(cover.compute().values()) == pytest.approx([float(value) for value in expected])
    assert spread.compute().item() == pytest.approx(pairwise_diversity(features[1]).item())
    pair.reset()
    with pytest.raises(DataError, match="0 reference pictures"):
        pair.compute()


def test_the_shipped_features_are_the_default():
    metric = PairwiseDiversity()
    metric.update(torch.rand(3, 3, 32, 32))
    assert metric.compute() > 0
    assert metric.feature_network.name == "digit_world judge"


def test_too_few_pictures_and_wrong_settings_are_refused(colours):
    with pytest.raises(ConfigurationError, match="`k` is 0"):
        PrecisionRecall(colours, k=0)
    with pytest.raises(ConfigurationError, match="FeatureNetwork"):
        DensityCoverage(lambda images: images)  # type: ignore[arg-type]
    metric = PrecisionRecall(colours, k=3)
    metric.update(as_images(points(4, 0)), reference=True)
    metric.update(as_images(points(3, 0)), reference=False)
    with pytest.raises(DataError, match="3 other pictures, it needs at least 4"):
        metric.compute()
    with pytest.raises(DataError, match="1 other pictures"):
        single = PairwiseDiversity(colours)
        single.update(as_images(points(1, 0)))
        single.compute()
    with pytest.raises(DataError, match="no 4-th nearest neighbour"):
        neighbour_radii(LINE, 4)


def found_by(rank: int, world: int, batches: int) -> list[float]:
    features = FeatureNetwork(lambda images: images.mean(dim=(2, 3)), "colours")
    real, made = (as_images(points(30, seed).sigmoid()) for seed in (0, 1))
    pair, spread = PrecisionRecall(features), PairwiseDiversity(features)
    cover = DensityCoverage(features)
    for rows in torch.arange(30).chunk(batches)[rank::world]:
        spread.update(made[rows])
        for metric in (pair, cover):
            metric.update(real[rows], reference=True)
            metric.update(made[rows], reference=False)
    return [
        float(v) for v in (*pair.compute().values(), *cover.compute().values(), spread.compute())
    ]


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    # with a single batch, the second process has no pictures
    torch.save([found_by(rank, 2, batches) for batches in (5, 1)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = found_by(0, 1, 5)
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert found == pytest.approx(expected)
