"""Pictures that prove nothing: black, constant, mere noise, or not touched at all.

A model that paints nothing shows no forbidden concept either, and a model that changes nothing
preserves everything. Rates of such pictures belong beside every rate of a judge.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from mmforget.errors import ConfigurationError, DataError

LEVEL = 1 / 255
"""One step of an 8-bit picture: what differs by less is the same when it is saved."""

CONSTANT_RANGE = 2 * LEVEL
"""Largest difference between two places of a channel in a constant picture."""

NOISE_CORRELATION = 0.3
"""Correlation of neighbouring pixels below which a picture is noise. It is 0 on average for white
noise of any distribution (at most 0.05 in 1,000 noise pictures of 32x32) and at least 0.94 in the
908 test pictures of the digit world (`tests/metrics/test_vacuous.py`).

A latent diffusion model that has collapsed paints no white noise, but noise decoded by its
autoencoder, which is smooth at the scale of pixels: 0.8 to 0.97 in the digit world. To find it,
take the threshold from pictures of the original model, see `noise_threshold`."""

KINDS = ("black", "constant", "noise")


def neighbour_correlation(images: Tensor, cell: int = 1) -> Tensor:
    """Mean correlation of horizontally and vertically neighbouring pixels, channels pooled.

    Every channel is centred by its own mean; the products of neighbours are then averaged over
    places and channels and divided by the variance.

    Args:
        images: (B, C, H, W).
        cell: side of the squares that are averaged to one pixel first.

    Returns:
        (B,) float64; NaN for constant pictures.
    """
    coarse = F.avg_pool2d(images.double(), cell)
    centred = coarse - coarse.mean((2, 3), keepdim=True)
    beside = (centred[..., 1:] * centred[..., :-1]).mean((1, 2, 3))
    below = (centred[..., 1:, :] * centred[..., :-1, :]).mean((1, 2, 3))
    return (beside + below) / 2 / centred.square().mean((1, 2, 3))


def noise_threshold(reference: Tensor, cell: int = 2) -> float:
    """Smallest correlation among pictures that do show something, not above 1.

    With pictures of the digit world and cells of 2 pixels it is 0.80; of decoded noise, 9 in 10
    lie below (`tests/metrics/test_vacuous.py`).

    Args:
        reference: (B, 3, H, W) in [0, 1], such as pictures of the original model for the same
            prompts; the more, the safer against false alarms.
        cell: see `neighbour_correlation`.

    Raises:
        DataError: there are no pictures, or one of them is constant.
    """
    found = neighbour_correlation(reference, cell)
    if not len(found) or found.isnan().any():
        raise DataError(
            f"{int(found.isnan().sum())} of {len(found)} reference pictures are constant; give "
            "at least one picture, all of which show something"
        )
    return float(found.min())


def vacuous(
    images: Tensor, noise_below: float = NOISE_CORRELATION, cell: int = 1
) -> dict[str, Tensor]:
    """Say of every picture whether it shows nothing.

    Args:
        images: (B, 3, H, W) in [0, 1], H and W at least 2 cells.
        noise_below: threshold of the `neighbour_correlation`.
        cell: see there.

    Returns:
        Of shape (B,), bool: ``black``, no value above 1/255; ``constant``, no channel varies by
        more than 2/255 (black ones included); ``noise``, not constant and with a
        `neighbour_correlation` below the threshold.

    Raises:
        DataError: another shape, values that are not finite, or values outside of [0, 1].
    """
    if images.ndim != 4 or min(images.shape[-2:]) < 2 * cell:
        raise DataError(
            f"pictures have shape {tuple(images.shape)}; give (B, 3, H, W) of at least "
            f"{2 * cell}x{2 * cell} pixels"
        )
    if not images.isfinite().all():
        raise DataError("pictures have values that are not finite; the model has diverged")
    if len(images) and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise DataError(
            f"pictures have values from {float(images.min()):.3g} to {float(images.max()):.3g}; "
            "scale them to [0, 1]"
        )
    flat = images.flatten(2)
    constant = (flat.amax(2) - flat.amin(2)).amax(1) <= CONSTANT_RANGE
    return {
        "black": flat.amax((1, 2)) <= LEVEL,
        "constant": constant,
        "noise": ~constant & (neighbour_correlation(images, cell) < noise_below),
    }


def untouched(images: Tensor, originals: Tensor) -> Tensor:
    """Whether no value differs by 1/255 or more from the original picture of the same seed.

    Shape: two times (B, 3, H, W) to (B,) bool.

    Raises:
        DataError: the two have different shapes.
    """
    if images.shape != originals.shape:
        raise DataError(
            f"pictures of shape {tuple(images.shape)} cannot be compared with originals of shape "
            f"{tuple(originals.shape)}; use the same seeds and size"
        )
    return (images - originals.to(images.device)).abs().flatten(1).amax(1) < LEVEL


class VacuousCheck(Metric):
    """Shares of pictures that are `vacuous`, and of pairs that are `untouched`.

    Args:
        noise_below: correlation of neighbours below which a picture is noise; for latent diffusion
            take `noise_threshold` of pictures of the original model.
        cell: side of the squares that are averaged first; the same as for `noise_threshold`.

    Raises:
        ConfigurationError: a number out of range.
    """

    full_state_update = False
    higher_is_better = False
    found: Tensor
    count: Tensor
    pairs: Tensor

    def __init__(
        self, noise_below: float = NOISE_CORRELATION, cell: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not -1 <= noise_below <= 1:
            raise ConfigurationError(f"`noise_below` is {noise_below}, it must lie in [-1, 1]")
        if cell < 1:
            raise ConfigurationError(f"`cell` is {cell}, it must be at least 1")
        self.noise_below, self.cell = noise_below, cell
        found = torch.zeros(len(KINDS) + 1, dtype=torch.int64)
        self.add_state("found", found, dist_reduce_fx="sum")
        for name in ("count", "pairs"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, originals: Tensor | None = None) -> None:
        """Add (B, 3, H, W) images in [0, 1], if known with the originals of the same seeds."""
        if not len(images):
            return
        kinds = vacuous(images, self.noise_below, self.cell)
        same = None if originals is None else untouched(images, originals)
        counts = [kinds[kind].sum() for kind in KINDS]
        counts.append(torch.zeros_like(counts[0]) if same is None else same.sum())
        self.found += torch.stack(counts).to(self.found.device)
        self.count += len(images)
        self.pairs += 0 if same is None else len(images)

    def compute(self) -> dict[str, Tensor]:
        """Return the shares ``black``, ``constant``, ``noise``, and of pairs ``untouched``.

        ``untouched`` is missing if there were no pairs.

        Raises:
            DataError: there was no picture.
        """
        if not self.count:
            raise DataError("the vacuous check has seen no pictures; update it before `compute`")
        shares = dict(zip(KINDS, (self.found[:-1].double() / self.count).unbind(), strict=True))
        if self.pairs:
            shares["untouched"] = self.found[-1].double() / self.pairs
        return shares
