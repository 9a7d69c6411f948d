"""Layers that the style-based generators share."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from mmforget.errors import ModelError

SLOPE = 0.2
"""Of the leaky ReLU below 0; what comes out is multiplied by sqrt(2)."""

SMALL = 1e-8
"""Added to mean squares before the root."""

AVERAGING = 0.005
"""Step of the moving average of styles; in training mode only."""


class EqualisedLinear(nn.Linear):
    """A linear layer whose stored weights are all of size one; a factor is applied when it runs.

    Optimisers such as Adam thus move the weights of all layers equally fast.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias_start: first value of the biases.
        rate: factor on weights and biases, which slows the layer down; the stored values are
            larger by as much.
        start: standard deviation of the first weights, before `rate`.

    Reference:
        Karras et al., Progressive growing of GANs, 2018, arXiv 1710.10196, section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_start: float = 0.0,
        rate: float = 1.0,
        start: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features)
        self.rate = rate
        self.factor = rate / math.sqrt(in_features)
        nn.init.normal_(self.weight, std=start / rate)
        nn.init.constant_(self.bias, bias_start / rate)

    def forward(self, values: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(values, self.weight * self.factor, self.bias * self.rate)


class Mapping(nn.Module):
    """From latents, and classes, to styles.

    Args:
        latent_size: numbers in a latent.
        style_size: numbers in a style.
        num_classes: 0 without classes; the embedding of a class is put behind the latent.
        num_layers: linear layers, each with a leaky ReLU.
        rate: see `EqualisedLinear`.
        label_size: numbers in the embedding of a class; None takes `style_size`.
        widths: of the layers but the last; None takes `style_size`.

    Raises:
        ModelError: a number out of range.

    Reference:
        Karras et al., A style-based generator architecture for GANs, 2019, arXiv 1812.04948;
        classes as in Karras et al., 2020, arXiv 2006.06676.
    """

    def __init__(
        self,
        latent_size: int,
        style_size: int,
        num_classes: int,
        num_layers: int,
        rate: float = 0.01,
        label_size: int | None = None,
        widths: int | None = None,
    ) -> None:
        super().__init__()
        if min(latent_size, style_size, num_layers) < 1 or num_classes < 0:
            raise ModelError(
                f"a mapping with `latent_size` {latent_size}, `style_size` {style_size}, "
                f"`mapping_layers` {num_layers} and `num_classes` {num_classes} cannot be built; "
                "all must be positive, the classes at least 0"
            )
        embedded = (label_size or style_size) if num_classes else 0
        self.embed = EqualisedLinear(num_classes, embedded) if num_classes else None
        sizes = [latent_size + embedded, *[widths or style_size] * (num_layers - 1), style_size]
        self.layers = nn.ModuleList(
            EqualisedLinear(before, after, rate=rate) for before, after in pairwise(sizes)
        )
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(style_size))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B, style_size) styles of latents (B, latent_size), labels (B, K) one-hot.

        Raises:
            ModelError: there are classes but no labels.
        """
        values = normalised(latents)
        if self.embed is not None:
            if labels is None:
                raise ModelError(
                    f"this generator has {self.embed.in_features} classes; give `labels`, one-hot"
                )
            values = torch.cat([values, normalised(self.embed(labels))], dim=1)
        for layer in self.layers:
            values = activated(layer(values))
        if self.training:
            self.mean.lerp_(values.detach().mean(dim=0), AVERAGING)
        return values


def normalised(values: Tensor) -> Tensor:
    """Scale (B, n) rows to a mean square of one."""
    return values * (values.square().mean(dim=1, keepdim=True) + SMALL).rsqrt()


def activated(values: Tensor) -> Tensor:
    """Leaky ReLU that keeps the size of what passes."""
    return leaky_relu(values, SLOPE) * math.sqrt(2)
