"""Perceptual distance and paired change against hand-made numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from mmforget import DigitWorld
from mmforget.errors import ConfigurationError, DataError, ModelError
from mmforget.metrics.perceptual import LayerDistance, PairedChange, PerceptualDistance
from mmforget.models.base import state_hash


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Flatten(), nn.Linear(45, 2)
    )


def pictures(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def mean_difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first - second).abs().mean((1, 2, 3))


def test_the_formula():
    network = chain()
    distance = LayerDistance(network, ["1", "2"], "chain", batch_size=2)
    first, second = pictures(3, 0), pictures(3, 1)
    expected = torch.zeros(3)
    with torch.no_grad():
        for depth in (2, 3):
            one, other = network[:depth](first), network[:depth](second)
            for place in range(one.shape[-1] ** 2):
                a, b = one.flatten(2)[:, :, place], other.flatten(2)[:, :, place]
                # a place where no channel answers stays 0
                a, b = (x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
                expected += (a - b).square().sum(1) / one.shape[-1] ** 2
    torch.testing.assert_close(distance(first, second).float(), expected)
    torch.testing.assert_close(distance(second, first).float(), expected)
    assert (distance(first, first) == 0).all()
    assert distance(first[:0], first[:0]).shape == (0,)
    assert (distance.name, distance.hash) == ("chain", state_hash(network))
    assert not network[0]._forward_hooks and not network[1]._forward_hooks


def test_brightness_of_features_does_not_matter():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False))
    images = pictures(2, 0)
    distance = LayerDistance(network, ["0"])
    assert distance(images, images * 0.5).max() < 1e-10


def test_wrong_layers():
    with pytest.raises(ConfigurationError, match="did you mean"):
        LayerDistance(nn.Sequential(nn.Sequential(nn.ReLU())), ["0.00"])
    with pytest.raises(ConfigurationError, match="empty"):
        LayerDistance(chain(), [])
    with pytest.raises(ModelError, match="convolutional"):
        LayerDistance(chain(), ["4"])(pictures(1, 0), pictures(1, 1))
    with pytest.raises(DataError, match="no pairs"):
        LayerDistance(chain(), ["0"])(pictures(2, 0), pictures(1, 1))


def test_more_noise_is_farther_for_the_shipped_judge():
    images = DigitWorld().dataset("test").images(np.arange(40))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for amount in (0.0, 0.02, 0.1, 0.4):
        metric = PerceptualDistance()
        metric.update(images, (images + amount * noise).clamp(0, 1))
        found.append(metric.compute().item())
    assert found[0] == 0 and all(b > 1.5 * a for a, b in pairwise(found))
    assert metric.distance.name == "digit_world judge"


def test_mean_over_pairs():
    metric = PerceptualDistance(mean_difference)
    first, second = pictures(5, 0), pictures(5, 1)
    metric.update(first[:4], second[:4])
    metric.update(first[4:], second[4:])
    metric.update(first[:0], second[:0])
    assert metric.compute().item() == pytest.approx((first - second).abs().mean().item(), rel=1e-5)
    with pytest.raises(DataError, match="no pictures"):
        PerceptualDistance(mean_difference).compute()
    with pytest.raises(DataError, match="no pairs"):
        metric.update(first, second[:2])


def test_a_module_as_distance_stays_outside():
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return mean_difference(first, second)

    for metric in (PerceptualDistance(Learned()), PairedChange(["a"], Learned())):
        assert not list(metric.parameters())


def test_paired_change_by_hand():
    change = PairedChange(["seven", "three", "red"], mean_difference)
    base = torch.zeros(2, 3, 2, 2)
    change.update(base, base + 0.9, "seven")
    change.update(base, base + 0.1, "three")
    change.update(base[:1], base[:1] + 0.4, "three")
    change.update(base, base + 0.15, "red")
    found = {key: value.item() for key, value in change.compute().items()}
    assert found == pytest.approx({"seven": 0.9, "three": 0.2, "red": 0.15})
    assert change.worst() == ("seven", pytest.approx(0.9))
    assert change.worst(["red", "three"]) == ("three", pytest.approx(0.2))


def test_paired_change_errors():
    change = PairedChange(["seven", "three"], mean_difference)
    base = torch.zeros(1, 3, 2, 2)
    change.update(base, base, "three")
    with pytest.raises(DataError, match="'seven'"):
        change.compute()
    with pytest.raises(ConfigurationError, match="did you mean 'seven'"):
        change.update(base, base, "sevn")
    with pytest.raises(DataError, match="no pairs"):
        change.update(base, base[:0], "seven")
    change.update(base, base, "seven")
    with pytest.raises(ConfigurationError, match="empty"):
        change.worst([])
    with pytest.raises(ConfigurationError, match="'two'"):
        change.worst(["two"])
    for groups in ((), "ab", ("a", "a")):
        with pytest.raises(ConfigurationError, match="distinct"):
            PairedChange(groups, mean_difference)
