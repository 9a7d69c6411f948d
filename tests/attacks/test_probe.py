from __future__ import annotations

import numpy as np
import torch

from mmforget.attacks.probe import STRENGTHS, linear_probe


def clouds(n: int, seed: int, distance: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = distance * torch.eye(3, 6)
    return centres[labels] + torch.randn(n, 6, generator=chance), labels


def test_probe_reads_separable_classes_and_not_noise() -> None:
    features, labels = clouds(90, 2)
    found = linear_probe(clouds(120, 0), clouds(60, 1), features)
    assert np.mean(found.predicted == labels.numpy()) > 0.95
    assert found.converged and found.strength in STRENGTHS
    noise = torch.randn(90, 6, generator=torch.Generator().manual_seed(3))
    train = (torch.randn(120, 6, generator=torch.Generator().manual_seed(4)), clouds(120, 0)[1])
    found = linear_probe(train, clouds(60, 1), noise)
    assert np.mean(found.predicted == labels.numpy()) < 0.6


def test_probe_chooses_the_strength_on_validation_data() -> None:
    """Labels that contradict the training data are met best by the weakest fit."""
    train, (features, labels) = clouds(120, 0, 1.0), clouds(60, 1, 1.0)
    found = {
        linear_probe(train, (features, shift), features).strength
        for shift in (labels, (labels + 1) % 3)
    }
    assert len(found) == 2


def test_probe_does_not_depend_on_order_or_scale_of_features() -> None:
    train, val, (features, _) = clouds(120, 0), clouds(60, 1), clouds(90, 2)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 1e4])
    plain = linear_probe(train, val, features).predicted
    other = linear_probe(
        (train[0][order] * scale, train[1][order]), (val[0] * scale, val[1]), features * scale
    )
    assert (plain == other.predicted).mean() > 0.98
