"""StyleGAN3, built from the paper; reads NVIDIA's weights through `load_gan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, conv2d, leaky_relu, pad

from mmforget.errors import ModelError
from mmforget.models.generators.base import Noise
from mmforget.models.generators.style_layers import SLOPE, SMALL, EqualisedLinear, Mapping

OVERSAMPLING = 2
"""Rate at which the nonlinearity runs, by the larger rate of its input and output."""


@dataclass(frozen=True)
class Band:
    """Which frequencies a map holds; rates in pixels per picture.

    Attributes:
        cutoff: up to it, frequencies pass.
        half_width: of the transition from passing to stopping.
        rate: samples per picture.
        size: side of the map with its margin.
    """

    cutoff: float
    half_width: float
    rate: int
    size: int


class FourierInput(nn.Module):
    """A map of waves over the plane, which a style turns and shifts.

    Args:
        channels: number of waves.
        style_size: numbers in a style.
        band: of the map.
    """

    def __init__(self, channels: int, style_size: int, band: Band) -> None:
        super().__init__()
        self.band = band
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.style = EqualisedLinear(style_size, 4, start=0.0)
        with torch.no_grad():
            self.style.bias[0] = 1.0  # no turn, no shift
        # evenly over the disc of frequencies that the band holds
        angles = 2 * math.pi * torch.rand(channels)
        waves = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.rand(channels, 1).sqrt()
        self.freqs: Tensor
        self.phases: Tensor
        self.transform: Tensor
        self.register_buffer("freqs", waves * band.cutoff)
        self.register_buffer("phases", torch.rand(channels) - 0.5)
        self.register_buffer("transform", torch.eye(3))

    def forward(self, styles: Tensor) -> Tensor:
        """Return (B, channels, size, size) maps of styles (B, style_size)."""
        cosine, sine, right, down = self._motion(styles)
        one, zero = torch.ones_like(cosine), torch.zeros_like(cosine)
        turn = torch.stack([cosine, -sine, zero, sine, cosine, zero, zero, zero, one], dim=1)
        shift = torch.stack([one, zero, -right, zero, one, -down, zero, zero, one], dim=1)
        moved = turn.unflatten(1, (3, 3)) @ shift.unflatten(1, (3, 3)) @ self.transform
        phases = self.phases + (self.freqs @ moved[:, :2, 2:]).squeeze(2)
        freqs = self.freqs @ moved[:, :2, :2]
        # a transform that enlarges could ask for waves that the map cannot hold
        room = self.band.rate / 2 - self.band.cutoff
        loudness = (1 - (freqs.norm(dim=2) - self.band.cutoff) / room).clamp(0, 1)
        extent = 0.5 * self.band.size / self.band.rate
        theta = torch.zeros(1, 2, 3, dtype=styles.dtype, device=styles.device)
        theta[:, 0, 0] = theta[:, 1, 1] = extent
        side = self.band.size
        places = affine_grid(theta, [1, 1, side, side], align_corners=False)
        angles = places.flatten(1, 2) @ freqs.transpose(1, 2) + phases[:, None]
        waves = torch.sin(2 * math.pi * angles) * loudness[:, None]
        mixed = waves @ (self.weight / math.sqrt(len(self.weight))).T
        return mixed.transpose(1, 2).unflatten(2, (side, side))

    def _motion(self, styles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cosine and sine of the turn, and the shift."""
        values = self.style(styles)
        values = values / values[:, :2].norm(dim=1, keepdim=True)
        return values[:, 0], values[:, 1], values[:, 2], values[:, 3]


