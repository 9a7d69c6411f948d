"""Fréchet and kernel distance against torchmetrics, closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from mmforget import DigitWorld
from mmforget.errors import ConfigurationError, DataError, ModelError
from mmforget.metrics.distribution import (
    FeatureNetwork,
    FrechetDistance,
    KernelDistance,
    frechet_distance,
    kernel_distance,
)
from mmforget.models.base import state_hash


class Pooled(nn.Module):
    """A random network with eight features in double precision."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 8).double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.double().flatten(1)).tanh()


@pytest.fixture
def network() -> Pooled:
    return Pooled()


@pytest.fixture
def features(network) -> FeatureNetwork:
    return FeatureNetwork(network, "pooled", batch_size=7)


def pictures(n: int, seed: int, power: float = 1.0) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) ** power


def test_frechet_distance_of_normal_distributions():
    mean, other = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    c, d = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 9.0]))
    # commuting covariances: the sum of (sqrt c - sqrt d)^2
    assert frechet_distance(mean, c, other, d).item() == pytest.approx(5 + 1 + 4)
    assert frechet_distance(mean, c, mean, c).item() == pytest.approx(0, abs=1e-6)
    # rotating one of them: tr (C D)^(1/2) from the eigenvalues of the product
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    d = turn @ d @ turn.T
    shared = torch.linalg.eigvals(c @ d).real.sqrt().sum().item()
    found = frechet_distance(mean, c, mean, d).item()
    assert found == pytest.approx(5 + 10 - 2 * shared, rel=1e-5)


@pytest.mark.parametrize("count", [40, 5])  # fewer pictures than features: singular covariance
def test_frechet_distance_is_that_of_torchmetrics(network, features, count):
    own, theirs = FrechetDistance(features), FrechetInceptionDistance(network)
    for reference, power in ((True, 1.0), (False, 2.0)):
        for part in pictures(count, int(reference), power).split(9):
            own.update(part, reference=reference)
            theirs.update(part, real=reference)
    assert own.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert own.compute() > 0.1


def test_kernel_distance_by_brute_force():
    first, second = (torch.randn(5, 3, dtype=torch.float64) for _ in range(2))
    second = torch.cat([second, second[:1] + 1])

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    own = np.mean([k(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j])
    other = np.mean([k(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j])
    cross = np.mean([k(x, y) for x in first for y in second])
    assert kernel_distance(first, second).item() == pytest.approx(own + other - 2 * cross)


def test_kernel_distance_in_parts(monkeypatch):
    first, second = torch.randn(20, 3).double(), torch.randn(20, 3).double()
    whole = kernel_distance(first, second)
    assert whole.item() == pytest.approx(poly_mmd(first, second).item())
    monkeypatch.setattr("mmforget.metrics.distribution.ROWS_AT_A_TIME", 3)
    torch.testing.assert_close(kernel_distance(first, second), whole)


def fill(metric: KernelDistance, size: int = 5, mixed: bool = False) -> dict[str, float]:
    for reference in (True, False):
        images, ids = pictures(30, int(reference), 1 + int(reference)), torch.arange(30) * 7
        order = torch.randperm(30) if mixed else torch.arange(30)
        for part in order.split(size):
            metric.update(images[part], reference=reference, ids=ids[part])
    return {key: value.item() for key, value in metric.compute().items()}


def test_kernel_distance_of_pictures(network, features):
    found = fill(KernelDistance(features))
    with torch.no_grad():
        parts = [network(pictures(30, 1, 2)), network(pictures(30, 0, 1))]
    assert found == {"distance": pytest.approx(kernel_distance(*parts).item())}


def test_subsets_depend_on_ids_and_seed_only(features):
    def made(seed: int = 0, **settings) -> dict[str, float]:
        return fill(KernelDistance(features, subsets=8, subset_size=20, seed=seed), **settings)

    first = made()
    torch.manual_seed(5)  # the global generator plays no part
    assert made(size=11, mixed=True) == pytest.approx(first, rel=1e-12)
    assert made(seed=1)["distance"] != pytest.approx(first["distance"], rel=1e-3)
    whole = fill(KernelDistance(features))["distance"]
    assert abs(first["distance"] - whole) < 3 * first["spread"] and first["spread"] > 0


def test_one_subset_of_everything_is_the_whole(features):
    found = fill(KernelDistance(features, subsets=1, subset_size=30))
    assert found["distance"] == pytest.approx(fill(KernelDistance(features))["distance"])
    assert found["spread"] == 0


def test_equal_distributions_are_near(features):
    frechet, kernel = FrechetDistance(features), KernelDistance(features)
    for metric in (frechet, kernel):
        metric.update(pictures(400, 3), reference=True)
        metric.update(pictures(400, 4), reference=False)
    assert frechet.compute() < 0.05
    assert abs(kernel.compute()["distance"]) < 0.01


def test_the_shipped_features_see_missing_digits():
    data = DigitWorld().dataset("test")
    reference, others = np.arange(0, len(data), 4), np.arange(2, len(data), 4)
    low = others[data.labels[others] < 5]
    for make in (FrechetDistance, KernelDistance):
        values = []
        for chosen in (others[: len(low)], low):
            metric = make()
            assert metric.feature_network.name == "digit_world judge"
            metric.update(data.images(reference), reference=True)
            metric.update(data.images(chosen), reference=False)
            found = metric.compute()
            values.append(float(found["distance"] if isinstance(found, dict) else found))
        assert values[1] > 1.5 * values[0]


def test_the_network_is_recorded(network, features):
    assert (features.name, features.hash) == ("pooled", state_hash(network))
    with torch.no_grad():
        network.layer.bias += 1
    assert FeatureNetwork(network).hash != features.hash
    plain = FeatureNetwork(lambda images: images.flatten(1), "pixels")
    assert plain.hash is None and "no hash" in repr(plain)
    metric = FrechetDistance(FeatureNetwork(lambda images: images.mean((2, 3)), "colour"))
    assert metric.size == 3 and not list(metric.parameters())


def test_errors(features):
    frechet, kernel = FrechetDistance(features), KernelDistance(features)
    for metric in (frechet, kernel):
        with pytest.raises(DataError, match="0 reference pictures"):
            metric.compute()
        metric.update(pictures(3, 0), reference=True)
        metric.update(pictures(1, 0), reference=False)
        with pytest.raises(DataError, match=r"1 other pictures.*reference=False"):
            metric.compute()
        metric.update(pictures(0, 0), reference=False)
    subsets = KernelDistance(features, subsets=2, subset_size=4)
    with pytest.raises(DataError, match="needs `ids`"):
        subsets.update(pictures(3, 0), reference=True)
    for reference in (True, False):
        subsets.update(pictures(3, 0), reference=reference, ids=torch.arange(3))
    with pytest.raises(DataError, match="at least 4"):
        subsets.compute()
    for reference in (True, False):
        subsets.update(pictures(3, 0), reference=reference, ids=torch.arange(2, 5))
    with pytest.raises(DataError, match="same id"):
        subsets.compute()
    with pytest.raises(ConfigurationError, match="wrap it"):
        FrechetDistance(Pooled())
    with pytest.raises(ConfigurationError, match="`subsets`"):
        KernelDistance(features, subsets=-1)
    with pytest.raises(ConfigurationError, match="`subset_size`"):
        KernelDistance(features, subset_size=1)
    with pytest.raises(ModelError, match=r"must return \(B, d\)"):
        FeatureNetwork(lambda images: images)(pictures(2, 0))
    with pytest.raises(ModelError, match="not finite"):
        FeatureNetwork(lambda images: images.flatten(1) / 0)(pictures(2, 0))
