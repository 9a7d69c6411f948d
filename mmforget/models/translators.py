"""Picture-to-picture networks that are put in front of a frozen network."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmforget.errors import ConfigurationError, MissingFileError, suggest
from mmforget.seeds import derive

TranslatorNetwork = Literal["small", "resnet18", "resnet34"]
Fusion = Literal["multiply", "none", "average", "spatial_attention"]

NEUTRAL = 4.0
"""Bias with which a fresh translator starts where it can be neutral: sigmoid(4) = 0.982."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels that the encoder sees, as the ImageNet weights want them."""


class Translator(nn.Module):
    """A U-Net that rewrites a picture before another network sees it.

    With x the picture in [0, 1] and T(x) in (0, 1) the sigmoid of what the U-Net gives, the
    translated picture x' is, per fusion:

    * ``multiply``: clip(x * T(x), 0, 1). It can darken, and cannot brighten.
    * ``none``: T(x).
    * ``average``: (x + T(x)) / 2.
    * ``spatial_attention``: x + A * (T(x) - x), where A (B, 1, H, W) is the sigmoid of a 7x7
      convolution over four planes: mean and maximum over the channels of x, and of T(x).

    A fresh translator is nearly neutral in two of them: the last bias starts at 4 for ``multiply``,
    so that x' is about 0.98 x, and at -4 in the attention of ``spatial_attention``, so that x' is
    within 0.02 of x. With ``none`` and ``average`` it starts from grey: T(x) is about 0.5.

    Any height and width will do: the picture is extended at its right and lower edge, and what the
    network gives there is cut off. A single channel is repeated to three.

    Differs from the paper: layers are normalised per picture (GroupNorm), or with the fixed
    statistics of the ImageNet weights, so that a picture's result depends neither on the batch nor
    on the number of processes; the last block of the decoder also sees the picture itself.

    Args:
        network: encoder: ``resnet34`` (paper) or ``resnet18`` of torchvision, depth 5; ``small``
            has `levels` levels of plain convolutions, for small pictures.
        fusion: see above.
        width: channels of the first level of ``small``, doubled at each further one.
        levels: of ``small``; each halves the resolution.
        pretrained: ImageNet weights for the encoder (a download, unless cached).
        frozen_norm: fixed statistics in the encoder; always so with `pretrained`.

    Raises:
        ConfigurationError: a setting out of range.
        MissingFileError: the weights cannot be fetched.

    Reference:
        Medeiros et al., Modality Translation for Object Detection Adaptation Without Forgetting
        Prior Knowledge, ECCV 2024, arXiv 2404.01492; Ronneberger et al., U-Net, MICCAI 2015,
        arXiv 1505.04597; attention after Woo et al., CBAM, ECCV 2018, arXiv 1807.06521.
    """

    def __init__(
        self,
        network: TranslatorNetwork = "resnet34",
        fusion: Fusion = "multiply",
        width: int = 16,
        levels: int = 3,
        pretrained: bool = False,
        frozen_norm: bool = False,
    ) -> None:
        super().__init__()
        for name, value, valid in (
            ("network", network, get_args(TranslatorNetwork)),
            ("fusion", fusion, get_args(Fusion)),
        ):
            if value not in valid:
                raise ConfigurationError(f"`{name}` is '{value}', {suggest(value, valid)}")
        for name, number in (("width", width), ("levels", levels)):
            if number < 1:
                raise ConfigurationError(f"`{name}` is {number}, it must be at least 1")
        if network == "small" and (pretrained or frozen_norm):
            raise ConfigurationError(
                "there are no ImageNet weights for `network` 'small'; leave `pretrained` and "
                "`frozen_norm` out, or take 'resnet34'"
            )
        self.settings: dict[str, Any] = {
            "network": network,
            "fusion": fusion,
            "width": width,
            "levels": levels,
            "frozen_norm": pretrained or frozen_norm,
        }
        self.fusion: Fusion = fusion
        self.encoder: SmallEncoder | ResNetEncoder
        if network == "small":
            self.encoder = SmallEncoder(width, levels)
            widths = self.encoder.channels[-2::-1]
        else:
            self.encoder = ResNetEncoder(network, pretrained, pretrained or frozen_norm)
            widths = [256, 128, 64, 32, 16]
        self.decoder = Decoder(self.encoder.channels, widths)
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.attention = nn.Conv2d(4, 1, 7, padding=3) if fusion == "spatial_attention" else None
        self._start()

    def _start(self) -> None:
        """Small last weights and the bias of the neutral picture; not zero, so that all learn."""
        starts = [(self.last, NEUTRAL if self.fusion == "multiply" else 0.0)]
        if self.attention is not None:
            starts.append((self.attention, -NEUTRAL))
        for layer, bias in starts:
            nn.init.normal_(layer.weight, std=1e-3)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

    def drawn(self, images: Tensor) -> Tensor:
        """T(x): (B, 3, H, W) in (0, 1)."""
        height, width = images.shape[-2:]
        step = self.encoder.step
        mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
        padded = F.pad(
            (images - mean) / std, (0, -width % step, 0, -height % step), mode="replicate"
        )
        found = self.last(self.decoder(self.encoder(padded)))
        return cast(Tensor, found)[..., :height, :width].sigmoid()

    def forward(self, images: Tensor) -> Tensor:
        """Translate pictures.

        Args:
            images: (B, 3, H, W) or (B, 1, H, W) in [0, 1].

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.fuse(images, self.drawn(images))

    def fuse(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Put together x and T(x), see above; all are (B, 3, H, W) in [0, 1]."""
        if self.fusion == "multiply":
            return (images * drawn).clamp(0, 1)
        if self.fusion == "none":
            return drawn
        if self.fusion == "average":
            return (images + drawn) / 2
        assert self.attention is not None  # there is one with this fusion
        planes = [
            plane
            for picture in (images, drawn)
            for plane in (picture.mean(1, keepdim=True), picture.amax(1, keepdim=True))
        ]
        return images + self.attention(torch.cat(planes, 1)).sigmoid() * (drawn - images)

    @classmethod
    def seeded(cls, seed: int, **settings: Any) -> Self:
        """Build one whose weights a seed decides; the global generator is left as it is.

        Args:
            seed: base of the draw.
            settings: arguments of the class.
        """
        with torch.random.fork_rng(devices=[]):  # networks are built on the CPU
            torch.default_generator.manual_seed(derive(seed, "translator"))
            return cls(**settings)

    def fresh(self, seed: int) -> Self:
        """Build the same network with newly drawn weights."""
        return type(self).seeded(seed, **self.settings)


