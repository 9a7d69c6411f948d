"""StyleGAN2, built from the papers; reads the weights of others through `load_gan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from mmforget.errors import ModelError
from mmforget.models.generators.base import Noise
from mmforget.models.generators.style_layers import SMALL, EqualisedLinear, Mapping, activated

START = 4
"""Side of the first map."""


class ModulatedConv(nn.Conv2d):
    """A convolution whose input channels are scaled by a style, and whose output has size one.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: 1 or 3.
        style_size: numbers in a style.
        demodulate: divide each output channel by the norm of its scaled weights.
        equalised: multiply stored weights by 1 / sqrt(fan in).

    Reference:
        Karras et al., Analyzing and improving the image quality of StyleGAN, 2020,
        arXiv 1912.04958, section 2.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_size: int,
        demodulate: bool,
        equalised: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.normal_(self.weight)
        nn.init.zeros_(cast(Tensor, self.bias))
        self.style = EqualisedLinear(style_size, in_channels, bias_start=1.0)
        self.demodulate = demodulate
        self.factor = 1 / math.sqrt(in_channels * kernel_size**2) if equalised else 1.0

    def modulated(self, maps: Tensor, styles: Tensor, up: bool) -> Tensor:
        """Convolve (B, C, H, W) maps, without the bias; with `up` the side becomes 2 H + 1."""
        # scaling the maps instead of the weights spares one set of weights per picture
        weight = self.weight * self.factor
        scales = self.style(styles)
        maps = maps * scales[:, :, None, None]
        if up:
            maps = conv_transpose2d(maps, weight.transpose(0, 1), stride=2)
        else:
            maps = conv2d(maps, weight, padding=self.padding)  # type: ignore[arg-type]
        if self.demodulate:
            squares = weight.square().sum(dim=(2, 3))
            norms = (scales.square() @ squares.T + SMALL).rsqrt()
            maps = maps * norms[:, :, None, None]
        return maps