class FilteredConv(nn.Conv2d):
    """A modulated convolution, then a leaky ReLU between two low-pass filters.

    Args:
        before: channels and band of the input.
        after: channels and band of the output.
        style_size: numbers in a style.
        kernel_size: of the convolution.
        critical: the band fills the whole rate, so that the filter is not radial.
        radial: filters of turning symmetry where possible.
        filter_size: taps of a filter, by the factor of its resampling.
        to_image: the last layer, which has no nonlinearity and is not demodulated.
        clamp: largest absolute value of the output, None for no limit.
    """

    def __init__(
        self,
        before: tuple[int, Band],
        after: tuple[int, Band],
        style_size: int,
        kernel_size: int,
        critical: bool,
        radial: bool,
        filter_size: int,
        to_image: bool,
        clamp: float | None,
    ) -> None:
        (in_channels, source), (out_channels, target) = before, after
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size - 1)
        nn.init.normal_(self.weight)
        nn.init.zeros_(cast(Tensor, self.bias))
        self.style = EqualisedLinear(style_size, in_channels, bias_start=1.0)
        self.to_image, self.clamp = to_image, clamp
        rate = max(source.rate, target.rate) * (1 if to_image else OVERSAMPLING)
        self.up, self.down = rate // source.rate, rate // target.rate
        up_taps = 1 if self.up == 1 else filter_size * self.up
        down_taps = 1 if self.down == 1 else filter_size * self.down
        self.magnitude: Tensor
        self.up_filter: Tensor | None
        self.down_filter: Tensor | None
        self.register_buffer("magnitude", torch.ones(()))
        self.register_buffer("up_filter", _low_pass(up_taps, source, rate, radial=False))
        self.register_buffer(
            "down_filter", _low_pass(down_taps, target, rate, radial and not critical)
        )
        # what the filters and the convolution add and take, so that the output has its size
        total = (target.size - 1) * self.down + 1 + up_taps + down_taps - 2
        total -= (source.size + kernel_size - 1) * self.up
        start = (total + self.up) // 2
        self.margins = (start, total - start)

    def forward(self, maps: Tensor, styles: Tensor) -> Tensor:  # type: ignore[override]
        """Return (B, out_channels, size, size) maps."""
        scales = self.style(styles)
        weight = self.weight
        if self.to_image:
            scales = scales / math.sqrt(weight[0].numel())
        else:
            weight = weight * weight.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
            scales = scales * scales.square().mean(dim=1, keepdim=True).rsqrt()
        maps = maps * (scales * self.magnitude.rsqrt())[:, :, None, None]
        maps = conv2d(maps, weight, padding=self.padding)  # type: ignore[arg-type]
        if not self.to_image:
            squares = weight.square().sum(dim=(2, 3))
            norms = (scales.square() @ squares.T + SMALL).rsqrt()
            maps = maps * norms[:, :, None, None]
        maps = maps + cast(Tensor, self.bias)[:, None, None]
        maps = _stretched(maps, self.up)
        low, high = self.margins
        maps = pad(maps, (low, high, low, high))
        if self.up_filter is not None:
            maps = _filtered(maps, self.up_filter * self.up)
        if not self.to_image:
            maps = leaky_relu(maps, SLOPE) * math.sqrt(2)
        if self.clamp is not None:
            maps = maps.clamp(-self.clamp, self.clamp)
        if self.down_filter is not None:
            maps = _filtered(maps, self.down_filter)
        return maps[:, :, :: self.down, :: self.down]


