"""BigGAN-deep, built from the paper; reads the published PyTorch weights through `load_gan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from mmforget.errors import ModelError

START = 4
"""Side of the first map."""

REDUCTION = 4
"""Channels of a block by channels between its outer convolutions."""


class Standing(nn.Module):
    """Batch normalisation with one set of statistics per truncation of the latents.

    Args:
        channels: of the maps.
        condition_size: numbers in the condition that gives scale and shift; 0 for learned ones.
        num_statistics: sets, for truncations that divide [0, 1] evenly.
        eps: added to the variance.
    """

    def __init__(self, channels: int, condition_size: int, num_statistics: int, eps: float) -> None:
        super().__init__()
        self.eps, self.conditional = eps, condition_size > 0
        self.running_means: Tensor
        self.running_vars: Tensor
        self.register_buffer("running_means", torch.zeros(num_statistics, channels))
        self.register_buffer("running_vars", torch.ones(num_statistics, channels))
        if self.conditional:
            self.scale = nn.Linear(condition_size, channels, bias=False)
            self.offset = nn.Linear(condition_size, channels, bias=False)
            for layer in (self.scale, self.offset):
                nn.init.orthogonal_(layer.weight)
        else:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """Normalise (B, C, H, W) maps."""
        if self.conditional:
            scale, shift = 1 + self.scale(condition), self.offset(condition)
        else:
            scale, shift = self.weight[None], self.bias[None]
        spread = torch.sqrt(self._at(self.running_vars, truncation) + self.eps)
        mean = self._at(self.running_means, truncation)[:, None, None]
        factor = (scale / spread)[:, :, None, None]
        return (maps - mean) * factor + shift[:, :, None, None]

    @staticmethod
    def _at(statistics: Tensor, truncation: float) -> Tensor:
        place = truncation * (len(statistics) - 1)
        low = math.floor(place + 1e-6)  # 0.58 * 50 is a bit less than 29
        left = place - low
        if left < 1e-6:
            return statistics[low]
        return torch.lerp(statistics[low], statistics[low + 1], left)


class Attention(nn.Module):
    """Attention of every place of a map to a map of half its side.

    Args:
        channels: of the maps, at least 8.

    Reference:
        Zhang et al., Self-attention generative adversarial networks, 2019, arXiv 1805.08318.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """Return (B, C, H, W) maps; condition and truncation are not read."""
        query = self.query(maps).flatten(2)
        key = max_pool2d(self.key(maps), 2).flatten(2)
        value = max_pool2d(self.value(maps), 2).flatten(2)
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=2)
        seen = (value @ weights.transpose(1, 2)).unflatten(2, maps.shape[2:])
        return maps + self.strength * cast(Tensor, self.out(seen))


class Block(nn.Module):
    """A residual block of four convolutions, the outer ones 1x1; its shortcut has no weights.

    Args:
        before: channels of the input.
        after: channels of the output, at most `before`.
        up: double the side.
        condition_size: see `Standing`.
        num_statistics: see `Standing`.
        eps: see `Standing`.
    """

    def __init__(
        self,
        before: int,
        after: int,
        up: bool,
        condition_size: int,
        num_statistics: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.up, self.after = up, after
        inner = before // REDUCTION
        widths = (before, inner, inner, inner)
        self.norms = nn.ModuleList(
            Standing(width, condition_size, num_statistics, eps) for width in widths
        )
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(before, inner, 1),
                nn.Conv2d(inner, inner, 3, padding=1),
                nn.Conv2d(inner, inner, 3, padding=1),
                nn.Conv2d(inner, after, 1),
            ]
        )

    def forward(self, maps: Tensor, condition: Tensor, truncation: float) -> Tensor:
        """Return (B, after, H, W) or (B, after, 2 H, 2 W) maps."""
        shortcut = maps[:, : self.after]
        for number, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            maps = torch.relu(norm(maps, condition, truncation))
            if self.up and number == 1:
                maps = interpolate(maps, scale_factor=2)
            maps = conv(maps)
        if self.up:
            shortcut = interpolate(shortcut, scale_factor=2)
        return maps + shortcut


