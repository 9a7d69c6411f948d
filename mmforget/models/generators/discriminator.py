"""The discriminator that trains our own generators."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from mmforget.errors import ModelError


class ProjectionDiscriminator(nn.Module):
    """Strided convolutions with spectral normalisation; classes enter by projection.

    Args:
        resolution: side of the pictures, a multiple of 2 ** len(channels).
        channels: of the maps; each halves the side.
        image_channels: 1 or 3.
        num_classes: 0 without classes.
        slope: of the leaky ReLU below 0.

    Raises:
        ModelError: a resolution that cannot be halved so often.

    Reference:
        Miyato et al., Spectral normalization for generative adversarial networks, 2018,
        arXiv 1802.05957; Miyato and Koyama, cGANs with projection discriminator, 2018,
        arXiv 1802.05637.
    """

    def __init__(
        self,
        resolution: int = 32,
        channels: Sequence[int] = (32, 64, 128),
        image_channels: int = 3,
        num_classes: int = 0,
        slope: float = 0.1,
    ) -> None:
        super().__init__()
        side, left_over = divmod(resolution, 2 ** len(channels))
        if left_over or side < 1:
            raise ModelError(
                f"the discriminator cannot halve pictures of {resolution} pixels {len(channels)} "
                "times; give fewer `channels`"
            )
        self.num_classes, self.slope = num_classes, slope
        widths = [image_channels, *channels]
        self.downs = nn.ModuleList(
            spectral_norm(nn.Conv2d(width, after, 4, stride=2, padding=1))
            for width, after in pairwise(widths)
        )
        self.num_features = channels[-1] * side**2
        self.last = spectral_norm(nn.Linear(self.num_features, 1))
        if num_classes:
            self.classes = spectral_norm(nn.Embedding(num_classes, self.num_features))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B,) scores of images (B, C, H, W) in [-1, 1]; higher is more like real ones."""
        maps = images
        for down in self.downs:
            maps = leaky_relu(down(maps), self.slope)
        features = maps.flatten(1)
        scores: Tensor = self.last(features).squeeze(1)
        if self.num_classes:
            scores = scores + (self.classes(labels) * features).sum(1)
        return scores