class StyleGAN3(nn.Module):
    """Waves that styles steer through filtered convolutions, without noise.

    With `kernel_size` 3 and plain filters this is configuration T, with 1 and radial filters
    configuration R. It computes in the type of its weights.

    Args:
        latent_size: numbers in a latent.
        style_size: numbers in a style.
        channels: of the maps, one per layer but the last.
        resolution: side of the picture, a power of two.
        image_channels: 1 or 3.
        num_classes: 0 without classes; labels are one-hot.
        mapping_layers: layers of the mapping.
        mapping_rate: see `EqualisedLinear`.
        kernel_size: 1 or 3.
        radial: filters of turning symmetry.
        critical: last layers whose bands fill their whole rates.
        first_cutoff: cutoff of the first map.
        first_stopband: where the first map's transition ends.
        last_stopband: the same of the picture, by its cutoff.
        margin: pixels around a map.
        filter_size: taps of a filter, by the factor of its resampling.
        output_scale: factor on the picture.
        clamp: largest absolute value of maps, None for no limit.
        label_size: numbers in the embedding of a class; None takes `style_size`.
        mapping_width: of the layers of the mapping but the last; None takes `style_size`.

    Raises:
        ModelError: a number out of range.

    Reference:
        Karras et al., Alias-free generative adversarial networks, 2021, arXiv 2106.12423.
    """

    def __init__(
        self,
        latent_size: int = 512,
        style_size: int = 512,
        channels: Sequence[int] = (
            512, 512, 512, 512, 512, 512, 512, 512, 512, 406, 256, 161, 128, 128,
        ),
        resolution: int = 256,
        image_channels: int = 3,
        num_classes: int = 0,
        mapping_layers: int = 2,
        mapping_rate: float = 0.01,
        kernel_size: int = 3,
        radial: bool = False,
        critical: int = 2,
        first_cutoff: float = 2.0,
        first_stopband: float = 2**2.1,
        last_stopband: float = 2**0.3,
        margin: int = 10,
        filter_size: int = 6,
        output_scale: float = 0.25,
        clamp: float | None = 256.0,
        label_size: int | None = None,
        mapping_width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        layers = len(channels)
        if layers <= critical or min(channels) < 1 or image_channels not in (1, 3):
            raise ModelError(
                f"a StyleGAN3 with `channels` {list(channels)}, `critical` {critical} and "
                f"`image_channels` {image_channels} cannot be built; there must be more layers "
                "than critical ones, and the image's channels must be 1 or 3"
            )
        if resolution < 8 or resolution & (resolution - 1) or kernel_size not in (1, 3):
            raise ModelError(
                f"a StyleGAN3 with `resolution` {resolution} and `kernel_size` {kernel_size} "
                "cannot be built; the first must be a power of two from 8 on, the second 1 or 3"
            )
        self.latent_size, self.style_size, self.num_classes = latent_size, style_size, num_classes
        self.num_ws, self.resolution = layers + 2, resolution
        self.output_scale = output_scale
        self.mapping = Mapping(
            latent_size,
            style_size,
            num_classes,
            mapping_layers,
            mapping_rate,
            label_size,
            mapping_width,
        )
        bands = _bands(
            layers, critical, resolution, first_cutoff, first_stopband, last_stopband, margin
        )
        widths = [*channels, image_channels]
        self.input = FourierInput(widths[0], style_size, bands[0])
        self.layers = nn.ModuleList(
            FilteredConv(
                (widths[max(number - 1, 0)], bands[max(number - 1, 0)]),
                (widths[number], bands[number]),
                style_size,
                kernel_size=1 if number == layers else kernel_size,
                critical=number >= layers - critical,
                radial=radial,
                filter_size=filter_size,
                to_image=number == layers,
                clamp=clamp,
            )
            for number in range(layers + 1)
        )

    def map_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `StyleBased`; labels are (B, num_classes), one-hot."""
        return cast(Tensor, self.mapping(latents, labels))

    def mean_style(self) -> Tensor:
        """See `StyleBased`."""
        return self.mapping.mean

    def synthesise(self, styles: Tensor, noise: Noise = "constant") -> Tensor:
        """Draw (B, image_channels, side, side), about [-1, 1]; there is no noise to choose."""
        maps = self.input(styles[:, 0])
        for number, layer in enumerate(self.layers, start=1):
            maps = layer(maps, styles[:, number])
        return cast(Tensor, maps) * self.output_scale

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw.

        Args:
            latents: (B, latent_size).
            labels: (B, num_classes) one-hot, for a generator with classes.
        """
        styles = self.map_latents(latents, labels)
        return self.synthesise(styles[:, None].expand(-1, self.num_ws, -1))

    def layer_groups(self) -> dict[str, list[str]]:
        """Parameters of the mapping, the input, each layer, and the step to the picture."""
        prefixes = {"mapping": "mapping.", "input": "input."}
        last = len(self.layers) - 1
        prefixes |= {f"block.{number}": f"layers.{number}." for number in range(last)}
        prefixes["to_image"] = f"layers.{last}."
        names = [name for name, _ in self.named_parameters()]
        return {
            group: [name for name in names if name.startswith(prefix)]
            for group, prefix in prefixes.items()
        }


def _bands(
    layers: int,
    critical: int,
    resolution: int,
    first_cutoff: float,
    first_stopband: float,
    last_stopband: float,
    margin: int,
) -> list[Band]:
    """Bands of all maps: cutoffs and stopbands grow geometrically up to the critical layers."""
    last_cutoff = resolution / 2
    bands = []
    for number in range(layers + 1):
        part = min(number / (layers - critical), 1)
        cutoff = first_cutoff * (last_cutoff / first_cutoff) ** part
        stopband = first_stopband * (last_cutoff * last_stopband / first_stopband) ** part
        rate = 2 ** math.ceil(math.log2(min(2 * stopband, resolution)))
        size = resolution if number >= layers - 1 else rate + 2 * margin
        bands.append(Band(cutoff, max(stopband, rate / 2) - cutoff, rate, size))
    return bands


def _low_pass(taps: int, band: Band, rate: int, radial: bool) -> Tensor | None:
    """A Kaiser-windowed low-pass filter: (taps,) separable, (taps, taps) radial, or none."""
    if taps == 1:
        return None
    import numpy
    from scipy import signal, special

    width = 2 * band.half_width
    if not radial:
        kernel = signal.firwin(numtaps=taps, cutoff=band.cutoff, width=width, fs=rate)
        return torch.as_tensor(kernel, dtype=torch.float32)
    places = (numpy.arange(taps) - (taps - 1) / 2) / rate
    radii = numpy.hypot(*numpy.meshgrid(places, places))
    disc = special.j1(2 * band.cutoff * math.pi * radii) / (math.pi * radii)
    beta = signal.kaiser_beta(signal.kaiser_atten(taps, width / (rate / 2)))
    window = numpy.kaiser(taps, beta)
    kernel = disc * numpy.outer(window, window)
    return torch.as_tensor(kernel / kernel.sum(), dtype=torch.float32)


def _stretched(maps: Tensor, factor: int) -> Tensor:
    """Put factor - 1 zeros behind each value of (B, C, H, W), along both sides."""
    if factor == 1:
        return maps
    height, width = maps.shape[2:]
    maps = pad(maps[:, :, :, None, :, None], (0, factor - 1, 0, 0, 0, factor - 1))
    return maps.reshape(*maps.shape[:2], height * factor, width * factor)


def _filtered(maps: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of (B, C, H, W) with a filter of one or two dimensions."""
    kernel = kernel.to(maps.dtype)
    channels = maps.shape[1]
    if kernel.ndim == 2:
        return conv2d(maps, kernel.flip(0, 1).expand(channels, 1, -1, -1), groups=channels)
    rows = kernel.flip(0).expand(channels, 1, 1, -1)
    maps = conv2d(maps, rows, groups=channels)
    return conv2d(maps, rows.transpose(2, 3), groups=channels)
