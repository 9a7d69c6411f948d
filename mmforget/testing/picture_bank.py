"""A generator that needs no training: it shows one of some pictures, whose facts are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmforget.data.digit_world import VARIANTS, facts, render, stage_strokes
from mmforget.models.gan import ImageGAN


class PictureBank(nn.Module):
    """Shows the picture whose number in the latent is the largest; differentiable, since softly.

    Args:
        pictures: how many there are; as many numbers has a latent.
        side: of a picture in pixels.
        sharpness: how hard the choice is; at 30, nearly every picture is one of the bank.

    Attributes:
        pictures: (K, 3, side, side) in [-1, 1], what is trained.
        preference: (K,) what is added to a latent; -inf never shows a picture.
    """

    def __init__(self, pictures: int = 40, side: int = 32, sharpness: float = 30.0) -> None:
        super().__init__()
        self.latent_size, self.num_classes, self.sharpness = pictures, 0, sharpness
        self.pictures = nn.Parameter(torch.zeros(pictures, 3, side, side))
        self.preference = nn.Parameter(torch.zeros(pictures))

    def forward(self, latents: Tensor) -> Tensor:
        """Draw (B, 3, side, side) of latents (B, K)."""
        weights = (self.sharpness * (latents + self.preference)).softmax(dim=1)
        return torch.einsum("bk,kchw->bchw", weights, self.pictures).clamp(-1, 1)


def digit_bank(per_digit: int = 4, without: Sequence[str] = ()) -> tuple[ImageGAN, tuple[str, ...]]:
    """A bank of pictures of the digit world.

    Args:
        per_digit: pictures of each digit.
        without: digits that it does not have.

    Returns:
        The generator, and per picture its digit.
    """
    from mmforget.data.digit_world import DIGITS

    strokes = stage_strokes()["train"]
    known = facts(strokes * VARIANTS)
    chosen, names = [], []
    for digit in DIGITS:
        own = [int(s) for s, fact in zip(strokes, known, strict=True) if fact.digit == digit]
        for number in range(per_digit):
            chosen.append(own[number] * VARIANTS + number)
            names.append(digit)
    model = ImageGAN(
        "mmforget.testing.picture_bank.PictureBank", network_args={"pictures": len(chosen)}
    )
    with torch.no_grad():
        model.network.pictures.copy_(render(np.array(chosen)).float() / 127.5 - 1)
        for row, name in enumerate(names):
            if name in without:
                model.network.preference[row] = -1e4
    return model.eval(), tuple(names)
