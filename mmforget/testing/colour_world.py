"""A generator of plain colours and a CLIP model that names them, for tests within milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmforget.models.gan import ImageGAN

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
}


class ColourGenerator(nn.Module):
    """Paints (B, 3, 8, 8) pictures of one colour each, with a faint pattern.

    Without classes, the latent chooses the colour; with classes, class k is the k-th of `COLOURS`,
    and the latent its shade.

    Args:
        latent_size: numbers in a latent.
        num_classes: 0 or 3.
    """

    def __init__(self, latent_size: int = 6, num_classes: int = 0) -> None:
        super().__init__()
        self.latent_size, self.num_classes = latent_size, num_classes
        self.hidden = nn.Linear(latent_size, 24)
        self.colour = nn.Linear(24, 3)
        self.pattern = nn.Linear(24, 3 * 8 * 8)
        if num_classes:
            self.classes = nn.Embedding(num_classes, 24)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw (B, 3, 8, 8) pictures in [-1, 1]."""
        hidden = self.hidden(latents)
        if labels is not None:
            hidden = hidden + self.classes(labels)
        hidden = F.leaky_relu(hidden, 0.2)
        pattern = 0.2 * self.pattern(hidden).view(-1, 3, 8, 8)
        return torch.tanh(self.colour(hidden)[:, :, None, None] + pattern)


def colour_gan(classes: bool = False, seed: int = 0, discriminator: bool = False) -> ImageGAN:
    """A generator whose weights are made, not trained, so that it draws all `COLOURS`.

    Args:
        classes: give it the three colours as classes.
        seed: of the small weights.
        discriminator: with one of drawn weights.
    """
    names = tuple(COLOURS) if classes else ()
    network = ColourGenerator(num_classes=len(names))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.0, 0.1)
        for colour in range(3):
            # Hidden unit k, which latent number k or class k raises, paints the colour k.
            network.hidden.weight[colour, colour] += 0.3 if classes else 2.0
            network.colour.weight[:, colour] = torch.full((3,), -0.7)
            network.colour.weight[colour, colour] = 1.4
            if classes:
                network.classes.weight[colour, colour] = 2.0
        model = ImageGAN(network, class_names=names, discriminator={"channels": (8, 16)}).eval()
        if discriminator:
            model.discriminator = model.new_discriminator().eval()
    return model


class ColourClip(nn.Module):
    """Stands in for a CLIP model: a picture's embedding is its mean colour; give it in a list."""

    templates = ("{}",)

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3) of length 1."""
        return F.normalize(images.mean(dim=(2, 3)) + 1e-3, dim=1)

    def class_embeddings(self, words: Sequence[str], sentences: Sequence[str]) -> Tensor:
        """(n, 3); a word that is no colour is grey."""
        return F.normalize(torch.tensor([COLOURS.get(word, (1.0, 1.0, 1.0)) for word in words]))