class BigGANDeep(nn.Module):
    """A class-conditional generator of residual blocks with one layer of self-attention.

    Spectral normalisation, a means of training, is not part of it: weights are stored divided by
    their norms.

    Args:
        latent_size: numbers in a latent.
        num_classes: at least 1; labels are one-hot.
        embedding_size: numbers in the embedding of a class.
        width: unit of the channels, a multiple of 4.
        blocks: per block whether it doubles the side, and its channels before and after in units
            of `width`.
        attention: number of the block before which the attention comes.
        num_statistics: sets of statistics of the normalisations.
        eps: of the normalisations.
        truncation: in [0, 1]: latents are multiplied by it, and the statistics of it are taken.
            The prior of the latents is the normal distribution truncated to [-2, 2] at any value.

    Raises:
        ModelError: a number out of range.

    Reference:
        Brock et al., Large scale GAN training for high fidelity natural image synthesis, 2019,
        arXiv 1809.11096, appendix B.
    """

    def __init__(
        self,
        latent_size: int = 128,
        num_classes: int = 1000,
        embedding_size: int = 128,
        width: int = 128,
        blocks: Sequence[Sequence[int]] = (
            (0, 16, 16), (1, 16, 16), (0, 16, 16), (1, 16, 8), (0, 8, 8), (1, 8, 4), (0, 4, 4),
            (1, 4, 2), (0, 2, 2), (1, 2, 1),
        ),
        attention: int = 8,
        num_statistics: int = 51,
        eps: float = 1e-4,
        truncation: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(latent_size, num_classes, embedding_size) < 1 or num_statistics < 2:
            raise ModelError(
                f"a BigGAN-deep with `latent_size` {latent_size}, `num_classes` {num_classes}, "
                f"`embedding_size` {embedding_size} and `num_statistics` {num_statistics} cannot "
                "be built; sizes must be positive, the statistics at least 2"
            )
        if not blocks or width < REDUCTION or width % REDUCTION or not 0 <= attention < len(blocks):
            raise ModelError(
                f"a BigGAN-deep with `width` {width}, {len(blocks)} `blocks` and `attention` "
                f"{attention} cannot be built; the width must be a multiple of {REDUCTION} and the "
                "attention the number of a block"
            )
        if not 0 <= truncation <= 1:
            raise ModelError(f"`truncation` is {truncation}, it must lie in [0, 1]")
        self.latent_size, self.num_classes, self.truncation = latent_size, num_classes, truncation
        self.resolution = START * 2 ** sum(bool(up) for up, _, _ in blocks)
        condition_size = latent_size + embedding_size
        self.embedding = nn.Linear(num_classes, embedding_size, bias=False)
        self.first_channels = blocks[0][1] * width
        self.first = nn.Linear(condition_size, self.first_channels * START**2)
        layers: list[nn.Module] = []
        for number, (up, before, after) in enumerate(blocks):
            if number == attention:
                layers.append(Attention(before * width))
            layers.append(
                Block(
                    before * width,
                    after * width,
                    bool(up),
                    condition_size,
                    num_statistics,
                    eps,
                )
            )
        self.layers = nn.ModuleList(layers)
        last = blocks[-1][2] * width
        self.norm = Standing(last, 0, num_statistics, eps)
        # the published weights have as many output channels as input channels and use three
        self.to_image = nn.Conv2d(last, max(last, 3), 3, padding=1)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Draw.

        Args:
            latents: (B, latent_size).
            labels: (B, num_classes) one-hot.

        Returns:
            (B, 3, side, side) in [-1, 1].
        """
        condition = torch.cat([latents * self.truncation, self.embedding(labels)], dim=1)
        # the channels are the last dimension of the published weights of this layer
        maps = self.first(condition).unflatten(1, (START, START, self.first_channels))
        maps = maps.permute(0, 3, 1, 2)
        for layer in self.layers:
            maps = layer(maps, condition, self.truncation)
        maps = torch.relu(self.norm(maps, condition, self.truncation))
        return torch.tanh(self.to_image(maps)[:, :3])

    def layer_groups(self) -> dict[str, list[str]]:
        """Parameters of the embedding, the first layer, each block, the attention, the picture."""
        prefixes: dict[str, tuple[str, ...]] = {"embedding": ("embedding.",), "first": ("first.",)}
        blocks = 0
        for number, layer in enumerate(self.layers):
            group = "attention" if isinstance(layer, Attention) else f"block.{blocks}"
            blocks += isinstance(layer, Block)
            prefixes[group] = (f"layers.{number}.",)
        prefixes["to_image"] = ("norm.", "to_image.")
        names = [name for name, _ in self.named_parameters()]
        return {
            group: [name for name in names if name.startswith(wanted)]
            for group, wanted in prefixes.items()
        }
