"""A data set and a model that are learnt in a second, for checks that need both."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mmforget.data.base import ForgetDataModule, ImageDataset, View
from mmforget.data.split import Stage
from mmforget.models.classifier import ImageClassifier
from mmforget.seeds import generator

SIDE = 32
CLASS_NAMES = ("amber", "basalt", "coral", "dune", "ember")
TINY_VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


class _PatternImages(ImageDataset):
    """Noisy copies of one random pattern per class."""

    def __init__(self, name: str, ids: np.ndarray, noise: float) -> None:
        super().__init__(name, ids, ids % len(CLASS_NAMES), CLASS_NAMES, (3, SIDE, SIDE), False)
        self._all_ids, self._noise = self.ids, noise

    def read(self, rows: np.ndarray) -> Tensor:
        """Draw, each image from its own generator."""
        drawn = []
        for sample in self._all_ids[rows].tolist():
            number = sample % len(CLASS_NAMES)
            coarse = torch.rand(3, 8, 8, generator=generator(0, "pattern", number))
            pattern = coarse.repeat_interleave(SIDE // 8, 1).repeat_interleave(SIDE // 8, 2)
            noise = torch.randn(pattern.shape, generator=generator(0, "noise", sample))
            drawn.append((pattern + self._noise * noise).clamp(0, 1))
        return (torch.stack(drawn) * 255).round().to(torch.uint8)


class PatternData(ForgetDataModule):
    """Five classes of noisy colour patterns, 32x32.

    Args:
        size: number of training images; validation and test have half as many.
        noise: standard deviation of the noise, for pixels in [0, 1].
        batch_size, seed, view: see `ForgetDataModule`.
    """

    def __init__(
        self,
        size: int = 155,
        noise: float = 0.25,
        batch_size: int = 16,
        seed: int = 0,
        view: View = "full",
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, view=view)
        self.size = size
        self.noise = noise

    def build(self) -> dict[Stage, ImageDataset]:
        """Three disjoint ranges of ids."""
        half = self.size // 2
        ids = np.split(np.arange(self.size + 2 * half), [self.size, self.size + half])
        stages: tuple[Stage, ...] = ("train", "val", "test")
        return {
            stage: _PatternImages(f"patterns/{stage}", part, self.noise)
            for stage, part in zip(stages, ids, strict=True)
        }


def pattern_model(seed: int = 0, epochs: int = 8) -> ImageClassifier:
    """A small vision transformer that has learnt `PatternData`, in eval mode.

    It is trained once per process; every call returns a copy of its own.
    """
    return copy.deepcopy(_trained(seed, epochs))


@cache
def _trained(seed: int, epochs: int) -> ImageClassifier:
    model = ImageClassifier(
        "vit_tiny_patch16_224",
        num_classes=len(CLASS_NAMES),
        network_args=TINY_VIT,
        class_names=CLASS_NAMES,
        lr=3e-3,
    ).fresh(seed)
    images = PatternData().dataset("train")
    order = generator(seed, "pattern-model")
    batches = [
        rows
        for _ in range(epochs)
        for rows in torch.randperm(len(images), generator=order).split(30)
    ]
    optimizer, schedule = model.optimizers_for(len(batches))
    for rows in batches:
        optimizer.zero_grad()
        model.loss(images[rows.tolist()]).mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()
