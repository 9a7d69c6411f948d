"""Small generators of transposed convolutions, with or without classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmforget.errors import ModelError

START = 4
"""Side of the first map."""


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose scale and shift are looked up by class.

    Args:
        channels: of the map.
        num_classes: rows of the two tables.
        eps: added to the variance.

    Reference:
        Dumoulin et al., A learned representation for artistic style, 2017, arXiv 1610.07629.
    """

    def __init__(self, channels: int, num_classes: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Normalise (B, C, H, W) maps of classes (B,)."""
        scale, shift = self.scale(labels), self.shift(labels)
        return self.norm(maps) * scale[:, :, None, None] + shift[:, :, None, None]


class DCGAN(nn.Module):
    """Latent to 4x4 map, transposed convolutions that double the side, a convolution, tanh.

    With classes, every batch normalisation is conditional; nothing else sees the class.

    Args:
        latent_size: numbers in a latent.
        channels: of the maps from 4x4 on; the last one has the picture's size, so that the side is
            2 ** (len(channels) + 1). A transposed convolution as last layer would leave its grid in
            the pictures.
        image_channels: 1 or 3.
        num_classes: 0 for a generator without classes.
        eps: of the batch normalisations.

    Raises:
        ModelError: a number out of range.

    Reference:
        Radford et al., Unsupervised representation learning with deep convolutional generative
        adversarial networks, 2016, arXiv 1511.06434.
    """

    def __init__(
        self,
        latent_size: int = 64,
        channels: Sequence[int] = (160, 96, 48, 16),
        image_channels: int = 3,
        num_classes: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if latent_size < 1 or not channels or min(channels) < 1 or image_channels not in (1, 3):
            raise ModelError(
                f"a DCGAN with `latent_size` {latent_size}, `channels` {list(channels)} and "
                f"`image_channels` {image_channels} cannot be built; the sizes must be positive, "
                "the image channels 1 or 3"
            )
        self.latent_size, self.num_classes = latent_size, num_classes
        self.resolution = START * 2 ** (len(channels) - 1)
        self.first = nn.Linear(latent_size, channels[0] * START**2)
        self.norms = nn.ModuleList(
            ConditionalBatchNorm(width, num_classes, eps)
            if num_classes
            else nn.BatchNorm2d(width, eps=eps)
            for width in channels
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)
            for width, after in pairwise(channels)
        )
        self.to_image = nn.Conv2d(channels[-1], image_channels, 3, padding=1)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw.

        Args:
            latents: (B, latent_size).
            labels: (B,) int64 classes, for a generator with classes.

        Returns:
            (B, image_channels, side, side) in [-1, 1].
        """
        maps = self._normal(0, self.first(latents).unflatten(1, (-1, START, START)), labels)
        for number, up in enumerate(self.ups, start=1):
            maps = self._normal(number, up(maps), labels)
        return torch.tanh(self.to_image(maps))

    def _normal(self, number: int, maps: Tensor, labels: Tensor | None) -> Tensor:
        norm = self.norms[number]
        return torch.relu(norm(maps, labels) if self.num_classes else norm(maps))

    def layer_groups(self) -> dict[str, list[str]]:
        """Parameters of the first layer, of each doubling, and of the step to the picture."""
        names = [name for name, _ in self.named_parameters()]
        prefixes: dict[str, tuple[str, ...]] = {"first": ("first.", "norms.0.")}
        for number in range(len(self.ups)):
            prefixes[f"block.{number}"] = (f"ups.{number}.", f"norms.{number + 1}.")
        prefixes["to_image"] = ("to_image.",)
        return {
            group: [name for name in names if name.startswith(wanted)]
            for group, wanted in prefixes.items()
        }