class StyledConv(ModulatedConv):
    """A modulated 3x3 convolution, noise, bias, leaky ReLU; doubles the side where asked.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        resolution: side of the output.
        style_size: numbers in a style.
        up: double the side.
        equalised: see `ModulatedConv`.
        clamp: largest absolute value of the output, None for no limit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        style_size: int,
        up: bool,
        equalised: bool,
        clamp: float | None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, style_size, True, equalised)
        self.up = up
        self.clamp = clamp
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.noise: Tensor
        self.register_buffer("noise", torch.randn(resolution, resolution))

    def forward(  # type: ignore[override]
        self, maps: Tensor, styles: Tensor, noise: Noise, low_pass: Tensor
    ) -> Tensor:
        """Return (B, out_channels, resolution, resolution) maps."""
        maps = self.modulated(maps, styles, self.up)
        if self.up:
            maps = smoothed(maps, low_pass)
        if noise == "constant":
            maps = maps + self.noise * self.noise_strength
        elif noise == "random":
            drawn = torch.randn_like(maps[:, :1])
            maps = maps + drawn * self.noise_strength
        maps = activated(maps + cast(Tensor, self.bias)[:, None, None])
        return maps if self.clamp is None else maps.clamp(-self.clamp, self.clamp)


class ToImage(ModulatedConv):
    """From maps to a picture: a modulated 1x1 convolution that is not demodulated.

    Args:
        in_channels: of the maps.
        image_channels: of the picture.
        style_size: numbers in a style.
        clamp: largest absolute value of the output, None for no limit.
    """

    def __init__(
        self, in_channels: int, image_channels: int, style_size: int, clamp: float | None
    ) -> None:
        super().__init__(in_channels, image_channels, 1, style_size, False, equalised=True)
        self.clamp = clamp

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:  # type: ignore[override]
        """Return (B, image_channels, H, W)."""
        image = self.modulated(maps, styles, up=False) + cast(Tensor, self.bias)[:, None, None]
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class StyleGAN2(nn.Module):
    """Styles steer convolutions at growing sizes; the pictures of all sizes are summed up.

    This is the generator with skip connections, which all published checkpoints have. It computes
    in the type of its weights: the half precision that official training may use is left out.

    Args:
        latent_size: numbers in a latent.
        style_size: numbers in a style.
        channels: of the maps of 4x4, 8x8, ...; their number sets the side of the picture,
            2 ** (len(channels) + 1).
        image_channels: 1 or 3.
        num_classes: 0 without classes; labels are one-hot.
        mapping_layers: layers of the mapping; 8 in the first paper, 2 in many later trainings.
        mapping_rate: see `EqualisedLinear`.
        equalised: multiply stored weights of convolutions by 1 / sqrt(fan in), as in the first
            paper. It makes no difference to what is drawn after demodulation, but to training.
        clamp: largest absolute value of maps, None for no limit.
        low_pass: filter, in one dimension, of every doubling.
        label_size: numbers in the embedding of a class; None takes `style_size`.
        mapping_width: of the layers of the mapping but the last; None takes `style_size`.

    Raises:
        ModelError: a number out of range.

    Reference:
        Karras et al., Analyzing and improving the image quality of StyleGAN, 2020,
        arXiv 1912.04958; Karras et al., Training generative adversarial networks with limited
        data, 2020, arXiv 2006.06676.
    """

    def __init__(
        self,
        latent_size: int = 512,
        style_size: int = 512,
        channels: Sequence[int] = (512, 512, 512, 512, 256, 128, 64),
        image_channels: int = 3,
        num_classes: int = 0,
        mapping_layers: int = 8,
        mapping_rate: float = 0.01,
        equalised: bool = False,
        clamp: float | None = None,
        low_pass: Sequence[float] = (1, 3, 3, 1),
        label_size: int | None = None,
        mapping_width: int | None = None,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or image_channels not in (1, 3) or len(low_pass) != 4:
            raise ModelError(
                f"a StyleGAN2 with `channels` {list(channels)}, `image_channels` {image_channels} "
                f"and `low_pass` {list(low_pass)} cannot be built; channels must be positive, the "
                "image's 1 or 3, the filter four numbers"
            )
        self.latent_size, self.style_size, self.num_classes = latent_size, style_size, num_classes
        self.num_ws = 2 * len(channels)
        self.resolution = START * 2 ** (len(channels) - 1)
        self.mapping = Mapping(
            latent_size,
            style_size,
            num_classes,
            mapping_layers,
            mapping_rate,
            label_size,
            mapping_width,
        )
        self.const = nn.Parameter(torch.randn(channels[0], START, START))
        first = StyledConv(channels[0], channels[0], START, style_size, False, equalised, clamp)
        blocks = [nn.ModuleList([first])]
        for number, (before, after) in enumerate(pairwise(channels), start=1):
            side = START * 2**number
            blocks.append(
                nn.ModuleList(
                    [
                        StyledConv(before, after, side, style_size, True, equalised, clamp),
                        StyledConv(after, after, side, style_size, False, equalised, clamp),
                    ]
                )
            )
        self.blocks = nn.ModuleList(blocks)
        self.to_image = nn.ModuleList(
            ToImage(width, image_channels, style_size, clamp) for width in channels
        )
        taps = torch.tensor(low_pass, dtype=torch.float32)
        self.low_pass: Tensor
        # zeros lie between the values of a doubled map, hence the four
        self.register_buffer(
            "low_pass", 4 * torch.outer(taps, taps) / taps.sum() ** 2, persistent=False
        )

    def map_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `StyleBased`; labels are (B, num_classes), one-hot."""
        return cast(Tensor, self.mapping(latents, labels))

    def mean_style(self) -> Tensor:
        """See `StyleBased`."""
        return self.mapping.mean

    def synthesise(self, styles: Tensor, noise: Noise = "constant") -> Tensor:
        """Draw (B, image_channels, side, side), about [-1, 1]; see `StyleBased`."""
        maps = self.const.expand(styles.shape[0], -1, -1, -1)
        image: Tensor | None = None
        layer = 0
        for block, to_image in zip(self.blocks, self.to_image, strict=True):
            for convolution in cast(nn.ModuleList, block):
                maps = convolution(maps, styles[:, layer], noise, self.low_pass)
                layer += 1
            # this style also steers the first convolution of the next block
            drawn = to_image(maps, styles[:, layer])
            image = drawn if image is None else doubled(image, self.low_pass) + drawn
        return cast(Tensor, image)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw with the constant noise.

        Args:
            latents: (B, latent_size).
            labels: (B, num_classes) one-hot, for a generator with classes.
        """
        styles = self.map_latents(latents, labels)
        return self.synthesise(styles[:, None].expand(-1, self.num_ws, -1))

    def layer_groups(self) -> dict[str, list[str]]:
        """Parameters of the mapping, the constant, and each size's maps and picture."""
        prefixes = {"mapping": "mapping.", "const": "const"}
        for number in range(len(self.blocks)):
            side = START * 2**number
            prefixes[f"block.{side}"] = f"blocks.{number}."
            prefixes[f"to_image.{side}"] = f"to_image.{number}."
        names = [name for name, _ in self.named_parameters()]
        return {
            group: [name for name in names if name.startswith(prefix)]
            for group, prefix in prefixes.items()
        }


def smoothed(maps: Tensor, low_pass: Tensor) -> Tensor:
    """Filter each channel of (B, C, H, W); the sides become shorter by one."""
    channels = maps.shape[1]
    kernel = low_pass.flip(0, 1).to(maps.dtype).expand(channels, 1, -1, -1)
    return conv2d(maps, kernel, padding=1, groups=channels)


def doubled(image: Tensor, low_pass: Tensor) -> Tensor:
    """Double the side of (B, C, H, W) by zeros between the values and a filter."""
    channels = image.shape[1]
    kernel = low_pass.to(image.dtype).expand(channels, 1, -1, -1)
    return conv_transpose2d(image, kernel, stride=2, padding=1, groups=channels)
