"""Generators by hand, whose latents are colours, and a guide and judges that see red."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.models.gan import ImageGAN
from mmforget.models.generators.base import Noise

SIDE = 8


class Painter(nn.Module):
    """Paints pictures of one colour: tanh of the first three of four numbers, times gains.

    Args:
        red: gain of the first; with 0, no latent changes the red.
    """

    latent_size = 4

    def __init__(self, red: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([red, 1.0, 1.0]))
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4) to (B, 3, 8, 8) in [-1, 1]."""
        colours = torch.tanh(0.5 * latents[:, :3] * self.gain + self.shift)
        return colours[:, :, None, None].expand(-1, -1, SIDE, SIDE)


class StyledPainter(Painter):
    """The same with a mapping, which adds 1, and one style per colour."""

    num_ws, style_size = 3, 4

    def map_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, 4) to (B, 4)."""
        return latents + 1

    def synthesise(self, styles: Tensor, noise: Noise = "constant") -> Tensor:
        """(B, 3, 4) to (B, 3, 8, 8); a colour is read from its own style."""
        return self(torch.stack([styles[:, i, i] - 1 for i in range(3)], dim=1))

    def mean_style(self) -> Tensor:
        """Ones."""
        return torch.ones(4)


class Palette(nn.Module):
    """Paints the colour of its class: red, green or blue; the latent makes it lighter or darker."""

    latent_size, num_classes = 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Embedding(3, 3)
        nn.init.eye_(self.colours.weight)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """(B, 2) and (B,) to (B, 3, 8, 8)."""
        colours = torch.tanh(2 * self.colours(labels) - 1 + 0.2 * latents[:, :1])
        return colours[:, :, None, None].expand(-1, -1, SIDE, SIDE)


class ColourGuide:
    """Sees how red a picture is; stands in for a `ConceptGuide` where no text is read."""

    targets = torch.tensor([[1.0, 0.0, 0.0]])

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (B, 3) of the mean colours, from grey."""
        return F.normalize(images.mean(dim=(2, 3)) - 0.5, dim=1)

    def margins(self, embedding: Tensor) -> Tensor:
        """(B, 1), above 0 where a picture is within 45 degrees of red."""
        return 10 * (embedding[:, :1] - 0.7)

    def directions(self) -> Tensor:
        """Away from red."""
        return -self.targets


def red_logits(images: Tensor) -> Tensor:
    """(B,), above 0 where the red is above 0.65."""
    return 20 * (images[:, 0].mean(dim=(1, 2)) - 0.65)


def is_red(images: Tensor) -> Tensor:
    """(B,) bool, whether red leads."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
    return (red > green) & (red > blue)


def painter(red: float = 1.0, **settings: Any) -> ImageGAN:
    """A `Painter` as a model."""
    return ImageGAN(Painter(red), **settings).eval()
