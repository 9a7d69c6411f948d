"""The reference run of the evaluation protocol: 8 x 8 digits and a small convolutional network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmforget.data.base import ForgetDataModule, ImageDataset
from mmforget.data.digit_world import DIGITS, strokes
from mmforget.data.split import Stage
from mmforget.models.classifier import ImageClassifier


class Strokes(ImageDataset):
    """Grey 8 x 8 digits, all in memory."""

    def __init__(self, name: str, ids: np.ndarray) -> None:
        ink, digit = strokes()
        super().__init__(name, ids, digit[ids], DIGITS, (3, 8, 8), flippable=False)
        self._ink = ink[ids]

    def read(self, rows: np.ndarray) -> Tensor:
        grey = torch.from_numpy((self._ink[rows] * 255).astype(np.uint8))
        return grey[:, None].expand(-1, 3, -1, -1)


class Digits(ForgetDataModule):
    """Half of the strokes for training, an eighth for validation, the rest for testing."""

    def build(self) -> dict[Stage, ImageDataset]:
        order = np.random.default_rng(0).permutation(1797)
        parts = {"train": order[:898], "val": order[898:1098], "test": order[1098:]}
        return {stage: Strokes(stage, np.sort(ids)) for stage, ids in parts.items()}  # type: ignore[misc]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(data: Digits, seed: int, without: tuple[int, ...] = (), epochs: int = 15) -> ImageClassifier:
    """SGD 0.05, momentum 0.9, weight decay 5e-4, batch 64, from scratch."""
    model = ImageClassifier(network, num_classes=10).fresh(seed)
    dataset = data.dataset("train")
    assert dataset.labels is not None
    dataset = dataset.subset(np.flatnonzero(~np.isin(dataset.labels, without)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(dataset), generator=order).split(64):
            optimizer.zero_grad()
            model.loss(dataset[rows.tolist()]).mean().backward()
            optimizer.step()
    return model.eval()
