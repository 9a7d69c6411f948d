"""The reference run of the evaluation protocol: 8 x 8 digits and a small convolutional network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmforget.attacks.relearning import RelearningSettings
from mmforget.audit.controls import make_controls
from mmforget.audit.results import ModelEntry, Role
from mmforget.audit.scene import AuditedModel, AuditSettings
from mmforget.data.base import ForgetDataModule, ImageDataset
from mmforget.data.digit_world import DIGITS, strokes
from mmforget.data.split import Stage
from mmforget.models.classifier import ImageClassifier
from mmforget.request import ForgetRequest

Audited = Callable[..., AuditedModel]


class Strokes(ImageDataset):
    """Grey 8 x 8 digits."""

    def __init__(self, name: str, ids: np.ndarray) -> None:
        ink, digit = strokes()
        super().__init__(name, ids, digit[ids], DIGITS, (3, 8, 8), flippable=False)
        self._ink = ink[ids]

    def read(self, rows: np.ndarray) -> Tensor:
        grey = torch.from_numpy((self._ink[rows] * 255).astype(np.uint8))
        return grey[:, None].expand(-1, 3, -1, -1)


class Digits(ForgetDataModule):
    """Half of the strokes for training, a ninth for validation, the rest for testing."""

    backwards = False

    def build(self) -> dict[Stage, ImageDataset]:
        order = np.random.default_rng(0).permutation(1797)
        parts: dict[Stage, np.ndarray] = {
            "train": np.sort(order[:898]),
            "val": np.sort(order[898:1098]),
            "test": np.sort(order[1098:]),
        }
        step = -1 if self.backwards else 1
        return {stage: Strokes(stage, ids[::step]) for stage, ids in parts.items()}


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


def train(
    data: Digits, seed: int, without: tuple[int, ...] = (), epochs: int = 15
) -> ImageClassifier:
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


@pytest.fixture(scope="session")
def make_digits() -> Callable[..., Digits]:
    """Makes 8 x 8 digits, of which the eight is to be forgotten."""

    def make(backwards: bool = False) -> Digits:
        data = Digits(batch_size=64)
        data.backwards = backwards
        data.request(ForgetRequest(classes=(8,)))
        return data

    return make


@pytest.fixture
def digits(make_digits: Callable[..., Digits]) -> Digits:
    """8 x 8 digits, of which the eight is to be forgotten."""
    return make_digits()


@pytest.fixture(scope="session")
def audited() -> Audited:
    """Makes a member of an audit."""

    def make(model: ImageClassifier, role: Role, name: str = "", **known: object) -> AuditedModel:
        return AuditedModel(ModelEntry(name or role, role, **known), model)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def quick() -> AuditSettings:
    """Everything, but with a tiny attack and few replicates."""
    attack = RelearningSettings(steps=6, learning_rates=(1e-2, 5e-2), batch_size=50)
    return AuditSettings(replicates=100, train_samples=300, examples=2, relearning=attack)


@pytest.fixture(scope="session")
def original() -> ImageClassifier:
    """Trained on everything. Tests must not change it."""
    return train(Digits(), 0, epochs=12)


@pytest.fixture(scope="session")
def retrained() -> list[ImageClassifier]:
    """Trained without the eight. Tests must not change them."""
    return [train(Digits(), seed, (8,), epochs=12) for seed in (1, 2)]


@pytest.fixture
def masked(original: ImageClassifier, digits: Digits) -> ImageClassifier:
    """The original with the eight masked."""
    (control,) = make_controls(original, digits, ("logit_mask",))
    return control.model  # type: ignore[return-value]


@pytest.fixture(scope="session")
def reference() -> dict[str, ImageClassifier]:
    """One original, four retrained models and a held-out one, by the recipe of the protocol."""
    data = Digits()
    models = {"original": train(data, 0)}
    models |= {f"retrained {i}": train(data, 100 + i, (8,)) for i in range(1, 5)}
    return models | {"held-out": train(data, 105, (8,))}


@pytest.fixture
def random_labels(reference: dict[str, ImageClassifier], digits: Digits) -> ImageClassifier:
    """The original, fine-tuned on eights with random labels."""
    model = copy.deepcopy(reference["original"])
    kept, gone = digits.subset("train", "retain"), digits.subset("train", "forget")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    chance = torch.Generator().manual_seed(0)
    wrong = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9])
    for _ in range(8):
        for rows in torch.randperm(len(kept), generator=chance).split(64):
            optimizer.zero_grad()
            batch = gone[torch.randperm(len(gone), generator=chance)[:24].tolist()]
            batch["label"] = wrong[torch.randint(9, (24,), generator=chance)]
            loss = model.loss(kept[rows.tolist()]).mean() + model.loss(batch).mean()
            loss.backward()
            optimizer.step()
    return model.eval()
