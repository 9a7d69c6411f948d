"""Latent records: batches by position, with padding."""

from __future__ import annotations

import pytest
import torch

from mmforget.data.latent_pool import LatentRecords
from mmforget.errors import ConfigurationError
from mmforget.models.base import Latents


def test_padding_repeats_a_latent_with_weight_nought() -> None:
    latents = Latents(torch.arange(6.0).view(3, 2), torch.tensor([5, 6, 7]))
    records = LatentRecords(latents, torch.tensor([10, 20, 30]), {"probability": torch.rand(3, 1)})
    batch = records[[2, ~0]]
    assert batch["codes"].tolist() == [[4, 5], [0, 1]]
    assert batch["id"].tolist() == [30, 10]
    assert batch["label"].tolist() == [7, 5]
    assert batch["weight"].tolist() == [1, 0]
    assert torch.equal(batch["probability"], records.extra["probability"][[2, 0]])


def test_without_classes_there_is_no_label() -> None:
    batch = LatentRecords(Latents(torch.zeros(2, 2)))[[1]]
    assert sorted(batch) == ["codes", "id", "weight"]
    assert batch["id"].tolist() == [1]


def test_uneven_or_empty_records_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\[2, 3\]"):
        LatentRecords(Latents(torch.zeros(2, 2)), torch.arange(3))
    with pytest.raises(ConfigurationError, match="at least one"):
        LatentRecords(Latents(torch.zeros(0, 2)))