def _normalised(channels: int) -> nn.Module:
    """GroupNorm with at most 8 groups that divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _block(inputs: int, outputs: int, stride: int = 1, normalise: bool = True) -> nn.Sequential:
    """Two 3x3 convolutions, the first with a stride, each followed by ReLU."""
    layers: list[nn.Module] = []
    for first, step in ((inputs, stride), (outputs, 1)):
        layers.append(nn.Conv2d(first, outputs, 3, step, padding=1, bias=not normalise))
        layers += [_normalised(outputs)] if normalise else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class SmallEncoder(nn.Module):
    """Plain convolutions; each level halves the resolution and doubles the channels.

    Args:
        width: channels at full resolution.
        levels: number of halvings.

    Attributes:
        channels: of the features, from full resolution down.
        step: heights and widths must be multiples of it.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.channels = [width * 2**level for level in range(levels + 1)]
        self.step = 2**levels
        # not normalised: how bright a picture is must reach the end
        self.stem = _block(3, width, normalise=False)
        self.stages = nn.ModuleList(
            _block(self.channels[level], self.channels[level + 1], stride=2)
            for level in range(levels)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of (B, 3, H, W), from full resolution down."""
        found = [self.stem(images)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found


class ResNetEncoder(nn.Module):
    """The five stages of a ResNet of torchvision, and the picture itself before them.

    Args:
        name: ``resnet18`` or ``resnet34``.
        pretrained: take the ImageNet weights.
        frozen_norm: fixed statistics instead of GroupNorm.

    Attributes:
        channels, step: see `SmallEncoder`.

    Raises:
        MissingFileError: the weights cannot be fetched.
    """

    def __init__(self, name: str, pretrained: bool, frozen_norm: bool) -> None:
        super().__init__()
        from torchvision import models
        from torchvision.ops import FrozenBatchNorm2d

        try:
            network: Any = models.get_model(
                name,
                weights="IMAGENET1K_V1" if pretrained else None,
                norm_layer=FrozenBatchNorm2d if frozen_norm else _normalised,
            )
        except OSError as error:
            raise MissingFileError(
                f"the ImageNet weights of '{name}' cannot be fetched ({error}); check the "
                "connection, or leave `pretrained` out"
            ) from error
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(network.maxpool, network.layer1),
                network.layer2,
                network.layer3,
                network.layer4,
            ]
        )
        self.channels = [3, 64, 64, 128, 256, 512]
        self.step = 32

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of (B, 3, H, W), from full resolution down."""
        found = [images, self.stem(images)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found


class Decoder(nn.Module):
    """From the deepest features up to full resolution, joined by the encoder's at each level.

    Args:
        channels: of the encoder's features, from full resolution down.
        widths: channels of the blocks, from the deepest up; one less than `channels`.
    """

    def __init__(self, channels: list[int], widths: list[int]) -> None:
        super().__init__()
        inputs = [channels[-1], *widths]
        skips = channels[-2::-1]
        self.blocks = nn.ModuleList(
            # the last block is not normalised: how bright the picture is must come out
            _block(inputs[i] + skips[i], widths[i], normalise=i < len(widths) - 1)
            for i in range(len(widths))
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """(B, C, H, W) at full resolution."""
        found = features[-1]
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            raised = F.interpolate(found, scale_factor=2.0, mode="nearest")
            found = block(torch.cat([raised, skip], 1))
        return found
