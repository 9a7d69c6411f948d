"""What generator networks offer beyond being called with a latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Noise = Literal["constant", "random", "none"]


@runtime_checkable
class StyleBased(Protocol):
    """A generator in two parts: a mapping to styles, and a synthesis network that reads them.

    Attributes:
        num_ws: styles that the synthesis network reads, one per layer.
        style_size: numbers in a style.
    """

    num_ws: int
    style_size: int

    def map_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B, style_size) styles of latents (B, latent_size)."""
        ...

    def synthesise(self, styles: Tensor, noise: Noise = "constant") -> Tensor:
        """Return images of styles (B, num_ws, style_size).

        Args:
            styles: one per layer.
            noise: ``constant`` is part of the weights, ``random`` is drawn from torch's global
                generator, ``none`` leaves it out. Compare models with ``constant`` only.
        """
        ...

    def mean_style(self) -> Tensor:
        """Return the (style_size,) mean style of the training."""
        ...


@runtime_checkable
class HasLayerGroups(Protocol):
    """A generator that says itself which of its parameters belong together."""

    def layer_groups(self) -> Mapping[str, list[str]]:
        """Return per group, in forward order, the names of its parameters."""
        ...
